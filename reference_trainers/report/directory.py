"""What runs left on disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..siamese import RULES

HEADER = ["predictor", "seed", "epoch", "metric", "index", "value"]
SPECTRA = ("correlation_eigenvalues", "weight_eigenvalues")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """The runs of one directory that share their predictor: one for each seed.

    Attributes:
        predictor: Its name.
        recipe: What is known of it.
        seconds: For each seed; empty where not known.
        seeds: By seed, metric and epoch the values: one, or one for each of the d dimensions.
    """

    predictor: str
    recipe: Mapping[str, Any]
    seconds: Sequence[float]
    seeds: Mapping[int, Mapping[str, Mapping[int, Sequence[float]]]]

    @property
    def is_set(self) -> bool:
        """Whether there are spectra of F̂ and of a weight that a rule sets from it."""
        return self.predictor in RULES and all(self.series(metric) for metric in SPECTRA)

    @property
    def last_epoch(self) -> int | None:
        """The last that was measured for all seeds."""
        ends = [
            max(epoch for values in metrics.values() for epoch in values)
            for metrics in self.seeds.values()
        ]
        return min(ends) if ends else None

    def series(self, metric: str) -> tuple[Values, Values] | None:
        """Epochs (e,) and values (seeds, e, d) of a metric; of a plain number, d is 1.

        Only the epochs that all seeds have. None where there are none.
        """
        of_seeds = [metrics[metric] for metrics in self.seeds.values() if metric in metrics]
        if not of_seeds:
            return None
        epochs = sorted(set.intersection(*map(set, of_seeds)))
        if metric in SPECTRA:
            # Before the first step there is no spectrum: F̂ is zero and W_p the identity.
            epochs = [epoch for epoch in epochs if epoch > 0]
        if not epochs:
            return None
        values = [[values[epoch] for epoch in epochs] for values in of_seeds]
        return np.asarray(epochs, dtype=float), np.asarray(values, dtype=float)


@dataclass(frozen=True)
class RunDirectory:
    """What a run left on disk.

    Attributes:
        path: As it was given.
        summary: Of summary.json; empty where there is none yet.
        groups: One for each predictor.
    """

    path: Path
    summary: Mapping[str, Any]
    groups: Sequence[Group]

    @property
    def recipe(self) -> dict[str, Any]:
        """The options; where a comparison has several predictors or seeds, lists of them."""
        recipe = dict(self.summary.get("recipe", {}))
        if recipe and self.summary.get("command") == "compare":
            recipe["predictor"] = self.summary.get("predictors", [])
            recipe["seed"] = self.summary.get("seeds", [])
        return recipe

    @property
    def status(self) -> str:
        """What to know of a run that is not simply done, or nothing."""
        if "status" in self.summary:
            status = str(self.summary["status"])
            return "" if status == "finished" else status
        ends = {group.last_epoch for group in self.groups}
        return "" if ends == {self.recipe.get("epochs")} else "unfinished"


def read(path: Path) -> RunDirectory:
    """Read the directory of a run.

    Raises:
        UserError: It is none, or one of its files is damaged.
    """
    if not path.is_dir():
        raise UserError(f"no such run: {path}")
    summary_file, metrics_file = path / "summary.json", path / "metrics.csv"
    if not (summary_file.is_file() or metrics_file.is_file()):
        raise UserError(f"{path} is not a run: it has neither summary.json nor metrics.csv")
    summary = _read_summary(summary_file) if summary_file.is_file() else {}
    if summary.get("command") == "sweep":
        raise UserError(f"{path} is a sweep: its picture is {path / 'sweep.png'}")
    measured = _read_metrics(metrics_file) if metrics_file.is_file() else {}
    recipe = summary.get("recipe", {})
    groups = []
    for predictor in dict.fromkeys([*_predictors(summary), *measured]):
        if summary.get("command") == "compare":
            result = summary.get("results", {}).get(predictor, {})
            seconds = result.get("seconds", {}).get("values", [])
        else:
            seconds = [summary["seconds"]] if "seconds" in summary else []
        groups.append(Group(predictor, recipe, seconds, measured.get(predictor, {})))
    return RunDirectory(path, summary, groups)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        parts = ("recipe", "versions", "machine", "results", "failures")
        if not all(isinstance(summary.get(part, {}), dict) for part in parts):
            raise ValueError
        if summary.get("recipe") and not _predictors(summary):
            raise ValueError
        for result in summary.get("results", {}).values():
            if not isinstance(result.get("seconds", {}).get("values", []), list):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: not the summary of a run") from None
    return dict(summary)


def _predictors(summary: Mapping[str, Any]) -> list[str]:
    if "recipe" not in summary:
        return []
    return (
        list(summary["predictors"]) if "predictors" in summary else [summary["recipe"]["predictor"]]
    )


def _read_metrics(path: Path) -> dict[str, dict[int, dict[str, dict[int, list[float]]]]]:
    """The values by predictor, seed, metric and epoch."""
    measured: dict[str, dict[int, dict[str, dict[int, list[float]]]]] = {}
    rows: Any = None
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        if next(rows, None) != HEADER:
            raise ValueError
        for predictor, seed, epoch, metric, index, value in rows:
            metrics = measured.setdefault(predictor, {}).setdefault(int(seed), {})
            values = metrics.setdefault(metric, {}).setdefault(int(epoch), [])
            if len(values) != (int(index) if index else 0):
                raise ValueError
            values.append(float(value))
    except (ValueError, csv.Error):
        line = max(1, rows.line_num) if rows is not None else 1
        raise UserError(f"{path} is damaged in line {line}") from None
    for predictor, seeds in measured.items():
        names = {metric for metrics in seeds.values() for metric in metrics}
        for metric in sorted(names):
            found = (metrics.get(metric, {}).values() for metrics in seeds.values())
            if len({len(values) for epochs in found for values in epochs}) > 1:
                raise UserError(f"{path} is damaged: {predictor} lacks values of {metric}")
    return measured
