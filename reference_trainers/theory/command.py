"""The command ``directpred dynamics``: the claims of the theory as a table, figures and numbers."""

from __future__ import annotations

import csv
import inspect
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import records
from ..errors import UsageError, UserError
from ..progress import open_console
from .claim import Finding, Panel, Result
from .collapse import collapse
from .directpred import directpred
from .draw import draw, overview
from .ema import ema
from .fixed_points import fixed_points
from .simulate import simulate
from .theorem1 import theorem1
from .theorem2 import theorem2
from .theorem3 import theorem3

CLAIMS: dict[str, Callable[..., Result]] = {
    "simulate": simulate,
    "theorem1": theorem1,
    "theorem2": theorem2,
    "theorem3": theorem3,
    "fixed-points": fixed_points,
    "collapse": collapse,
    "ema": ema,
    "directpred": directpred,
}
"""By the names that the command takes."""


def dynamics(claim: str | None, knobs: Mapping[str, Any], out: Path, name: str | None) -> None:
    """Try one claim, or all of them; write a table, pictures and the numbers.

    Args:
        claim: Of `CLAIMS`, or None for all.
        knobs: What to give the claims by keyword; of all, each gets those that it has.
        out: Where the runs are.
        name: Of this one.

    Raises:
        UsageError: A knob that the claim does not have, or a value that makes it void.
        UserError: Something is wrong with the directory, or the equations cannot be integrated.
    """
    chosen = [claim] if claim else list(CLAIMS)
    known = {name: knobs_of(name) for name in chosen}
    for knob in knobs:
        if not any(knob in of_claim for of_claim in known.values()):
            has = ", ".join(
                sorted(f"--{x.replace('_', '-')}" for x in set().union(*known.values()))
            )
            raise UsageError(f"{claim} has no option --{knob.replace('_', '-')}; it has {has}")
    started = time.perf_counter()
    directory = records.new_directory(out, name, "dynamics")
    try:
        results = {name: _try(name, knobs) for name in chosen}
    except BaseException:
        shutil.rmtree(directory)  # there is nothing in it
        raise
    (directory / "checkpoints").rmdir()  # nor will there be anything to go on from
    for name, result in results.items():
        draw(result, directory / f"{name}.png")
    if not claim:
        overview(list(results.values()), directory / "dynamics.png")
    _write(directory, knobs, results, time.perf_counter() - started)
    console = open_console()
    console.print(table(results))
    console.print(f"{time.perf_counter() - started:.0f} s; written to {directory}", soft_wrap=True)


def knobs_of(claim: str) -> set[str]:
    """The knobs that a claim has."""
    return set(inspect.signature(CLAIMS[claim]).parameters)


def _try(claim: str, knobs: Mapping[str, Any]) -> Result:
    has = knobs_of(claim)
    try:
        return CLAIMS[claim](**{knob: value for knob, value in knobs.items() if knob in has})
    except UserError as error:
        raise type(error)(f"{claim}: {error}") from None


def table(results: Mapping[str, Result]) -> Table:
    """What was predicted and what was measured, a section a claim."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    shown.add_column("claim and quantity", overflow="fold")
    for heading in ("predicted", "measured", ""):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        shown.add_row(f"[bold]{name}[/bold]: {escape(result.claim)}")
        for finding in result.findings:
            predicted = "–" if finding.predicted is None else _number(finding.predicted)
            if finding.relation != "=":
                predicted = f"{finding.relation} {predicted}"
            mark = {True: "yes", False: "[bold]no[/bold]", None: ""}[finding.holds]
            shown.add_row(f"  {escape(finding.what)}", predicted, _number(finding.measured), mark)
        shown.add_section()
    return shown


def _number(value: float) -> str:
    return "∞" if value == math.inf else f"{value:.4g}"


def _write(
    directory: Path, knobs: Mapping[str, Any], results: Mapping[str, Result], seconds: float
) -> None:
    """Write summary.json, and dynamics.csv with every point of every curve and cell."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["claim", "panel", "curve", "label", "kind", "index", "x", "y", "value"])
    for name, result in results.items():
        for number, panel in enumerate(result.panels, 1):
            rows.writerows([name, number, *point] for point in _points(panel))
    records.write(directory / "dynamics.csv", text.getvalue())
    records.write_summary(
        directory,
        {
            "command": "dynamics",
            "status": "finished",
            "seconds": round(seconds, 2),
            "options": dict(knobs),
            "results": {
                name: {
                    "claim": result.claim,
                    "findings": [_entry(finding) for finding in result.findings],
                }
                for name, result in results.items()
            },
        },
    )


def _points(panel: Panel) -> Iterator[list[object]]:
    """Curve, label, kind, index of the line in it, x, y; and the value of a cell."""
    for number, curve in enumerate(panel.curves, 1):
        about = number, curve.label, "predicted" if curve.predicted else "measured"
        for (row, *index), y in np.ndenumerate(curve.y):
            yield [*about, *(index or [0]), f"{curve.x[row]:.7g}", f"{y:.7g}", ""]
    if panel.cells:
        for (row, column), value in np.ndenumerate(panel.cells.values):
            place = panel.cells.x[column], panel.cells.y[row]
            yield [0, "cells", "measured", 0, *(f"{x:.7g}" for x in (*place, value))]


def _entry(finding: Finding) -> dict[str, Any]:
    """As JSON takes it: infinity, which stands for "never" and "everywhere", becomes null."""
    numbers = {"measured": finding.measured, "predicted": finding.predicted}
    return {
        "what": finding.what.strip(),
        **{
            key: float(value) if value is not None and math.isfinite(value) else None
            for key, value in numbers.items()
        },
        "relation": finding.relation,
        "tolerance": finding.tolerance,
        "holds": finding.holds,
    }
