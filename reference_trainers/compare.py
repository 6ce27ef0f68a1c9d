"""The command ``directpred compare``: one recipe with every predictor, over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

from . import records
from .monitor import Measurement
from .plot import plot
from .progress import Progress, open_console
from .recipe import LABELS, Recipe
from .runs import Runs, load_labelled, open_directory
from .train import Machine

COLUMNS = {
    "probe": ("linear probe\ntop-1, %", 1),
    "knn": ("k-NN\ntop-1, %", 1),
    "spread": ("spread", 2),
    "effective_rank": ("effective\nrank", 1),
    "seconds": ("seconds", 0),
}


def compare(
    options: dict[str, Any],
    predictors: Sequence[str],
    seeds: int,
    out: Path,
    name: str | None,
    workers: int,
    machine: Machine,
) -> None:
    """Train every predictor with every seed; write a table, a picture, and all the numbers.

    Args:
        options: Of the recipe, without predictor and seed.
        predictors: Names, of `recipe.PREDICTORS`.
        seeds: How many; 0, 1, ...
        out: Where the runs are.
        name: Of this one.
        workers: Processes to share the runs; the numbers do not depend on it.
        machine: Where the images are.

    A comparison of the same name and recipe goes on: what it has finished is not done again.

    Raises:
        UserError: Something is wrong with the options or the directory, or a run failed.
        Interrupted: By Ctrl-C or SIGTERM; the finished runs are written.
    """
    base = Recipe.parse(options)
    load_labelled(base, machine, "compare")
    recipes = [
        replace(base, predictor=predictor, seed=seed)
        for seed in range(seeds)
        for predictor in predictors
    ]
    directory = open_directory(out, name, "compare", base)
    comparison = Comparison(directory, base, recipes, machine)
    runs, console = comparison.runs, open_console()
    try:
        with Progress(console, total=runs.epochs_left()) as progress:
            runs.run(progress, workers)
    except KeyboardInterrupt as interrupt:
        raise runs.stopped(interrupt) from None
    if runs.finished:
        plot(runs.ordered(), directory / "compare.png")
        console.print(comparison.table())
    runs.conclude(console)


class Comparison:
    """The runs of a comparison, and what is told of them.

    Args:
        directory: Of the comparison.
        base: The recipe that the runs share.
        recipes: One for each run.
        machine: Where the images are.
    """

    def __init__(
        self, directory: Path, base: Recipe, recipes: Sequence[Recipe], machine: Machine
    ) -> None:
        self.directory, self.base, self.recipes = directory, base, recipes
        labels = {recipe: recipe.predictor for recipe in recipes}
        self.runs = Runs(directory, labels, machine, self.write, keep=True)

    def rows(self) -> dict[str, dict[str, list[float]]]:
        """For each predictor, and the untrained network, the values of each column by seed."""
        rows: dict[str, dict[str, list[float]]] = {}
        floors: dict[int, Measurement] = {}
        for run in self.runs.ordered():
            floors.setdefault(run.recipe.seed, run.history[0])
            row = rows.setdefault(run.recipe.predictor, {column: [] for column in COLUMNS})
            for column in COLUMNS:
                row[column].append(_number(run.history[-1] | {"seconds": run.seconds}, column))
        rows["untrained"] = {
            column: [_number(floor, column) for floor in floors.values()]
            for column in COLUMNS
            if column != "seconds"
        }
        return rows

    def table(self) -> Table:
        """Mean ± standard deviation over the seeds."""
        seeds = len({recipe.seed for recipe in self.recipes})
        title = f"{self.base.images}, {self.base.epochs} epochs, "
        title += "1 seed" if seeds == 1 else f"mean ± std of {seeds} seeds"
        control = any(recipe.predictor == "no_stopgrad" for recipe in self.recipes)
        caption = "no stop-gradient: DirectPred with its gradient also through the target"
        table = Table(
            title=title,
            caption=caption if control else None,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 0, 0, 1),  # so that it fits a terminal of 80 columns
        )
        table.add_column("predictor", no_wrap=True)
        for heading, _ in COLUMNS.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in self.rows().items():
            cells = (cell(row.get(column, []), digits) for column, (_, digits) in COLUMNS.items())
            table.add_row(LABELS[name], *cells)
        return table

    def write(self, status: str) -> None:
        """Write summary.json and metrics.csv with what is there."""
        runs = [(run.recipe, run.history) for run in self.runs.ordered()]
        records.write_metrics(self.directory, runs)
        shared = asdict(self.base)
        del shared["predictor"], shared["seed"]
        records.write_summary(
            self.directory,
            {
                "command": "compare",
                "status": status,
                "seconds": round(self.runs.seconds(), 2),
                "recipe": shared,
                "predictors": list(dict.fromkeys(recipe.predictor for recipe in self.recipes)),
                "seeds": sorted({recipe.seed for recipe in self.recipes}),
                "results": {
                    name: {column: statistics(values) for column, values in row.items()}
                    for name, row in self.rows().items()
                },
                "failures": self.runs.told_failures(),
            },
        )


def _number(measured: Measurement, column: str) -> float:
    value = measured[column]
    assert isinstance(value, float)
    return value


def statistics(values: list[float]) -> dict[str, Any]:
    """Of the values over the seeds, for summary.json."""
    if not values:
        return {"values": []}
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def cell(values: list[float], digits: int) -> str:
    """Of the values over the seeds, for a table."""
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
