"""The bare operations: what nobody can do without who decomposes the correlation.

They check nothing, average nothing and keep no state; DirectPred's time is judged by theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from benches.predictors import features, loss

UPDATE = "matrix product + eigh + rebuild"
STEP = "bare operations"


def update(xp: Any, z: Any) -> Any:
    """Compute the bare operations of an update, in any array library with NumPy's `linalg`."""
    s, u = xp.linalg.eigh(z.T @ z)
    return (u * s) @ u.T


def step(dim: int, rows: int) -> Callable[[], object]:
    """Make the closure that takes the bare operations of a whole step on a CPU."""
    batches = features(dim, rows)
    target = batches[-1].roll(1, dims=0)
    weight = torch.eye(dim)
    correlation = sum(z.T @ z for z in batches) / (len(batches) * rows)
    stream = itertools.cycle(batches)

    def run() -> None:
        z = next(stream)
        prediction = (z @ weight).requires_grad_()
        loss(prediction, target).backward()
        assert prediction.grad is not None
        prediction.grad @ weight.T
        z.T @ z
        s, u = torch.linalg.eigh(correlation)
        (u * s) @ u.T

    return run
