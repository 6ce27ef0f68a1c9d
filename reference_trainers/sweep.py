"""The command ``directpred sweep``: grids of options over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from . import records
from .compare import cell, statistics
from .errors import Interrupted
from .grids import Grid
from .heatmaps import Panels, plot_grids, short
from .monitor import Measurement
from .progress import Progress, open_console
from .recipe import Recipe
from .runs import Runs, load_labelled, open_directory
from .style import LEADING
from .train import Machine, Run, check

COLUMNS = {
    "probe": ("linear probe\ntop-1, %", 1),
    "knn": ("k-NN\ntop-1, %", 1),
    "spread": ("spread", 2),
    "effective_rank": ("effective\nrank", 1),
    "alignment": ("alignment", 2),
}
UNTRAINED = ("probe", "knn", "spread")
"""What is told of the network before training; no predictor has a part in it."""


def sweep(
    options: dict[str, Any],
    grids: Sequence[Grid],
    seeds: int,
    out: Path,
    name: str | None,
    workers: int,
    keep: bool,
    machine: Machine,
) -> None:
    """Train every point of the grids with every seed; write tables, a picture, and all the numbers.

    A sweep of the same name and recipe goes on: what it has finished is not done again, also where
    its grids have more points now.

    Args:
        options: Of the recipe, without seed.
        grids: What varies.
        seeds: How many; 0, 1, ... The first seed of all points comes before the second.
        out: Where the runs are.
        name: Of this sweep.
        workers: Processes to share the runs; the numbers do not depend on it.
        keep: Whether to keep the checkpoints of finished runs.
        machine: Where the images are.

    Raises:
        UserError: Something is wrong with the options or the directory, or a run failed.
        Interrupted: By Ctrl-C or SIGTERM; the finished runs are written, and those at work saved.
    """
    base = Recipe.parse(options)
    data = load_labelled(base, machine, "sweep")
    planned = {grid.name: [grid.recipe(base, point) for point in grid.points()] for grid in grids}
    for recipes in planned.values():
        for recipe in recipes:
            check(recipe, data)
    directory = open_directory(out, name, "sweep", base)
    swept = Sweep(directory, base, grids, range(seeds), keep, machine)
    runs, console = swept.runs, open_console()
    stopped: Interrupted | None = None
    try:
        with Progress(console, total=runs.epochs_left()) as progress:
            runs.run(progress, workers)
    except KeyboardInterrupt as interrupt:
        stopped = runs.stopped(interrupt)
    if runs.finished:
        plot_grids(swept.panels(), swept.about(*grids, told="mean"), directory / "sweep.png")
        for grid in grids:
            console.print(swept.table(grid))
    if stopped is not None:
        raise stopped
    runs.conclude(console)


class Sweep:
    """The runs of a sweep, and what is told of them.

    Args:
        directory: Of the sweep.
        base: The recipe that the runs share, but for what the grids say.
        grids: What varies.
        seeds: Of every point.
        keep: Whether to keep the checkpoints of finished runs.
        machine: Where the images are.
    """

    def __init__(
        self,
        directory: Path,
        base: Recipe,
        grids: Sequence[Grid],
        seeds: Sequence[int],
        keep: bool,
        machine: Machine,
    ) -> None:
        self.directory, self.base, self.grids, self.seeds = directory, base, grids, seeds
        labels: dict[Recipe, str] = {}
        for seed in seeds:
            for grid in grids:
                for point in grid.points():
                    told = [f"{name}={short(x)}" for name, x in {**grid.given, **point}.items()]
                    labels.setdefault(self.recipe(grid, point, seed), " ".join(told))
        self.runs = Runs(directory, labels, machine, self.write, keep)

    def recipe(self, grid: Grid, point: Mapping[str, Any], seed: int) -> Recipe:
        """Of a run."""
        return replace(grid.recipe(self.base, point), seed=seed)

    def found(self, grid: Grid, point: Mapping[str, Any]) -> list[Run]:
        """The finished runs of a point, by seed."""
        recipes = (self.recipe(grid, point, seed) for seed in self.seeds)
        return [self.runs.finished[recipe] for recipe in recipes if recipe in self.runs.finished]

    def untrained(self, grid: Grid) -> list[Measurement]:
        """By seed, what was measured before training, where that is the same for all points."""
        floors: dict[int, list[Measurement]] = {}
        for point in grid.points():
            for run in self.found(grid, point):
                before = run.history[0]
                floor = {name: before[name] for name in UNTRAINED if name in before}
                floors.setdefault(run.recipe.seed, []).append(floor)
        same = all(one == of[0] for of in floors.values() for one in of)
        return [of[0] for of in floors.values()] if same else []

    def table(self, grid: Grid) -> Table:
        """Mean ± standard deviation over the seeds, for every point of a grid."""
        rows = [
            ([short(x) for x in point.values()], [_numbers(run.history[-1]) for run in runs])
            for point in grid.points()
            for runs in [self.found(grid, point)]
        ]
        columns = {
            column: heading
            for column, heading in COLUMNS.items()
            if any(column in measured for _, runs in rows for measured in runs)
        }
        floors = [_numbers(floor) for floor in self.untrained(grid)]
        caption = "untrained network: " + ", ".join(
            f"{heading.splitlines()[0]} {cell([floor[column] for floor in floors], digits)}"
            for column, (heading, digits) in columns.items()
            if floors and column in UNTRAINED
        )
        table = Table(
            title=f"{grid.title}\n{self.about(grid)}",
            caption=caption if floors else None,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 0, 0, 1),
        )
        for name in grid.vary:
            table.add_column(name.replace("_", "_\n", 1), justify="right", no_wrap=True)
        for heading, _ in columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for values, runs in rows:
            cells = [
                cell([measured[column] for measured in runs if column in measured], digits)
                for column, (_, digits) in columns.items()
            ]
            table.add_row(*values, *cells)
        return table

    def panels(self) -> list[Panels]:
        """The grids with, for each metric, the values (point, seed); NaN where there is no run."""
        return [
            Panels(
                grid.title,
                grid.vary,
                {
                    column: [
                        [_numbers(run.history[-1]).get(column, nan) for run in runs] or [nan]
                        for point in grid.points()
                        for runs in [self.found(grid, point)]
                    ]
                    for column in COLUMNS
                },
            )
            for grid in self.grids
        ]

    def about(self, *grids: Grid, told: str = "mean ± std") -> str:
        """Data set, epochs, and what is told of how many seeds of the points that have any."""
        found = {len(self.found(grid, point)) for grid in grids for point in grid.points()} - {0}
        least, most = min(found, default=0), max(found, default=0)
        seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds"
        seeds = "1 seed" if most == 1 else f"{told} of {seeds}"
        epochs = "1 epoch" if self.base.epochs == 1 else f"{self.base.epochs} epochs"
        return f"{self.base.images}, {epochs}, {seeds}"

    def write(self, status: str) -> None:
        """Write summary.json and metrics.csv with what is there."""
        options = dict.fromkeys(
            ("predictor", *(name for grid in self.grids for name in (*grid.given, *grid.vary)))
        )
        runs = [
            (run.recipe, [{"epoch": m["epoch"], **_numbers(m)} for m in run.history])
            for run in self.runs.ordered()
        ]
        records.write_metrics(self.directory, runs, list(options))
        shared = asdict(self.base)
        del shared["seed"]
        records.write_summary(
            self.directory,
            {
                "command": "sweep",
                "status": status,
                "seconds": round(self.runs.seconds(), 2),
                "recipe": shared,
                "seeds": list(self.seeds),
                "grids": [self._told(grid) for grid in self.grids],
                "failures": self.runs.told_failures(),
            },
        )

    def _told(self, grid: Grid) -> dict[str, Any]:
        results = []
        for point in grid.points():
            runs = self.found(grid, point)
            measured = [_numbers(run.history[-1]) | {"seconds": run.seconds} for run in runs]
            names = dict.fromkeys(name for numbers in measured for name in numbers)
            values = {name: [numbers[name] for numbers in measured] for name in names}
            results.append(
                {"point": point} | {name: statistics(found) for name, found in values.items()}
            )
        return {
            "name": grid.name,
            "title": grid.title,
            "given": dict(grid.given),
            "vary": {name: list(values) for name, values in grid.vary.items()},
            "results": results,
        }


def _numbers(measured: Measurement) -> dict[str, float]:
    """The plain numbers of a measurement, mean alignment of the leading eigenvectors, and tr F̂."""
    numbers = {
        name: value
        for name, value in measured.items()
        if name != "epoch" and not isinstance(value, list)
    }
    if isinstance(alignment := measured.get("alignment"), list):
        numbers["alignment"] = mean(alignment[-LEADING:])
    if isinstance(eigenvalues := measured.get("correlation_eigenvalues"), list):
        numbers["correlation_trace"] = sum(eigenvalues)
    return numbers
