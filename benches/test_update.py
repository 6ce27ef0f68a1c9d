"""One update of DirectPred on the CPU, next to the three operations it cannot do without.

Run with ``pytest benches/test_update.py``. Each group is one size in one library; `update` is the
object's whole step (checks, statistics, moving average, solver), `floor` a bare matrix product,
eigendecomposition and product that rebuilds the weight. ``--benchmark-json`` keeps, under
`extra_info`, the median ratio of the two measured in turn, which a drifting machine leaves alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest

import directpred as dp

ROWS = 512
ROUNDS = {128: 100, 256: 60, 512: 20, 1024: 7, 2048: 3}


def numpy_floor(z: np.ndarray) -> np.ndarray:
    s, u = np.linalg.eigh(z.T @ z)
    return (u * s) @ u.T


def torch_floor(z: Any) -> Any:
    import torch

    s, u = torch.linalg.eigh(z.T @ z)
    return (u * s) @ u.T


def seconds(call: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


@pytest.mark.parametrize("dim", ROUNDS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("what", ["floor", "update"])
def test_update(benchmark: Any, library: str, dim: int, what: str) -> None:
    z: Any = np.random.default_rng(0).normal(size=(ROWS, dim)).astype(np.float32)
    if library == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(2)
        z = torch.from_numpy(z)
    floor = numpy_floor if library == "numpy" else torch_floor
    update = dp.DirectPred(dim).update
    benchmark.group = f"{library}, dim {dim}, {ROWS} rows"
    benchmark.pedantic(
        floor if what == "floor" else update, (z,), rounds=ROUNDS[dim], warmup_rounds=1
    )
    if what == "update":
        ratios = [1 / (seconds(floor, z) / seconds(update, z)) for _ in range(ROUNDS[dim])]
        benchmark.extra_info["update / floor, paired median"] = round(median(ratios), 3)
