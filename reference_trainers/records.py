"""What a run leaves on disk: its directory, summary.json, metrics.csv."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import files
from .errors import UsageError, UserError
from .monitor import Measurement
from .recipe import Recipe

_PACKAGES = ("directpred", "torch", "lightning", "kornia", "scikit-learn", "scipy", "numpy")


def new_directory(out: Path, name: str | None, command: str) -> Path:
    """Create the directory of a run, with ``checkpoints/`` in it.

    Args:
        out: Where the runs are.
        name: Of the run; by default the command with date and time.
        command: What makes the run.

    Returns:
        The new directory.

    Raises:
        UsageError: The name is a path.
        UserError: A run of that name exists already.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise UsageError(f"--name must be a plain name, not {name!r}; --out takes a path")
    stamp = time.strftime(f"{command}-%Y%m%d-%H%M%S")
    candidates = [name] if name is not None else [stamp, *(f"{stamp}-{n}" for n in range(2, 100))]
    for candidate in candidates:
        try:
            (out / candidate).mkdir(parents=True)
        except FileExistsError:
            continue
        (out / candidate / "checkpoints").mkdir()
        return out / candidate
    raise UserError(f"{out / candidates[0]} exists already; choose another --name")


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, with the versions and the machine."""
    about = {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
    }
    write(directory / "summary.json", json.dumps(summary | about, indent=2) + "\n")


def write_metrics(
    directory: Path,
    runs: Iterable[tuple[Recipe, list[Measurement]]],
    options: Sequence[str] = ("predictor",),
) -> None:
    """Write metrics.csv, one value a row; ``index`` counts the values of a vector.

    Args:
        directory: Of the runs.
        runs: What was measured of each.
        options: Those that tell the runs apart, beside the seed: the first columns.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*options, "seed", "epoch", "metric", "index", "value"])
    for recipe, history in runs:
        about = [getattr(recipe, option) for option in options]
        for measured in history:
            for metric, index, value in _values(measured):
                row = (*about, recipe.seed, measured["epoch"], metric, index)
                table.writerow([*row, f"{value:.7g}"])
    write(directory / "metrics.csv", text.getvalue())


def write(path: Path, text: str) -> None:
    """Write a file at once or not at all, so that one interrupted leaves the old one whole."""
    files.write(path, text.encode())


def _values(measured: Measurement) -> Iterator[tuple[str, int | str, float]]:
    for metric, value in measured.items():
        if isinstance(value, list):
            yield from ((metric, index, number) for index, number in enumerate(value))
        elif metric != "epoch":
            yield metric, "", value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
