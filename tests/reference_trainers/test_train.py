"""Training, stopping, going on, evaluating."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from directpred.reference_trainers.cli import main
from directpred.reference_trainers.errors import Interrupted
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.train import Run, fit

Start = Callable[..., subprocess.Popen[str]]

RECIPE = Recipe(epochs=3, batch_size=128, evaluate_every=1, freq=2)
STEPS = 10  # in an epoch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    path = tmp_path_factory.mktemp("uninterrupted") / "run.ckpt"
    return fit(RECIPE, path), torch.load(path, weights_only=True)


def test_the_same_seed_gives_the_same_numbers(
    uninterrupted: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(1234)  # what was drawn before must not matter
    assert fit(RECIPE, tmp_path / "run.ckpt").history == uninterrupted[0].history


def test_installed_packages_add_no_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = "lightning.fabric.utilities.registry"
    monkeypatch.setattr(f"{registry}.entry_points", lambda group: pytest.fail(f"loads {group}"))
    fit(Recipe(epochs=1, predictor="none"), tmp_path / "run.ckpt")


@pytest.mark.parametrize("stop_at", [1, STEPS + 3, 2 * STEPS], ids=["first", "middle", "end"])
def test_a_resumed_run_is_the_uninterrupted_one(
    uninterrupted: tuple[Run, dict[str, Any]], tmp_path: Path, stop_at: int
) -> None:
    path = tmp_path / "run.ckpt"
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted, match=f"step {stop_at}"):
        fit(RECIPE, path, stop=lambda: next(asked) >= stop_at)
    run = fit(RECIPE, path, resume=path)

    expected, state = uninterrupted
    assert run.history == expected.history
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 3 * STEPS
    for key, value in state["state_dict"].items():
        torch.testing.assert_close(content["state_dict"][key], value, rtol=0, atol=0)
    ours, theirs = (c["optimizer_states"][0]["state"] for c in (content, state))
    for key in theirs:
        assert torch.equal(ours[key]["momentum_buffer"], theirs[key]["momentum_buffer"])


def test_interrupt_saves_and_resume_goes_on(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "12", "--evaluate-every", "4", "--out", str(tmp_path)]
    process = start("train", *options, "--name", "stopped")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch    0/12")
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    path = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert complaint.count("\n") == 1
    assert complaint.endswith(f"go on by: directpred train --resume {path}\n")

    assert main(["train", "--resume", str(path)]) == 0
    assert main(["train", *options, "--name", "whole"]) == 0
    metrics = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("stopped", "whole")]
    assert metrics[0] == metrics[1]

    capsys.readouterr()
    assert main(["train", "--resume", str(path)]) == 1
    assert "has done its 12 epochs" in capsys.readouterr().err


def test_evaluate_reproduces_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("predictor: linear\nepochs: 9\n", encoding="utf-8")
    options = ["--config", str(config), "--epochs", "2", "--out", str(tmp_path), "--name", "run"]
    assert main(["train", *options]) == 0
    printed = capsys.readouterr().out.splitlines()[-2]
    assert printed.startswith("epoch    2/2")

    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["evaluate", "--checkpoint", str(path)]) == 0
    assert "linear, seed 0" in capsys.readouterr().out
    evaluated = json.loads(path.with_name("last.ckpt.evaluation.json").read_text("utf-8"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    for metric in ("probe", "knn", "spread", "effective_rank"):
        assert evaluated[metric] == summary["result"][metric]
    assert f"{evaluated['probe']:.2f}" in printed


def test_divergence_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lr", "1e30", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["train", *options]) == 1
    assert "training diverged" in capsys.readouterr().err


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "empty", "foreign", "recipe"])
def test_a_foreign_checkpoint_is_refused(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    crater, path = tmp_path / "crater", tmp_path / "x.ckpt"
    monkeypatch.setenv("BOMB", str(crater))
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps({"recipe": Bomb()}))
        case "torch":
            torch.save({"recipe": Bomb()}, path)
        case "text":
            path.write_text("hello\n" * 100, encoding="utf-8")
        case "empty":
            path.touch()
        case "foreign":
            torch.save({"state_dict": {}}, path)
        case "recipe":
            parts = ("state_dict", "optimizer_states", "loops", "callbacks", "epoch")
            content: dict[str, Any] = dict.fromkeys((*parts, "global_step"), 0)
            torch.save(content | {"recipe": {"predictor": "other"}}, path)
    for command in (["evaluate", "--checkpoint"], ["train", "--resume"]):
        assert main([*command, str(path)]) == 1
        complaint = capsys.readouterr().err
        assert complaint.startswith(f"directpred: {path} is not a checkpoint")
        assert complaint.count("\n") == 1
    assert not crater.exists()
