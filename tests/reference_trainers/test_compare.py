"""`directpred compare`, from the command line to the files."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest
import torch

from directpred.reference_trainers.cli import main
from directpred.reference_trainers.recipe import COMPARED

Start = Callable[..., subprocess.Popen[str]]


def test_writes_everything(comparison: Path) -> None:
    summary = json.loads((comparison / "summary.json").read_text("utf-8"))
    assert summary["status"] == "finished"
    assert summary["recipe"]["epochs"] == 4
    assert summary["versions"]["torch"]
    assert summary["machine"]["cores"]
    assert list(summary["results"]) == [*COMPARED, "untrained"]

    with (comparison / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["predictor"] for row in rows} == set(COMPARED)
    last = {
        row["predictor"]: float(row["value"])
        for row in rows
        if (row["metric"], row["epoch"]) == ("probe", "4")
    }
    for predictor, value in last.items():
        assert summary["results"][predictor]["probe"]["values"] == [pytest.approx(value, rel=1e-6)]

    height, width, _ = matplotlib.image.imread(comparison / "compare.png").shape
    assert width > height > 900
    for predictor in COMPARED:
        path = comparison / "checkpoints" / f"{predictor}-seed0.ckpt"
        assert torch.load(path, weights_only=True)["recipe"]["predictor"] == predictor


def test_the_quickstart_shows_what_the_readme_says(tmp_path: Path) -> None:
    """The default comparison, with one of its seeds: a minute on two cores."""
    options = ["--seeds", "1", "--evaluate-every", "1000", "--out", str(tmp_path)]
    assert main(["compare", *options, "--name", "quickstart"]) == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text("utf-8"))
    rows = summary["results"]

    def means(metric: str, *names: str) -> list[float]:
        return [rows[name][metric]["mean"] for name in names]

    good, bad = ("directpred", "mlp"), ("linear", "none", "no_stopgrad")
    for metric, level, ahead in (("probe", 1.5, 0.4), ("knn", 2.0, 0.8)):
        directpred, mlp = means(metric, *good)
        assert abs(directpred - mlp) < level
        assert min(directpred, mlp) > max(means(metric, *bad)) + ahead
    assert min(means("spread", *good)) > 0.5
    assert max(means("spread", *bad)) < 0.25


def test_a_checkpoint_evaluates_to_the_table(comparison: Path) -> None:
    results = json.loads((comparison / "summary.json").read_text("utf-8"))["results"]
    path = comparison / "checkpoints" / "mlp-seed0.ckpt"
    assert main(["evaluate", "--checkpoint", str(path)]) == 0
    evaluated = json.loads(path.with_name(path.name + ".evaluation.json").read_text("utf-8"))
    for metric in ("probe", "knn", "spread", "effective_rank"):
        assert [evaluated[metric]] == results["mlp"][metric]["values"]


def test_numbers_depend_on_the_seed_alone(comparison: Path, tmp_path: Path) -> None:
    """Not on the number of workers, nor on what else is compared."""
    options = ["--epochs", "4", "--seeds", "2", "--predictors", "mlp,directpred"]
    where = ["--out", str(tmp_path), "--name", "two"]
    assert main(["compare", *options, *where, "--workers", "1"]) == 0

    def lines(directory: Path, seed: int) -> set[str]:
        text = (directory / "metrics.csv").read_text("utf-8").splitlines()
        return {line for line in text if line.startswith((f"mlp,{seed},", f"directpred,{seed},"))}

    assert lines(tmp_path / "two", 0) == lines(comparison, 0)
    assert {line.replace(",1,", ",0,", 1) for line in lines(tmp_path / "two", 1)} != lines(
        tmp_path / "two", 0
    )


def test_options_can_be_chosen_by_images_that_are_held_out_of_the_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "1", "--seeds", "1", "--predictors", "none", "--validation", "0.2"]
    assert main(["compare", *options, "--out", str(tmp_path), "--name", "chosen"]) == 0
    assert "digits, validation 0.2, 1 epochs, 1 seed" in capsys.readouterr().out
    summary = json.loads((tmp_path / "chosen" / "summary.json").read_text("utf-8"))
    (probe,) = summary["results"]["none"]["probe"]["values"]
    assert round(probe * 270 / 100, 6) == round(probe * 270 / 100)  # of 270 images

    path = tmp_path / "chosen" / "checkpoints" / "none-seed0.ckpt"
    assert main(["evaluate", "--checkpoint", str(path)]) == 0
    evaluated = json.loads(path.with_name(path.name + ".evaluation.json").read_text("utf-8"))
    assert evaluated["probe"] == probe  # of the same images


def test_interrupt_keeps_the_finished_runs(start: Start, tmp_path: Path) -> None:
    options = ["--epochs", "2", "--seeds", "20", "--predictors", "none,linear"]
    process = start("compare", *options, "--out", tmp_path, "--name", "stopped")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[ 1/40] ")
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaint.startswith("directpred: stopped; ")
    assert complaint.count("\n") == 1

    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text("utf-8"))
    assert summary["status"] == "interrupted"
    assert any(row["probe"]["values"] for row in summary["results"].values())
    assert len((tmp_path / "stopped" / "metrics.csv").read_text("utf-8").splitlines()) > 1


def test_a_failed_run_does_not_take_the_others_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "1", "--seeds", "1", "--predictors", "none", "--lr", "1e30"]
    assert main(["compare", *options, "--out", str(tmp_path), "--name", "bad"]) == 1
    printed = capsys.readouterr()
    assert "training diverged" in printed.out
    assert printed.err == "directpred: 1 of 1 runs failed, see above\n"
    summary = json.loads((tmp_path / "bad" / "summary.json").read_text("utf-8"))
    assert summary["status"] == "failed"
    assert "diverged" in summary["failures"]["none seed 0"]
