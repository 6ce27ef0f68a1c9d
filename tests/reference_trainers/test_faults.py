"""What a run survives, and how it ends where it does not; benches/faults.py does more of each."""

from __future__ import annotations

import csv
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from PIL import Image

from directpred.reference_trainers import checkpoint, files
from directpred.reference_trainers.cli import main
from directpred.reference_trainers.errors import (
    Interrupted,
    Lost,
    Terminated,
    UserError,
)
from directpred.reference_trainers.logs import open_logs
from directpred.reference_trainers.ranks import deaths_explained
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.runs import Runs
from directpred.reference_trainers.signals import (
    deaf_to_signals,
    sigterm_interrupts,
    stop_on_signals,
)
from directpred.reference_trainers.train import fit

BENCHES = Path(__file__).parents[2] / "benches"
# 10 steps an epoch, and a quick evaluation
RECIPE = Recipe(epochs=3, batch_size=128, evaluate_every=3, predictor="none", probe="sgd")
FULL = OSError(28, "No space left on device")


def step(path: Path) -> int:
    return int(checkpoint.read(path)[0]["global_step"])


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The experiments of benches/faults.py."""
    sys.path.insert(0, str(BENCHES))
    yield importlib.import_module("faults").Faults(tmp_path_factory.mktemp("faults"))
    sys.path.remove(str(BENCHES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short run that keeps every checkpoint."""
    out = tmp_path_factory.mktemp("runs")
    options = "--epochs 3 --batch-size 128 --evaluate-every 3 --keep-every 1 --probe sgd"
    assert main(["train", *options.split(), "--name", "whole", "--out", str(out)]) == 0
    return out / "whole"


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, attempts: set[int]) -> None:
    """Let these attempts, from 1 on, to write files of this name fail half-way."""
    real, count = files.whole_file, 0

    @contextmanager
    def whole_file(path: Path) -> Iterator[Any]:
        nonlocal count
        count += path.name == name
        with real(path) as file:
            yield half(file) if path.name == name and count in attempts else file

    def half(file: BinaryIO) -> Any:
        def write(content: Any) -> None:
            file.write(bytes(content[: len(content) // 2]))
            raise FULL

        return SimpleNamespace(write=write)

    monkeypatch.setattr(files, "whole_file", whole_file)


# ---- Files


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "it", []
    path.write_text("old")
    fsync, replace = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        seen.append(("flushed", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def replaced(draft: Path, target: Path) -> Path:
        seen.append((draft.parent, target))
        assert path.read_text() == "old"
        return replace(draft, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write(path, b"new one")
    assert seen[:2] == [("flushed", 7), (tmp_path, path)]
    assert len(seen) == 3, "and its directory"
    assert path.read_text() == "new one"


def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "it"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*it'"):
        files.write(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it"]


# ---- Two generations


def test_the_checkpoint_before_the_last_is_kept(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert (step(checkpoints / "previous.ckpt"), step(checkpoints / "last.ckpt")) == (20, 30)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(100_000)),
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "missing": lambda path: path.unlink(),
    "a bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    return content[:500_000] + bytes([content[500_000] ^ 1]) + content[500_001:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_found(damage: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    last = folder / "last.ckpt"
    DAMAGES[damage](last)
    for given in (last, folder, tmp_path / "run"):
        found, content, _, instead = checkpoint.newest(given)
        assert (found, content["global_step"]) == (folder / "epoch-0003.ckpt", 30)
        assert str(last) in instead
        assert f"going on from {found}, after step 30" in instead
    DAMAGES[damage](folder / "epoch-0003.ckpt")
    assert checkpoint.newest(last)[0] == folder / "previous.ckpt"
    (folder / "previous.ckpt").unlink()
    assert checkpoint.newest(last)[0] == folder / "epoch-0002.ckpt"
    for kept in folder.glob("epoch-*"):
        kept.unlink()
    with pytest.raises(UserError, match=f"{last} is not a checkpoint|no checkpoint {last}"):
        checkpoint.newest(last)


def test_only_the_last_checkpoint_has_a_substitute(run: Path, tmp_path: Path) -> None:
    """Somebody who names another one wants that one, and an evaluation is of what it names."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    for name in ("epoch-0002.ckpt", "last.ckpt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"epoch-0002\.ckpt is not a checkpoint"):
        checkpoint.newest(folder / "epoch-0002.ckpt")
    assert main(["evaluate", "--checkpoint", str(folder / "last.ckpt")]) == 1


def test_a_damaged_checkpoint_does_not_cost_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on from the one before, which is kept until there are two again, to the same end."""
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    last, previous = (broken / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    for path in broken.rglob("epoch-*"):
        path.unlink()
    last.write_bytes(last.read_bytes()[:5000])
    capsys.readouterr()
    assert main(["train", "--resume", str(broken)]) == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"going on from {previous}, after step 20" in told
    assert (broken / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert (step(previous), step(last)) == (20, 30)


def test_killed_in_the_middle_of_a_save(faults: Any) -> None:
    row = faults.kills_in_a_save(range(16, 17))
    assert row.held == row.injected == 1


# ---- A full disk


def test_a_checkpoint_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, "last.ckpt", {2})
    path = tmp_path / "last.ckpt"
    fit(RECIPE, path)
    told = capsys.readouterr().err
    assert told == (
        f"directpred: warning: cannot write {path}: No space left on device; "
        f"{path} is still good; the next epoch tries again\n"
    )
    assert {p.name: step(p) for p in tmp_path.iterdir()} == {"last.ckpt": 30, "previous.ckpt": 10}


@pytest.mark.parametrize("end", ["the last", "when asked to stop"])
def test_a_save_that_was_the_last_chance_is_an_error(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, "last.ckpt", {3})
    path, asked = tmp_path / "last.ckpt", iter(range(1, 1000))
    match = f"cannot write {path}: No space left on device; {path} is still good"
    with pytest.raises(UserError, match=match):
        fit(RECIPE, path, stop=lambda: end != "the last" and next(asked) > 24)
    assert {p.name: step(p) for p in tmp_path.iterdir()} == {"last.ckpt": 20, "previous.ckpt": 10}


def test_a_log_that_cannot_be_written_ends_in_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = _ExperimentWriter.save

    def fail(writer: Any) -> None:
        real(writer)
        with Path(writer.metrics_file_path).open("a") as file:
            file.write("7,0.")
        raise FULL

    with open_logs(tmp_path) as logs:
        logs.log_metrics({"loss": 1.0}, 1)
        logs.save()
        logs.log_metrics({"spread": 1.0}, 2)  # a new column
        logs.save()
        monkeypatch.setattr(_ExperimentWriter, "save", fail)
        for number in (3, 4):
            logs.log_metrics({"loss": 1.0}, number)
            logs.save()
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    told = f"cannot write {tmp_path / 'log'}: No space left on device; it ends here"
    assert capsys.readouterr().err == f"directpred: warning: {told}\n"


def test_the_log_of_a_resumed_run_goes_on(tmp_path: Path) -> None:
    for number in (1, 2):
        with open_logs(tmp_path) as logs:
            logs.log_metrics({"loss": 1.0}, number)
            logs.save()
    with (tmp_path / "log" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_disk_that_is_really_full(faults: Any) -> None:
    try:
        rows = faults.full_disk(1)
    except OSError as error:
        pytest.skip(str(error))
    assert [row.held for row in rows] == [1, 1]


# ---- Signals


def test_sigterm_saves_the_run(faults: Any) -> None:
    assert faults.signals(signal.SIGTERM, 1).held == 1


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_second_signal_interrupts_at_once(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    with sigterm_interrupts(), stop_on_signals() as wish:
        assert not wish()
        signal.raise_signal(number)
        assert wish()
        assert wish.number == number
        with pytest.raises(raised):
            signal.raise_signal(number)


def test_an_interrupt_in_the_middle_of_a_step_stays_one(tmp_path: Path) -> None:
    class Second(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise Terminated

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Terminated):
            fit(RECIPE, tmp_path / "run.ckpt", callbacks=[Second()])
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


def test_sigterm_ends_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ctrl-C does, of which test_compare has the whole."""

    def run(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Runs, "run", run)
    assert main(["compare", "--seeds", "1", "--out", str(tmp_path), "--name", "it"]) == 143
    told = f"directpred: stopped; 0 of 5 runs are in {tmp_path / 'it'}; the same command with "
    assert capsys.readouterr().err == told + "--name it goes on\n"


def test_a_signal_that_comes_while_processes_start_is_not_lost() -> None:
    code = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    blocked = b""

    def start() -> None:
        nonlocal blocked
        with deaf_to_signals():
            signal.raise_signal(signal.SIGINT)
            blocked = subprocess.run([sys.executable, "-c", code], capture_output=True).stdout

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert {b"SIGINT", b"SIGTERM"} <= set(re.findall(rb"SIG\w+", blocked))


# ---- Workers and ranks


def test_a_worker_that_is_killed(faults: Any) -> None:
    assert faults.workers(1).held == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_image_is_one_line(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(9):
        Image.effect_noise((32, 32), 50).convert("RGB").save(images / f"{index}.jpg")
    bad = images / "7.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    options = f"--dataset folder --epochs 1 --batch-size 3 --size 16 --workers {workers}"
    where = ["--data", str(images), "--out", str(tmp_path)]
    assert main(["train", *options.split(), *where]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"directpred: cannot read the image {bad}: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "a process that decodes images (pid 7) is killed by signal: Killed; was memory short?",
        ),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            "a process that decodes images (pid 7, 8) exited unexpectedly; was memory short?",
        ),
        (
            "[/src/gloo/pair.cc:545] Read error [1.2.3.4]:5: Connection reset by peer",
            "another process of this run has ended or hangs "
            "(Read error [1.2.3.4]:5: Connection reset by peer)",
        ),
        (
            "Application timeout caused pair closure",
            "another process of this run has ended or hangs "
            "(Application timeout caused pair closure)",
        ),
    ],
)
def test_deaths_are_explained(text: str, said: str) -> None:
    with pytest.raises(Lost) as caught, deaths_explained():
        raise RuntimeError(text)
    assert str(caught.value) == said
    with pytest.raises(RuntimeError, match="a bug"), deaths_explained():
        raise RuntimeError("a bug")


RANKS = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
import lightning as L
from torch.distributed import distributed_c10d
from directpred.reference_trainers import monitor, ranks
from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.train import Machine, fit

fault, path = sys.argv[1:]
ranks.GRACE = 1.0

class Hang(L.Callback):
    def on_train_start(self, trainer, *_):
        # Not from the start: until both have come, a slow machine takes its time.
        distributed_c10d._set_pg_timeout(timedelta(seconds=3))

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

def fail(*_):
    raise UserError("cannot read the image of the evaluation")

if fault == "fails":
    monitor.measure = fail
try:
    fit(
        Recipe(epochs=2, batch_size=128, predictor="none", probe="sgd"),
        Path(path),
        machine=Machine(devices=2),
        callbacks=[Hang()] if fault == "hangs" else [],
    )
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_a_rank_does_not_leave_the_other_waiting(fault: str, tmp_path: Path) -> None:
    """Where the evaluation fails on the first, both tell; where one hangs, the other ends it."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, str(script), fault, str(tmp_path / "run.ckpt")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    if fault == "fails":
        assert lines == ["cannot read the image of the evaluation"] * 2
    else:  # after a warning about the setting of the timeout
        assert "another process of this run has ended or hangs (" in done.stderr


# ---- Numbers


@pytest.mark.parametrize("what", ["features", "loss", "weights"])
def test_a_nan_is_told_and_neither_saved_nor_gathered(what: str, faults: Any) -> None:
    assert faults.nans(what, 1).held == 1


def test_features_that_overflow_are_left_out_and_counted(faults: Any) -> None:
    assert faults.overflows(3).held == 3


def test_a_model_that_is_not_finite_is_not_saved_when_asked_to_stop(tmp_path: Path) -> None:
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: Any, *_: Any) -> None:
            if trainer.global_step == 13:
                with torch.no_grad():
                    next(model.online.parameters()).view(-1)[0] = torch.nan

    path, asked = tmp_path / "last.ckpt", iter(range(1, 1000))
    with pytest.raises(UserError, match="diverged at step 14: the weights are not finite"):
        fit(RECIPE, path, stop=lambda: next(asked) > 13, callbacks=[Spoil()])
    assert step(path) == 10
    with pytest.raises(Interrupted):  # it goes on from what is saved
        fit(RECIPE, path, resume=path, stop=lambda: True)
