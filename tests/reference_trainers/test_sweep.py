"""`directpred sweep`, and the runs in many processes that it shares with `directpred compare`."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import stdev
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_parts import config

from directpred.reference_trainers import heatmaps, runs
from directpred.reference_trainers.cli import main
from directpred.reference_trainers.errors import UsageError
from directpred.reference_trainers.grids import ABLATIONS, Grid, parse
from directpred.reference_trainers.progress import Progress, open_console
from directpred.reference_trainers.recipe import COMPARED, Recipe
from directpred.reference_trainers.runs import Runs
from directpred.reference_trainers.sweep import Sweep
from directpred.reference_trainers.train import Machine, Run, fit

Start = Callable[..., subprocess.Popen[str]]


def test_a_grid_has_every_combination_in_the_type_of_its_options() -> None:
    grid = parse(["predictor-lr=0.1,1", "symmetric=true,false,true", "freq=5"])
    assert grid.vary == {"predictor_lr": [0.1, 1.0], "symmetric": [True, False], "freq": [5]}
    points = list(grid.points())
    assert len(points) == 4
    assert points[1] == {"predictor_lr": 0.1, "symmetric": False, "freq": 5}
    base = Recipe(predictor="linear", epochs=3)
    recipe = grid.recipe(base, points[1])
    assert recipe == Recipe(predictor="linear", epochs=3, predictor_lr=0.1, freq=5)
    assert parse(["predictor_weight_decay=null,0"]).vary == {"predictor_weight_decay": [None, 0.0]}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["lr"], "option=value"),
        (["rate=1"], "unknown option 'rate'"),
        (["lr=1,fast"], "lr must be a number, not 'fast'"),
        (["lr="], "lr must be a number"),
        (["lr=1", "lr=2"], "given twice"),
        (["seed=1,2"], "--seeds"),
        (["jitter=0,1"], "jitter cannot vary"),
    ],
)
def test_a_wrong_grid_is_told(texts: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse(texts)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10"])
def test_ablations_vary_what_they_say(name: str) -> None:
    base = config(name)
    assert len({grid.name for grid in ABLATIONS}) == len(ABLATIONS)
    for grid in ABLATIONS:
        recipes = [grid.recipe(base, point) for point in grid.points()]
        assert len(set(recipes)) == len(recipes) == np.prod([len(x) for x in grid.vary.values()])
        for recipe in recipes:
            differing = {
                option
                for option in Recipe.__dataclass_fields__
                if getattr(recipe, option) != getattr(base, option)
            }
            assert differing <= {*grid.given, *grid.vary}


def told(directory: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text("utf-8"))
    return summary


def test_a_sweep_is_written_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sweep", "--predictor", "linear", "--epochs", "1", "--out", str(tmp_path)]
    options += ["--name", "mine", "--workers", "2"]
    grid = ["--vary", "symmetric=false", "--vary", "weight_decay=4e-4,1e30"]
    assert main([*options, *grid, "--seeds", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "directpred: 1 of 2 runs failed, see above\n"
    directory = tmp_path / "mine"
    summary = told(directory)
    assert summary["status"] == "failed"
    assert list(summary["failures"]) == ["symmetric=false weight_decay=1e+30 seed 0"]
    assert "training diverged" in printed.out
    (done,) = (directory / "runs").iterdir()
    assert [path.stem for path in (directory / "checkpoints").iterdir()] != [done.stem]
    written = done.stat().st_mtime_ns

    grid[-1] = "weight_decay=4e-4,0"
    assert main([*options, *grid, "--seeds", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("1 of 4 runs are done already\n")
    assert done.stat().st_mtime_ns == written
    summary = told(directory)
    assert (summary["status"], summary["seeds"]) == ("finished", [0, 1])
    (swept,) = summary["grids"]
    points = [result["point"] for result in swept["results"]]
    assert points == [{"symmetric": False, "weight_decay": decay} for decay in (4e-4, 0.0)]

    with (directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["predictor", "symmetric", "weight_decay", "seed"]
    for result in swept["results"]:
        values = [
            float(row["value"])
            for row in rows
            if (row["metric"], row["epoch"]) == ("spread", "1")
            and float(row["weight_decay"]) == result["point"]["weight_decay"]
        ]
        assert len(values) == 2
        assert result["spread"]["values"] == pytest.approx(values, rel=1e-6)
        assert result["spread"]["std"] == pytest.approx(stdev(values), rel=1e-4)
        assert f"{np.mean(values):.2f} ± {stdev(values):.2f}" in printed.out
    (trace,) = (
        float(row["value"])
        for row in rows
        if (row["metric"], row["epoch"], row["seed"]) == ("correlation_trace", "1", "0")
        and float(row["weight_decay"]) == 4e-4
    )
    history = json.loads(done.read_text("utf-8"))["history"]
    assert trace == pytest.approx(sum(history[-1]["correlation_eigenvalues"]), rel=1e-6)
    assert matplotlib.image.imread(directory / "sweep.png").std() > 0.1

    # What the processes give is what one process gives.
    history = json.loads(done.read_text("utf-8"))["history"]
    assert history == fit(Recipe(predictor="linear", epochs=1), tmp_path / "a.ckpt").history

    assert main([*options, *grid, "--lr", "0.1"]) == 1
    assert "holds a sweep with lr 0.03, not 0.1" in capsys.readouterr().err
    assert main(["compare", *options[1:]]) == 2  # --predictor is none of its options
    assert main(["compare", "--out", str(tmp_path), "--name", "mine"]) == 1
    assert "mine exists already" in capsys.readouterr().err
    assert main(["report", str(directory)]) == 1
    assert "is a sweep" in capsys.readouterr().err


def test_a_sweep_that_was_stopped_tells_how_many_seeds_its_points_have(tmp_path: Path) -> None:
    grid = parse(["weight_decay=0,1,2"])
    sweep = Sweep(tmp_path, config("digits"), [grid], range(3), False, Machine())
    for (decay, seed), expected in {
        (0.0, 0): "1 seed",
        (0.0, 1): "mean ± std of 2 seeds",
        (1.0, 0): "mean ± std of 1 to 2 seeds",
        (1.0, 1): "mean ± std of 2 seeds",
    }.items():
        recipe = sweep.recipe(grid, {"weight_decay": decay}, seed)
        sweep.runs.finished[recipe] = Run(recipe, [{"epoch": 0}], 1.0)
        assert sweep.about(grid) == f"digits, {config('digits').epochs} epochs, {expected}"


def test_a_killed_sweep_loses_the_runs_at_work_alone(start: Start, tmp_path: Path) -> None:
    options = ["sweep", "--predictor", "none", "--epochs", "1", "--seeds", "1", "--workers", "1"]
    options += ["--vary", "momentum=0,0.5", "--out", str(tmp_path), "--name", "killed"]
    process = start(*options)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[ 1/2] momentum=0 seed 0")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Its processes hold its output open, and end with it.
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)
    kept = sorted((tmp_path / "killed" / "runs").iterdir())
    assert kept
    written = kept[0].read_bytes()
    assert main(options) == 0
    assert told(tmp_path / "killed")["status"] == "finished"
    assert kept[0].read_bytes() == written
    assert len(list((tmp_path / "killed" / "runs").iterdir())) == 2
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_finished_comparison_is_not_done_again(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compare", "--out", str(comparison.parent), "--name", "all", "--seeds", "1"]
    before = (comparison / "metrics.csv").read_bytes()
    assert main([*options, "--epochs", "4"]) == 0
    assert f"{len(COMPARED)} of {len(COMPARED)} runs are done already" in capsys.readouterr().out
    assert (comparison / "metrics.csv").read_bytes() == before
    assert main([*options, "--epochs", "5"]) == 1
    assert "holds a compare with epochs 4, not 5" in capsys.readouterr().err


class Pool:
    """In the place of processes: the run of seed 2 takes all down that are at work."""

    def __init__(self, workers: int, *_: Any) -> None:
        self.workers = workers
        self.at_work: list[tuple[Recipe, Future[Run]]] = []

    def submit(self, work: Any, recipe: Recipe, *_: Any) -> Future[Run]:
        future: Future[Run] = Future()
        self.at_work.append((recipe, future))
        assert len(self.at_work) <= self.workers
        if any(recipe.seed == 2 for recipe, _ in self.at_work):
            for _, other in self.at_work:
                if not other.done():
                    other.set_exception(BrokenProcessPool("gone"))
        elif len(self.at_work) == self.workers or recipe.seed > 2:
            for recipe, other in self.at_work:
                if recipe.seed == 4:
                    other.set_exception(MemoryError("no\nroom"))
                elif not other.done():
                    other.set_result(Run(recipe, [{"epoch": 0}], 1.0))
            self.at_work = []
        return future

    def shutdown(self, cancel_futures: bool = False) -> None:
        pass


def test_the_run_that_kills_its_process_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    (tmp_path / "checkpoints").mkdir()
    labels = {Recipe(seed=seed): "run" for seed in range(6)}
    statuses: list[str] = []
    many = Runs(tmp_path, labels, Machine(), statuses.append, keep=False)
    many.run(Progress(open_console(), total=1), workers=1)
    assert many.told_failures() == {
        "run seed 2": "its process died",
        "run seed 4": "MemoryError: no room",
    }
    assert [run.recipe.seed for run in many.ordered()] == [0, 1, 3, 5]
    assert statuses[0] == "running"
    assert statuses[-1] == "failed"
    again = Runs(tmp_path, labels, Machine(), statuses.append, keep=False)
    assert again.finished == many.finished


def test_heat_map_has_the_means_where_there_are_any() -> None:
    grid = Grid("g", "g", {"rho": (0.0, 0.3), "freq": (1, 5, 10)})
    rng = np.random.default_rng(0)
    values = [list(rng.uniform(0, 9, 2)) for _ in range(5)] + [[float("nan")]]
    axes = Figure().add_subplot()
    heatmaps._heat(axes, grid.vary, heatmaps._means(values), ".3f", (0.0, 9.0), labelled=True)
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    for place, of in enumerate(values):
        expected = "–" if place == 5 else f"{(of[0] + of[1]) / 2:.3f}"
        assert texts[place % 3, place // 3] == expected
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.3"]


def test_line_has_mean_and_deviation() -> None:
    axes = Figure().add_subplot()
    heatmaps._line(axes, {"lr": (0.1, 1.0)}, [[1.0, 3.0], [5.0]])
    (bars,) = axes.containers
    line, _, (error,) = bars
    assert line.get_ydata().tolist() == [2.0, 5.0]
    low, high = (segment[:, 1].tolist() for segment in error.get_segments())
    assert low == pytest.approx([2 - 2**0.5, 2 + 2**0.5])
    assert high == [5.0, 5.0]


def test_grids_of_one_and_two_options_are_drawn(tmp_path: Path) -> None:
    panels = [
        heatmaps.Panels(", ".join(vary), vary, {"spread": [[0.1 * n] for n in range(count)]})
        for vary, count in (
            ({"lr": (0.1, 1.0)}, 2),
            ({"lr": (0.1, 1.0), "rho": (0.0, 0.3)}, 4),
            ({"lr": (0.1, 1.0), "rho": (0.0, 0.3), "eps": (0.0, None)}, 8),
        )
    ]
    heights = []
    for drawn in (panels[:1], panels[:2], panels):
        heatmaps.plot_grids(drawn, "about", tmp_path / "a.png")
        heights.append(matplotlib.image.imread(tmp_path / "a.png").shape[0])
    assert heights[0] < heights[1] == heights[2]
    heatmaps.plot_grids(panels[2:], "about", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
