"""One update of DirectPred in every array library, next to its bare operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import directpred as dp
from benches import bare
from benches.conftest import Bench
from directpred.solvers import SOLVERS

ROWS = 512
SOLVER_NAMES = ["eigh", "matmul"]

Call = Callable[[], object]


def numpy_calls(z: np.ndarray[Any, Any], solver: str) -> tuple[Call, Call]:
    predictor = dp.DirectPred(z.shape[1], solver=solver)
    return lambda: predictor.update(z), lambda: bare.update(np, z)


def torch_calls(z: np.ndarray[Any, Any], solver: str, device: str) -> tuple[Call, Call]:
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from benches.predictors import synchronize

    x = torch.from_numpy(z).to(device)
    predictor = dp.DirectPred(x.shape[1], solver=solver, nonfinite="skip")

    def update() -> None:
        predictor.update(x)
        synchronize(device)

    def floor() -> None:
        bare.update(torch, x)
        synchronize(device)

    return update, floor


def cupy_calls(z: np.ndarray[Any, Any], solver: str) -> tuple[Call, Call]:
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no CUDA device")
    x = cupy.asarray(z)
    predictor = dp.DirectPred(x.shape[1], solver=solver, nonfinite="skip")

    def update() -> None:
        predictor.update(x)
        cupy.cuda.Device().synchronize()

    def floor() -> None:
        bare.update(cupy, x)
        cupy.cuda.Device().synchronize()

    return update, floor


def jax_calls(z: np.ndarray[Any, Any], solver: str, platform: str) -> tuple[Call, Call]:
    jax = pytest.importorskip("jax")
    dpj = pytest.importorskip("directpred.jax", reason="no directpred.jax in this version")
    try:
        place = jax.devices(platform)[0]
    except RuntimeError:
        pytest.skip("no CUDA device")
    x = jax.device_put(z, place)
    state = jax.device_put(dpj.init(x.shape[1], solver=solver), place)
    advance = jax.jit(dpj.update)
    floor = jax.jit(lambda x: bare.update(jax.numpy, x))

    def update() -> None:
        nonlocal state
        state, weight = advance(state, x)
        weight.block_until_ready()

    return update, lambda: floor(x).block_until_ready()


BACKENDS: dict[str, Callable[[Any, str], tuple[Call, Call]]] = {
    "NumPy": numpy_calls,
    "torch, CPU": lambda z, solver: torch_calls(z, solver, "cpu"),
    "JAX jit, CPU": lambda z, solver: jax_calls(z, solver, "cpu"),
    "torch, GPU": lambda z, solver: torch_calls(z, solver, "cuda"),
    "CuPy": cupy_calls,
    "JAX jit, GPU": lambda z, solver: jax_calls(z, solver, "gpu"),
}


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=[pytest.mark.gpu] * ("GPU" in b or b == "CuPy")) for b in BACKENDS],
)
def test_update(bench: Bench, backend: str, solver: str, dim: int) -> None:
    if solver not in SOLVERS:
        pytest.skip(f"no solver {solver!r} in this version")
    z = np.random.default_rng(0).normal(size=(ROWS, dim)).astype(np.float32)
    update, floor = BACKENDS[backend](z, solver)
    bench.time(
        update, floor, bare.UPDATE, group="update", name=backend, solver=solver, dim=dim, rows=ROWS
    )
