"""Run all benches and write benches/results/<device>.json and .md.

python benches/run.py            about 15 minutes on two CPU cores
python benches/run.py --quick    about 4, a few sizes; writes <device>-quick.*, which git ignores
python benches/run.py --full     also what takes half a minute a step
python benches/run.py --gpu      about 5 on a GPU, what runs on it, fewer sizes
python benches/run.py --targets  a minute, what the table of targets needs; <device>-targets.*

With --rehearse everything runs a few times only, at one size: whether it runs, not how fast.
"""

from __future__ import annotations

import os

# Before NumPy, torch or JAX start their threads: what a figure on a CPU stands for.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(2, CORES)
for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ[f"{library}_NUM_THREADS"] = str(THREADS)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import cpuinfo  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))  # where `benches` is, for a script

from benches.report import markdown  # noqa: E402

BENCHES = Path(__file__).parent
PACKAGES = [
    "directpred",
    "numpy",
    "torch",
    "torchvision",
    "jax",
    "cupy-cuda13x",
]


class Collector:
    """A pytest plugin that gathers the entries, and what was left out or failed and why."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.left_out: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the entry of a test that ran, or the reason of one that did not."""
        entries = [entry for key, entry in report.user_properties if key == "entry"]
        if report.when == "call":
            self.entries += entries
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple) and not entries:
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            why = "failed"
        if why:
            self.left_out.setdefault(why, []).append(report.nodeid.rpartition("::")[2])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Take note of a file that could not even be imported."""
        if report.failed:
            self.left_out.setdefault("failed", []).append(report.nodeid)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> int:
    """Run, and write the results; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="a few sizes, a few rounds")
    how_much.add_argument("--full", action="store_true", help="also half a minute a step")
    how_much.add_argument("--gpu", action="store_true", help="what runs on a GPU, fewer sizes")
    how_much.add_argument("--targets", action="store_true", help="what the targets need; prints")
    parser.add_argument("--rehearse", action="store_true", help="a few times only: does it run?")
    parser.add_argument("--out", type=Path, default=BENCHES / "results", help="folder")
    options = parser.parse_args()
    kinds = [x for x in ("quick", "full", "gpu", "targets", "rehearse") if getattr(options, x)]
    flags = [f"--{kind}" for kind in kinds]

    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    start = time.perf_counter()
    collector = Collector()
    status = pytest.main(
        [
            str(BENCHES),
            *("-q", "-rN", "-p", "no:cacheprovider", "--import-mode=append"),
            "--benchmark-columns=median,iqr,rounds",
            *flags,
        ],
        plugins=[collector],
    )
    if status == pytest.ExitCode.INTERRUPTED:
        print("interrupted: nothing written")
        return int(status)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    results = {
        "device": gpu or f"{THREADS} CPU threads",
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "cores": CORES,
        "busy": round(busy, 1),
        "threads": THREADS,
        "gpu": gpu,
        "graphs": os.environ.get("DIRECTPRED_GRAPHS") != "0",
        "only_targets": options.targets,
        "versions": versions(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": " ".join(["python benches/run.py", *flags]),
        "seconds": round(time.perf_counter() - start),
        "entries": collector.entries,
        "left_out": collector.left_out,
    }
    slug = gpu.lower().replace(" ", "-") if gpu else f"cpu-{THREADS}-threads"
    named = [kind for kind in kinds if kind in ("quick", "targets", "rehearse")]
    path = options.out / "-".join([slug, *named])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(e, ensure_ascii=False) for e in collector.entries)
    head = json.dumps({**results, "entries": []}, indent=1, ensure_ascii=False)
    path.with_suffix(".json").write_text(head.replace('"entries": []', f'"entries": [\n{lines}]'))
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    if options.targets:
        print(text)
    print(f"{results['seconds']} s; written to {path}.json and .md")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
