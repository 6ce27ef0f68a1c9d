"""Measuring for all benches: how often, against what, and where it is written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, NoReturn

import pytest
import torch

Call = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say how much is measured."""
    group = parser.getgroup("directpred benches")
    group.addoption("--quick", action="store_true", help="a few sizes, a few rounds")
    group.addoption("--full", action="store_true", help="also what takes a minute a step")
    group.addoption("--gpu", action="store_true", help="what runs on a GPU, fewer sizes")


def pytest_configure(config: pytest.Config) -> None:
    """Take two threads at most: what a figure on a CPU stands for."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the sizes."""
    quick, gpu = (metafunc.config.getoption(name) for name in ("quick", "gpu"))
    dims = [128, 256] if quick else [128, 256, 2048] if gpu else [128, 256, 512, 1024, 2048]
    if "dim" in metafunc.fixturenames:
        metafunc.parametrize("dim", dims)
    if "rows" in metafunc.fixturenames:
        metafunc.parametrize("rows", [512, 2048] if quick or gpu else [256, 512, 2048, 8192])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --gpu, leave out the libraries that compute on the CPU."""
    if config.getoption("gpu"):
        backend = {item: item.callspec.params.get("backend", "") for item in items}  # type: ignore[attr-defined]
        items[:] = [i for i in items if backend[i] != "NumPy" and "CPU" not in backend[i]]


@pytest.fixture(scope="session")
def device() -> str:
    """Where torch computes: on the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Bench:
    """Measures calls, and keeps one entry a test for the report.

    Args:
        benchmark: The fixture of pytest-benchmark.
        keep: Takes the entry.
        seconds: About how long one measurement may take.
        full: Whether nothing is left out for its time.
    """

    def __init__(self, benchmark: Any, keep: Callable[[Any], None], seconds: float, full: bool):
        self._benchmark = benchmark
        self._keep = keep
        self.seconds = seconds
        self.full = full

    def time(self, call: Call, reference: Call, against: str, **entry: Any) -> None:
        """Time a call, taking turns with a reference, A B A B and so on.

        Every round times the reference right before the call, so that both see the same machine,
        and the ratio kept is the median of call ÷ reference over the rounds. Each is timed right
        after an untimed run of its own (where that is cheap), or the published algorithm, which
        streams gigabytes, would leave the other with an empty cache and unmapped memory.

        Args:
            call: What is measured. It must wait for its device.
            reference: What it is compared to.
            against: The name of the reference.
            **entry: What identifies the measurement: group, name, dim, rows, …
        """
        once = _seconds(reference) + _seconds(call)  # the first run, which warms up
        for _ in range(3):
            if once < self.seconds / 4:
                once = min(once, _seconds(reference) + _seconds(call))
        rounds = min(max(round(self.seconds / once), 5 if once < 1 else 3), 300)
        compared: list[float] = []
        self._benchmark.group = ", ".join(
            str(v) if k == "group" else f"{k} {v}" for k, v in entry.items() if k != "name"
        )
        again = once < 0.3

        def setup() -> None:
            if again:
                reference()
            compared.append(_seconds(reference))
            if again:
                call()

        self._benchmark.pedantic(call, setup=setup, rounds=rounds)
        if self._benchmark.stats is None:  # --benchmark-disable
            return
        times = self._benchmark.stats.stats.data
        low, middle, high = quantiles(times)
        ratio_low, ratio, ratio_high = quantiles(
            a / b for a, b in zip(times, compared, strict=True)
        )
        self._keep(
            entry
            | {
                "median_s": middle,
                "iqr_s": high - low,
                "fastest_s": min(times),
                "rounds": rounds,
                "against": against,
                "ratio": ratio,
                "ratio_iqr": ratio_high - ratio_low,
            }
        )

    def size(self, measured: int, **entry: Any) -> None:
        """Keep a size in bytes."""
        self._keep(entry | {"bytes": measured})

    def leave_out(self, why: str, **entry: Any) -> NoReturn:
        """Skip the test, with its reason in the report."""
        self._keep(entry | {"left_out": why})
        pytest.skip(why)


def difference(a: Call, b: Call, rounds: int = 50) -> float:
    """Seconds that a call takes more than another, the median over turns."""
    a(), b()
    return median(_seconds(a) - _seconds(b) for _ in range(rounds))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture
def bench(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record_property: Callable[[str, object], None],
) -> Bench:
    """Measures and keeps."""
    seconds = 0.5 if request.config.getoption("quick") or request.config.getoption("gpu") else 1.5
    return Bench(
        benchmark,
        lambda entry: record_property("entry", entry),
        seconds,
        request.config.getoption("full"),
    )
