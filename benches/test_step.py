"""A step of the predictor: forward, loss, backward and update, next to its peers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benches.conftest import Bench
from benches.predictors import HIDDEN, NAMES, NO_GRAPH, REFERENCE, features, step, synchronize
from benches.published import stored_bytes
from directpred.correlation import UNIT, moments, moving_average
from directpred.solvers import SOLVERS
from directpred.spectrum import Eq18


@pytest.mark.parametrize("name", [*NAMES, REFERENCE, NO_GRAPH])
def test_step(bench: Bench, device: str, name: str, dim: int, rows: int, views: int) -> None:
    entry = {"group": "step", "name": name, "dim": dim, "rows": rows, "views": views}
    if name in (REFERENCE, NO_GRAPH) and device == "cpu":
        pytest.skip("a recorded closing is one on a GPU")
    if name == "2-layer" and dim not in HIDDEN:
        pytest.skip("no 2-layer predictor is in use at this dim")
    if name == "published":
        stored = stored_bytes(dim, views * rows)
        if stored > 6e9:
            bench.leave_out(f"{stored / 1e9:.0f} GB", **entry)
        if dim > 1024 and device == "cpu" and not bench.full:
            bench.leave_out("20 s a step", **entry)
    size = (dim, rows, device, views)
    bench.time(step(name, *size), step(REFERENCE, *size), REFERENCE, **entry)


@pytest.mark.parametrize(
    "name", ["loss", "forward", "backward", "correlation", "moving average", "solve"]
)
def test_part(bench: Bench, device: str, name: str) -> None:
    """One part of DirectPred's step by itself, as a share of the whole."""
    dim, rows = 256, 512
    z, other = features(dim, rows, device)[:2]
    weight, correlation = torch.eye(dim, device=device), z.T @ z / rows

    parts: dict[str, Callable[[], object]] = {
        "loss": step("identity", dim, rows, device),
        "forward": lambda: z @ weight,
        "backward": lambda: other @ weight.T,
        "correlation": lambda: moments(z, torch.float32),
        "moving average": lambda: moving_average(correlation, correlation, 0.3, 0.7 / UNIT / rows),
        "solve": lambda: SOLVERS["auto"](correlation, Eq18()),
    }

    def part() -> None:
        with torch.set_grad_enabled(name == "loss"):
            parts[name]()
        synchronize(device)

    entry = {"group": "part", "name": name, "dim": dim, "rows": rows}
    bench.time(part, step(REFERENCE, dim, rows, device), REFERENCE, **entry)
