"""The command ``directpred compare``: one recipe with every predictor, over several seeds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

from . import records
from .datasets import load
from .errors import Interrupted, UsageError, UserError, number_of
from .monitor import Measurement
from .plot import plot
from .progress import Progress, one_line, open_console
from .recipe import LABELS, Recipe
from .signals import deaf_to_signals
from .train import Machine, Run, check, fit

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

    Raises:
        UserError: Something is wrong with the options or the directory, or a run failed.
        Interrupted: By Ctrl-C or SIGTERM; the finished runs are written.
    """
    base = Recipe.parse(options)
    data = load(base.dataset, machine.data, machine.download)
    check(base, data)
    if data.train is None or data.test is None or base.probe == "sgd":
        raise UsageError(
            f"compare measures labelled images by probe logistic or adam, not {base.dataset} "
            f"{'by ' + base.probe if base.probe == 'sgd' else 'without labels'}"
        )
    recipes = [
        replace(base, predictor=predictor, seed=seed)
        for seed in range(seeds)
        for predictor in predictors
    ]
    directory = records.new_directory(out, name, "compare")
    comparison = Comparison(directory, base, recipes, machine)
    console = open_console()
    try:
        with Progress(console, total=base.epochs * len(recipes)) as progress:
            comparison.run(progress, min(workers, len(recipes)))
    except KeyboardInterrupt as interrupt:
        done = f"{len(comparison.runs)} of {len(recipes)} runs"
        stopped = f"stopped; {done} are in {directory}"
        raise Interrupted(stopped, number_of(interrupt)) from None
    if comparison.runs:
        plot(comparison.ordered(), directory / "compare.png")
        console.print(comparison.table())
    console.print(f"{comparison.seconds():.0f} s; written to {directory}", soft_wrap=True)
    if comparison.failures:
        raise UserError(f"{len(comparison.failures)} of {len(recipes)} runs failed, see above")


class Comparison:
    """The runs of a comparison; every finished one is on disk before the next one ends.

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
        self.machine = machine
        self.runs: dict[Recipe, Run] = {}
        self.failures: dict[Recipe, str] = {}
        self.started = time.perf_counter()
        self.write("running")

    def run(self, progress: Progress, workers: int) -> None:
        """Do all the runs in so many processes.

        Raises:
            KeyboardInterrupt: By Ctrl-C or SIGTERM, after the workers have stopped.
        """
        context = multiprocessing.get_context("spawn")
        events: SimpleQueue[tuple[str, int]] = context.SimpleQueue()
        stop = context.Event()
        pool = ProcessPoolExecutor(workers, context, _start_worker, (events, stop))
        try:
            with deaf_to_signals():  # of what is started here; it leaves them to this process
                waiting: dict[Future[Run], Recipe] = {
                    pool.submit(_work, recipe, self._checkpoint(recipe), self.machine): recipe
                    for recipe in self.recipes
                }
            while waiting:
                finished, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                while not events.empty():
                    label, epoch = events.get()
                    progress.advance(label, epoch, self.base.epochs)
                for future in finished:
                    self._finish(waiting.pop(future), future, progress)
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        self.write("failed" if self.failures else "finished")

    def _checkpoint(self, recipe: Recipe) -> Path:
        return self.directory / "checkpoints" / f"{recipe.predictor}-seed{recipe.seed}.ckpt"

    def _finish(self, recipe: Recipe, future: Future[Run], progress: Progress) -> None:
        count = f"[{len(self.runs) + len(self.failures) + 1:2d}/{len(self.recipes)}]"
        title = f"{count} {_title(recipe):22s}"
        try:
            run = self.runs[recipe] = future.result()
            progress.print(f"{title} {one_line(run.history[-1])}  {run.seconds:.1f} s")
        except (UserError, BrokenProcessPool) as error:
            self.failures[recipe] = str(error)
            progress.print(f"{title} failed: {error}")
        self.write("running")

    def ordered(self) -> list[Run]:
        """The finished runs in the order of their recipes, whichever finished first."""
        return [self.runs[recipe] for recipe in self.recipes if recipe in self.runs]

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def rows(self) -> dict[str, dict[str, list[float]]]:
        """For each predictor, and the untrained network, the values of each column by seed."""
        rows: dict[str, dict[str, list[float]]] = {}
        floors: dict[int, Measurement] = {}
        for run in self.ordered():
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
        title = f"{self.base.dataset}, {self.base.epochs} epochs, "
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
            cells = (_cell(row.get(column, []), digits) for column, (_, digits) in COLUMNS.items())
            table.add_row(LABELS[name], *cells)
        return table

    def write(self, status: str) -> None:
        """Write summary.json and metrics.csv with what is there."""
        runs = self.ordered()
        records.write_metrics(self.directory, [(run.recipe, run.history) for run in runs])
        shared = asdict(self.base)
        del shared["predictor"], shared["seed"]
        records.write_summary(
            self.directory,
            {
                "command": "compare",
                "status": status,
                "seconds": round(self.seconds(), 2),
                "recipe": shared,
                "predictors": list(dict.fromkeys(recipe.predictor for recipe in self.recipes)),
                "seeds": sorted({recipe.seed for recipe in self.recipes}),
                "results": {
                    name: {column: _statistics(values) for column, values in row.items()}
                    for name, row in self.rows().items()
                },
                "failures": {_title(recipe): text for recipe, text in self.failures.items()},
            },
        )


def _title(recipe: Recipe) -> str:
    return f"{recipe.predictor} seed {recipe.seed}"


def _number(measured: Measurement, column: str) -> float:
    value = measured[column]
    assert isinstance(value, float)
    return value


def _statistics(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"values": []}
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


# What a worker process was given when it started.
_events: SimpleQueue[tuple[str, int]]
_stop: Event


def _start_worker(events: SimpleQueue[tuple[str, int]], stop: Event) -> None:
    global _events, _stop
    _events, _stop = events, stop


def _work(recipe: Recipe, checkpoint: Path, machine: Machine) -> Run:
    return fit(
        recipe,
        checkpoint,
        machine=machine,
        report=lambda epoch, _: _events.put((_title(recipe), epoch)),
        stop=_stop.is_set,
    )
