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
    group.addoption("--targets", action="store_true", help="what the table of targets needs")
    group.addoption("--rehearse", action="store_true", help="whether it runs, not how fast")


def pytest_configure(config: pytest.Config) -> None:
    """Take two threads at most: what a figure on a CPU stands for."""
    most = 1 if config.getoption("rehearse") else 2  # beside other tests two are slower than one
    torch.set_num_threads(min(most, torch.get_num_threads()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the sizes."""
    quick, targets, rehearse = map(metafunc.config.getoption, ("quick", "targets", "rehearse"))
    gpu = _on_gpu(metafunc.config)
    dims, rows = [128, 256, 512, 1024, 2048], [256, 512, 2048, 8192]
    if rehearse:
        dims, rows = [256, 512] if targets else [256], [512]
    elif quick:
        dims, rows = [128, 256], [512, 2048]
    elif gpu or targets:
        dims, rows = [128, 256, 512, 2048] if gpu else [256, 512, 1024, 2048], [512, 2048]
    for name, values in (("dim", dims), ("rows", rows), ("views", [1, 2] if gpu else [1])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for."""
    targets, gpu = config.getoption("targets"), _on_gpu(config)

    def asked(item: pytest.Item) -> bool:
        function, values = (
            item.originalname,
            item.callspec.params if hasattr(item, "callspec") else {},
        )  # type: ignore[attr-defined]
        backend = values.get("backend", "")
        if gpu and (backend == "NumPy" or "CPU" in backend):
            return False  # of the libraries those that compute on the CPU
        if values.get("views") == 2 and (values["dim"], values["rows"]) != (256, 512):
            return False
        return not targets or needed(function, values, gpu or config.getoption("rehearse"))

    items[:] = filter(asked, items)


def needed(function: str, values: dict[str, Any], gpu: bool) -> bool:
    """Tell whether the table of targets, or what stands beside it, needs a measurement."""
    name, dim = values.get("name"), values.get("dim", 0)
    match function:
        case "test_closing":
            return gpu
        case "test_step_over_bare_operations":
            return True
        case "test_copy_over_squarings":
            return bool(dim >= 512)
        case "test_step":
            names = {"2-layer", "published"} | ({"identity", "learned linear"} if gpu else set())
            return name in names and (dim, values["rows"]) == (256, 512)
        case "test_update":
            which = values["backend"], values["solver"]
            return which == ("torch, CPU", "eigh") or (*which, dim) == ("CuPy", "matmul", 256)
        case "test_training_step":
            return gpu and name == "DirectPred"
    return False


def _on_gpu(config: pytest.Config) -> bool:
    targets = config.getoption("targets") and torch.cuda.is_available()
    return bool(config.getoption("gpu") or targets)


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
        rehearsal: Whether it is only to be seen that all runs.
    """

    def __init__(
        self,
        benchmark: Any,
        keep: Callable[[Any], None],
        seconds: float,
        full: bool,
        rehearsal: bool,
    ) -> None:
        self._benchmark = benchmark
        self._keep = keep
        self.seconds = seconds
        self.full = full
        self.rehearsal = rehearsal

    def time(self, call: Call, reference: Call, against: str, **entry: Any) -> None:
        """Time a call, taking turns with a reference, A B A B and so on.

        Every round times the reference right before the call, so that both see the same machine,
        and the ratio kept is the median of call ÷ reference over the rounds. On a CPU each is timed
        right after an untimed run of its own (where that is cheap), or the published algorithm,
        which streams gigabytes, would leave the other with an empty cache and unmapped memory.

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
        again = once < 0.3 and not torch.cuda.is_available()
        if self.rehearsal:
            rounds, again = 2, False

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

    def keep(self, **entry: Any) -> None:
        """Keep what was measured in another way."""
        self._keep(entry)

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
    option = request.config.getoption
    seconds = 0.5 if option("quick") or _on_gpu(request.config) else 1.5
    return Bench(
        benchmark,
        lambda entry: record_property("entry", entry),
        0.01 if option("rehearse") else seconds,
        option("full"),
        option("rehearse"),
    )
