"""What a whole step, and DirectCopy's weight, cost over the operations that they stand for."""

from __future__ import annotations

import pytest
import torch

import directpred as dp
from benches import bare
from benches.conftest import Bench
from benches.predictors import REFERENCE, features, step
from directpred.matrix import largest_eigenvalue, powers
from directpred.solvers import SOLVERS


def test_step_over_bare_operations(bench: Bench, device: str) -> None:
    if device != "cpu":
        pytest.skip("the bare operations are those of a CPU")
    dim, rows = 256, 512
    entry = {"group": "bare", "name": REFERENCE, "dim": dim, "rows": rows}
    bench.time(step(REFERENCE, dim, rows), bare.step(dim, rows), bare.STEP, **entry)


def test_copy_over_squarings(bench: Bench, device: str, dim: int) -> None:
    """Time DirectCopy's whole weight, its norm included, over the squarings for the norm alone."""
    if device != "cpu":
        pytest.skip("on a GPU the norm is had by squarings")
    z = features(dim, 2 * dim)[0]
    correlation, eye = z.T @ z / len(z), torch.eye(dim)
    bench.time(
        lambda: SOLVERS["auto"](correlation, dp.DirectCopy(), 0.0),
        lambda: largest_eigenvalue(powers(correlation, eye)),
        "squarings",
        group="norm",
        name="DirectCopy",
        dim=dim,
        rows=len(z),
    )
