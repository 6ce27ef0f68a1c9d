"""Break training runs on purpose, count what came of it, and write benches/results/faults.md.

python benches/faults.py          about ten minutes on two CPU cores
python benches/faults.py --quick  a few of each; prints only

Every run is on scikit-learn's digits, or on a few generated JPEGs where workers decode. "The same"
means bit for bit: metrics.csv, the weights and the optimizer of the run that nothing befell.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import csv
import datetime
import io
import multiprocessing
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))  # where `benches` is, for a script

from benches import loops
from benches.report import table
from directpred.reference_trainers import checkpoint
from directpred.reference_trainers.cli import main as directpred
from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.siamese import Siamese
from directpred.reference_trainers.train import fit

RESULTS = Path(__file__).parent / "results" / "faults.md"
OPTIONS = ["--epochs", "4", "--batch-size", "128", "--evaluate-every", "4"]
OPTIONS += ["--probe", "sgd"]  # a quick evaluation
STEPS = 10
"""In an epoch."""

processes = multiprocessing.get_context("forkserver")  # forks from one that has imported all this
processes.set_forkserver_preload(["directpred.reference_trainers.evaluate"])


class Command:
    """``directpred`` in a process of its own."""

    def __init__(
        self, *arguments: str | Path, before: Callable[[], None] | None = None, log: Path
    ) -> None:
        self.log = log
        argv = [str(x) for x in arguments]
        self.process = processes.Process(target=_command, args=(argv, before, str(log)))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait(self) -> tuple[int, list[str]]:
        """Its exit status and what it wrote to standard error."""
        self.process.join(240)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.errors()

    def errors(self) -> list[str]:
        """What it wrote to standard error so far."""
        path = Path(f"{self.log}.err")
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something, or for its end."""
        while self.process.is_alive() and not happened():
            time.sleep(0.002)


def _command(argv: list[str], before: Callable[[], None] | None, log: str) -> None:
    for descriptor, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a command
    if before is not None:
        before()
    status = directpred(argv)
    sys.stdout.flush()
    sys.exit(status)


@dataclass(frozen=True)
class Row:
    """A line of the table: of how many faults how often all that was to hold did hold."""

    fault: str
    held: int
    injected: int
    what: str


class Faults:
    """The experiments, in a directory of their own.

    Args:
        directory: Where the runs go.
        seed: Of the random moments.
    """

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.directory, self.random, self.count = directory, random.Random(seed), 0
        self.whole, _ = self.train(*OPTIONS)

    @cached_property
    def seconds(self) -> float:
        """A run, once the server is there that the processes fork from."""
        started = time.perf_counter()
        self.train(*OPTIONS)
        return time.perf_counter() - started

    def start(self, *arguments: str | Path, **how: Any) -> tuple[Path, Command]:
        """Start a new run; its directory."""
        self.count += 1
        out = how.pop("out", self.directory)
        where = ["--out", out, "--name", f"run{self.count}"]
        log = self.directory / f"log{self.count}"
        return out / f"run{self.count}", Command("train", *arguments, *where, log=log, **how)

    def train(self, *arguments: str | Path) -> tuple[Path, list[str]]:
        """A run that nothing befalls."""
        run, command = self.start(*arguments)
        status, errors = command.wait()
        assert status == 0, errors
        return run, errors

    def resumed(self, run: Path, options: list[str] = OPTIONS) -> tuple[Path, int, list[str]]:
        """Go on with a run, or start again where it has saved nothing yet."""
        if not (run / "checkpoints" / checkpoint.LAST).exists():
            again, errors = self.train(*options)
            return again, 0, errors
        status, errors = Command("train", "--resume", run, log=self.directory / "resumed").wait()
        return run, status, errors

    def same(self, run: Path, whole: Path | None = None) -> bool:
        """Whether a run ended as the uninterrupted one, bit for bit."""
        whole = whole or self.whole
        ours, theirs = (checkpoint.read(_last(r))[0] for r in (run, whole))
        buffers = [c["optimizer_states"][0]["state"] for c in (ours, theirs)]
        return (
            (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
            and ours["state_dict"].keys() == theirs["state_dict"].keys()
            and all(torch.equal(x, theirs["state_dict"][k]) for k, x in ours["state_dict"].items())
            and all(
                torch.equal(buffers[0][k]["momentum_buffer"], x["momentum_buffer"])
                for k, x in buffers[1].items()
            )
        )

    # ---- Signals

    def kills(self, count: int) -> Row:
        """SIGKILL at any moment of a run, from the first import to the last byte."""
        held = injected = early = 0
        while injected < count:
            run, command = self.start(*OPTIONS)
            command.process.join(self.random.uniform(0.05, 0.95) * self.seconds)
            command.process.kill()
            if command.wait()[0] != -signal.SIGKILL:
                continue  # it was over already
            injected += 1
            early += not _last(run).exists()
            run, status, _ = self.resumed(run)
            held += status == 0 and self.same(run)
        what = f"resumed ({early}, which had saved nothing yet, started again), it ends the same"
        return Row("kill -9 at a random moment", held, count, what)

    def kills_in_a_save(self, calls: range) -> Row:
        """SIGKILL before each call that links, flushes or renames a file."""
        held = 0
        for call in calls:
            run, command = self.start(*OPTIONS, before=KillAtCall(call))
            status, _ = command.wait()
            run, again, _ = self.resumed(run)
            held += status == -signal.SIGKILL and again == 0 and self.same(run)
        what = "resumed, it ends the same"
        return Row("kill -9 before a link, flush or rename of a save", held, len(calls), what)

    def signals(self, number: signal.Signals, count: int) -> Row:
        """SIGINT or SIGTERM between the first and the last epoch."""
        held = injected = 0
        while injected < count:
            run, command = self.start(*OPTIONS)
            command.until(lambda log=command.log: "epoch    0/" in _text(f"{log}.out"))
            command.process.join(self.random.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):
                os.kill(command.pid, number)
            status, errors = command.wait()
            if status == 0:
                continue  # it was over already, but for what it writes after the last step
            injected += 1
            told = status == 128 + number and len(errors) == 1 and "stopped and sav" in errors[0]
            run, again, _ = self.resumed(run)
            held += told and again == 0 and self.same(run)
        what = f"saved, status {128 + number}, one line; resumed, it ends the same"
        return Row(f"{number.name} at a random moment", held, count, what)

    # ---- Files

    def damaged(self, count: int) -> Row:
        """``last.ckpt`` cut off, emptied, a bit turned over, noise, or something else."""
        held = 0
        run, command = self.start(*OPTIONS)
        command.until((run / "checkpoints" / checkpoint.PREVIOUS).exists)
        command.process.kill()
        command.wait()
        for index in range(count):
            broken = self.directory / f"broken{index}"
            shutil.copytree(run, broken)
            last = _last(broken)
            content = bytearray(last.read_bytes())
            match index % 5:
                case 0:
                    content = content[: self.random.randrange(len(content))]
                case 1:
                    content = bytearray()
                case 2:
                    content[self.random.randrange(10_000, 1_000_000)] ^= 1
                case 3:
                    content = bytearray(self.random.randbytes(len(content)))
                case 4:
                    torch.save({"state_dict": {}}, last)
                    content = bytearray(last.read_bytes())
            last.write_bytes(content)
            log = self.directory / "evaluate"
            refused, told = Command("evaluate", "--checkpoint", last, log=log).wait()
            _, status, errors = self.resumed(broken)
            said = len(errors) == 1 and "going on from" in errors[0]
            held += refused == 1 and len(told) == 1 and said and status == 0 and self.same(broken)
        what = "evaluate refuses it; resumed from the one before, it says so and ends the same"
        return Row("last.ckpt cut off, empty, a bit flipped, noise, foreign", held, count, what)

    def full_disk(self, count: int) -> list[Row]:
        """A file system of 8 MB that is full for a while, and one that stays full."""
        for_a_while = for_good = 0
        for _ in range(count):
            with small_disk(self.directory / "disk") as disk:
                run, command = self.start(*OPTIONS, out=disk)
                command.until(_last(run).exists)
                fill(disk / "filler")
                command.until(lambda c=command: any("last.ckpt" in x for x in c.errors()))
                (disk / "filler").unlink()
                status, errors = command.wait()
                warned = all(x.startswith("directpred: warning: cannot write") for x in errors)
                for_a_while += status == 0 and warned and bool(errors) and self.same(run)

                shutil.rmtree(run)
                run, command = self.start(*OPTIONS, out=disk)
                command.until(_last(run).exists)
                fill(disk / "filler")
                status, errors = command.wait()
                ended = status == 1 and f"{_last(run)} is still good" in errors[-1]
                rows = list(csv.reader(_text(run / "log" / "metrics.csv").splitlines()))
                ended &= len({len(row) for row in rows}) <= 1
                (disk / "filler").unlink()
                parts = [path.name for path in run.rglob("*.part")]
                _, again, _ = self.resumed(run)
                for_good += ended and not parts and again == 0 and self.same(run)
        what = "status 1, names the checkpoint that is good; resumed with room, it ends the same"
        return [
            Row("full disk for some epochs", for_a_while, count, "warns, goes on, ends the same"),
            Row("full disk to the end", for_good, count, what),
        ]

    # ---- Workers and ranks

    def images(self) -> tuple[Path, list[str]]:
        """A folder of JPEGs, and the options of a run on it with two workers."""
        folder = self.directory / "images"
        if not folder.exists():
            folder.mkdir()
            rng = np.random.default_rng(0)
            for index in range(96):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
        options = "--dataset folder --batch-size 8 --size 16 --crop 0.3 --workers 2 --data"
        return folder, [*OPTIONS, *options.split(), str(folder)]

    def workers(self, count: int) -> Row:
        """SIGKILL to a process that decodes images."""
        held = injected = 0
        _, options = self.images()
        whole, _ = self.train(*options)
        while injected < count:
            run, command = self.start(*options)
            command.until(_last(run).exists)
            command.process.join(self.random.uniform(0, 0.2))
            if children := children_of(command.pid):
                os.kill(self.random.choice(children), signal.SIGKILL)
            status, errors = command.wait()
            if status == 0:
                continue  # it was over already, or needed that one no more
            injected += 1
            told = status == 1 and len(errors) == 1 and "decodes images (pid" in errors[0]
            run, again, _ = self.resumed(run, options)
            held += told and again == 0 and self.same(run, whole)
        what = "status 1, one line that says so; resumed, it ends the same"
        return Row("kill -9 of a data worker", held, count, what)

    def damaged_images(self, count: int) -> Row:
        """A JPEG that is cut off, met in training or in the evaluation."""
        held = 0
        folder, options = self.images()
        for index in range(count):
            copy = self.directory / f"images{index}"
            shutil.copytree(folder, copy)
            bad = copy / f"{self.random.randrange(96)}.jpg"
            bad.write_bytes(bad.read_bytes()[:200])
            workers = ["--workers", "1"] if index % 2 else []
            _, command = self.start(*options[:-1], copy, *workers)
            status, errors = command.wait()
            held += status == 1 and len(errors) == 1 and f"cannot read the image {bad}" in errors[0]
        return Row("a JPEG cut off", held, count, "status 1, one line that names it")

    def ranks(self) -> list[Row]:
        """Two processes on this machine: one is killed or asked to stop, or both diverge."""
        rows = []
        script = str(Path(sys.executable).with_name("directpred"))
        for fault, what, status, said in (
            ("kill -9 of one of two ranks", "the other: status 1, one line", 1, "another process"),
            ("SIGTERM to one of two ranks", "both saved, status 143", 143, "stopped and saved"),
            ("two ranks whose training diverges", "both: status 1, the same line", 1, "diverged"),
        ):
            run = self.directory / f"two{status}{len(rows)}"
            options = ["--devices", "2", "--out", str(self.directory), "--name", run.name]
            options += ["--lr", "1e30"] if "diverges" in fault else ["--epochs", "500"]
            options += ["--evaluate-every", "500", "--probe", "sgd"]
            process = subprocess.Popen(
                [script, "train", *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while process.poll() is None and "diverges" not in fault and not _last(run).exists():
                time.sleep(0.01)
            if "kill" in fault:
                os.kill(children_of(process.pid)[0], signal.SIGKILL)
            elif "SIGTERM" in fault:
                process.terminate()
            _, errors = process.communicate(timeout=120)
            lines = errors.splitlines()
            held = process.returncode == status and all(said in line for line in lines)
            rows.append(Row(fault, int(held and len(set(lines)) == 1), 1, what))
        return rows

    # ---- Numbers

    def nans(self, what: str, count: int) -> Row:
        """A NaN in the features, the loss or the weights of a random step."""
        held = 0
        for index in range(count):
            step = self.random.randint(1, 3 * STEPS - 1)
            path = self.directory / f"nan-{what}{index}" / checkpoint.LAST
            path.parent.mkdir()
            spoiled = Spoiled(what, {step})
            with spoiled:
                try:
                    fit(Recipe(epochs=3, batch_size=128, evaluate_every=3, probe="sgd"), path)
                    told = ""
                except UserError as error:
                    told = str(error)
            saved = [checkpoint.read(p)[0] for p in path.parent.glob("*.ckpt")]
            finite = all(
                x.isfinite().all() for c in saved for x in c["state_dict"].values()
            ) and len(saved) == min(2, (step - 1) // STEPS)
            held += f"diverged at step {step}:" in told and finite and spoiled.untouched(step)
        effect = "F̂ moves by the finite features" if what == "loss" else "F̂ is as before"
        outcome = f"{effect}, no checkpoint replaced, status 1 and the step by the epoch's end"
        return Row(f"NaN in the {what}, at a random step", held, count, outcome)

    def overflows(self, count: int) -> Row:
        """Finite features whose products are not, at random steps of one run."""
        steps = set(self.random.sample(range(1, 3 * STEPS + 1), count))
        path = self.directory / "overflow.ckpt"
        said = io.StringIO()
        with Spoiled("overflow", steps), contextlib.redirect_stderr(said):
            fit(Recipe(epochs=3, batch_size=128, evaluate_every=3, probe="sgd"), path)
        told = sum(int(n) for n in re.findall(r"(\d+) steps? with features", said.getvalue()))
        state = checkpoint.read(path)[0]["state_dict"]
        names = ("correlation", "mean", "weight")
        finite = all(state[f"predictor.{name}"].isfinite().all() for name in names)
        counted = int(state["predictor.skipped"]) == count
        held = told if finite and counted else 0
        what = "left out of F̂, counted in `skipped`, warned of at the epoch's end"
        return Row("features too large for F̂, at random steps", held, count, what)


class KillAtCall:
    """Kills its process before the n-th call that links, flushes or renames a file."""

    def __init__(self, call: int) -> None:
        self.call = call

    def __call__(self) -> None:
        """Lay the trap."""
        calls = iter(range(1, self.call))

        def trap(real: Callable[..., Any]) -> Callable[..., Any]:
            def trapped(*arguments: Any, **options: Any) -> Any:
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return trapped

        os.link, os.fsync, Path.replace = trap(os.link), trap(os.fsync), trap(Path.replace)  # type: ignore[method-assign]


class Spoiled:
    """Meanwhile the training steps of these numbers, from 1 on, meet a NaN or an overflow.

    Args:
        what: features, loss, weights or overflow.
        steps: Which.
    """

    def __init__(self, what: str, steps: set[int]) -> None:
        self.what, self.steps = what, steps
        self.before: dict[int, torch.Tensor] = {}
        self.real = Siamese.training_step

    def __enter__(self) -> Spoiled:
        real, spoiled = self.real, self

        def training_step(model: Siamese, batch: Any, batch_idx: int) -> torch.Tensor:
            step = model.global_step + 1
            spoiled.before[step] = state_of(model)
            spoiled.model = model
            if step not in spoiled.steps:
                return real(model, batch, batch_idx)
            if spoiled.what == "weights":
                with torch.no_grad():
                    next(model.online.parameters()).view(-1)[0] = torch.nan
            hook = model.online.register_forward_hook(spoiled.spoil)
            loss = real(model, batch, batch_idx)
            hook.remove()
            return loss * torch.nan if spoiled.what == "loss" else loss

        Siamese.training_step = training_step  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Siamese.training_step = self.real  # type: ignore[method-assign]

    def spoil(self, module: Any, inputs: Any, z: torch.Tensor) -> torch.Tensor | None:
        """A forward hook."""
        if self.what == "features":
            z = z.clone()
            z[0, 0] = torch.nan
            return z
        if self.what == "overflow":
            return z + 1e20 * torch.nn.functional.normalize(z).detach()
        return None

    def untouched(self, step: int) -> bool:
        """Whether correlation, mean and weight are finite, and no NaN moved them."""
        after = state_of(self.model)
        moved_by_the_loss = self.what == "loss"
        return bool(after.isfinite().all()) and (
            moved_by_the_loss or torch.equal(after, self.before[step])
        )


def state_of(model: Siamese) -> torch.Tensor:
    """Correlation, mean and weight of the predictor, as one vector."""
    head: Any = model.predictor
    return torch.cat([head.correlation.flatten(), head.mean, head.weight.flatten()]).clone()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 8 MB.

    Raises:
        OSError: This user may not mount one.
    """
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise OSError(f"no tmpfs can be mounted: {error}") from error
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Fill the file system of a path to its last byte."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, but for multiprocessing's own."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for path in threads for child in _text(path).split()]
    return [x for x in found if "resource_tracker" not in _text(f"/proc/{x}/cmdline")]


def _last(run: Path) -> Path:
    return run / "checkpoints" / checkpoint.LAST


def _text(path: Path | str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text("utf-8")
    return ""


def experiments(faults: Faults, quick: bool) -> Iterator[Row]:
    """All of them; the numbers of faults are what takes the time."""
    many, some, few = (2, 2, 1) if quick else (20, 5, 2)
    yield faults.kills(many)
    yield faults.kills_in_a_save(range(12, 14) if quick else range(7, 17))
    yield faults.signals(signal.SIGINT, some)
    yield faults.signals(signal.SIGTERM, some)
    yield faults.damaged(some)
    try:
        yield from faults.full_disk(few)
    except OSError as error:
        yield Row(f"full disk: not run, {error}", 0, 0, "")
    yield faults.workers(few)
    yield faults.damaged_images(few)
    yield from faults.ranks()
    for what in ("features", "loss", "weights"):
        yield faults.nans(what, some)
    yield faults.overflows(2 * some)
    for fault, held, what in loops.rows(many):
        yield Row(fault, held, many, what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="a few of each; prints only")
    quick = parser.parse_args().quick
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as directory:
        for row in experiments(Faults(Path(directory)), quick):
            rows.append(row)
            print(f"{row.held:3d} of {row.injected:3d}  {row.fault}: {row.what}", flush=True)
    seconds = time.perf_counter() - started
    if not quick:
        write(rows, seconds)
    print(f"{seconds:.0f} s" + ("" if quick else f"; written to {RESULTS}"))
    return int(any(row.held < row.injected for row in rows))


def write(rows: list[Row], seconds: float) -> None:
    """Write benches/results/faults.md."""
    cells = [[r.fault, f"**{r.held} of {r.injected}**", r.what] for r in rows]
    text = [
        "# Faults",
        f"{datetime.date.today()}, `python benches/faults.py`, {seconds:.0f} s, on "
        f"{platform.system()} with {os.cpu_count()} cores, torch {torch.__version__}.",
        "Training runs on scikit-learn's digits, on JPEGs where workers are in play, and small "
        "loops around a head (benches/loops.py), broken on purpose. *The same* is bit for bit: "
        "metrics.csv, weights and optimizer of the run that nothing befell. A fault counts as held "
        "where all that the last column says did.",
        table(["fault", "held", "what has to hold"], cells, left=3),
    ]
    RESULTS.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
