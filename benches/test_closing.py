"""The closing of a step on a GPU: what it keeps the device busy, and what it keeps the host.

Nothing waits for the device while closings are timed. The device's time is read from events around
each closing. It is given a delay first, so that the host is ahead of it from then on: else the time
between the events would be the host's. Where there is no GPU the host stands in, to rehearse.
"""

from __future__ import annotations

import itertools
import time
from statistics import median
from typing import Any

import pytest
import torch

from benches.conftest import Bench
from benches.predictors import NO_GRAPH, REFERENCE, build, features, synchronize

ROWS = 512
CLOSINGS = 5
"""In a round: as many as the largest freq, and no more launches than the device's queue takes."""

CYCLES = 2e9
"""Of a GPU in a second, about."""

SECONDS = 2e-3
"""What the host may take for a forward pass and a closing; the delay is for that long."""


class HostEvent:
    """Stands for a CUDA event where there is no GPU."""

    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        """Take the time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds from this one to a later one."""
        return 1e3 * (later.seconds - self.seconds)


def closings(name: str, dim: int, freq: int, device: str, seconds: float) -> dict[str, float]:
    """Median seconds of device and host for a closing, and of the host for a forward pass.

    Args:
        name: The predictor, a head.
        dim: Its width.
        freq: Of its steps; the figures are means over all, those without a solve included.
        device: Where.
        seconds: About how long to measure.
    """
    head, close = build(name, dim, device, freq=freq)
    batches = features(dim, ROWS, device)
    timer: Any = torch.cuda.Event if device == "cuda" else HostEvent
    around = [(timer(enable_timing=True), timer(enable_timing=True)) for _ in range(CLOSINGS)]
    found: dict[str, list[float]] = {"device_s": [], "host_s": [], "forward_s": []}
    warm, rounds = 3, 0

    def measure() -> None:
        forward = closing = 0.0
        if device == "cuda":
            torch.cuda._sleep(int(CYCLES * SECONDS * CLOSINGS))
        for (before, after), z in zip(around, itertools.cycle(batches), strict=False):
            started = time.perf_counter()
            head.gather(z)
            called = time.perf_counter()
            before.record()
            recorded = time.perf_counter()
            close()
            closing += time.perf_counter() - recorded
            forward += called - started
            after.record()
        synchronize(device)
        busy = sum(before.elapsed_time(after) for before, after in around)
        found["device_s"].append(busy / 1e3 / CLOSINGS)
        found["host_s"].append(closing / CLOSINGS)
        found["forward_s"].append(forward / CLOSINGS)

    with torch.no_grad():
        for _ in range(warm):
            measure()  # kernels load, the closing is recorded
        for times in found.values():
            times.clear()
        end = time.perf_counter() + seconds
        while rounds == 0 or time.perf_counter() < end:
            measure()
            rounds += 1
    closed = (warm + rounds) * CLOSINGS
    assert int(head.step_count) == closed, f"of {closed} closings {int(head.step_count)} counted"
    return {key: median(times) for key, times in found.items()} | {"rounds": rounds}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [REFERENCE, NO_GRAPH])
def test_closing(bench: Bench, device: str, dim: int, name: str) -> None:
    if device != "cuda" and not bench.rehearsal:
        pytest.skip("no CUDA device")
    for freq in (1, 5) if dim == 2048 else (1,):
        entry = {"group": "closing", "name": name, "dim": dim, "freq": freq, "rows": ROWS}
        bench.keep(**entry, **closings(name, dim, freq, device, bench.seconds))
