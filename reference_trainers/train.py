"""Training by one recipe, and the command ``directpred train``."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from threadpoolctl import threadpool_limits

from . import checkpoint, files, records
from .batches import FileBatches, MemoryBatches, Pair
from .datasets import Dataset, Files, Memory, decode, load
from .errors import Interrupted, Lost, UsageError, UserError, warn
from .logs import open_logs
from .monitor import Measurement, Monitor
from .progress import Progress, one_line, open_console
from .ranks import TIMEOUT, deaths_explained, watched, without_signal_handlers
from .recipe import Recipe
from .siamese import Siamese
from .signals import stop_on_signals
from .thumbnails import save_views
from .views import build_views

VIEWS = "views.png"
"""What a run looks at, in its directory."""

LAST = Path("checkpoints") / checkpoint.LAST
"""The checkpoint of ``directpred train`` in the directory of its run."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        recipe: Its options.
        history: What was measured, from epoch 0 on.
        seconds: From building the model to the last checkpoint, evaluations included.
    """

    recipe: Recipe
    history: list[Measurement]
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Where a run's images are, and what computes it.

    Attributes:
        data: Directory of the data set; the digits need none.
        download: Whether to download what is missing there.
        workers: Processes that decode images of sets that are not held in memory.
        devices: Processes on this machine, each with a GPU where there are any.
        nodes: Machines.
        keep_every: Epochs from one checkpoint that is kept to the next, beside the last; 0: none.
    """

    data: Path | None = None
    download: bool = False
    workers: int = 0
    devices: int = 1
    nodes: int = 1
    keep_every: int = 0


def fit(
    recipe: Recipe,
    path: Path,
    *,
    machine: Machine = Machine(),
    data: Dataset | None = None,
    resume: Path | None = None,
    report: Callable[[int, Measurement | None], None] = lambda epoch, measured: None,
    stop: Callable[[], bool] = lambda: False,
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Logger] = (),
    timeout: timedelta = TIMEOUT,
) -> Run:
    """Train by a recipe.

    Args:
        recipe: The options. The same recipe gives the same numbers on the same machine.
        path: The checkpoint to write.
        machine: Where the images are and what computes.
        data: The images, where they are loaded already.
        resume: A checkpoint of the same recipe to go on from, as if it had never stopped.
        report: Called after every epoch, as `Monitor` says.
        stop: Asked after every step whether to stop.
        callbacks: More of them.
        loggers: Told the loss and the learning rate of every fiftieth step, and what is measured.
        timeout: How long a rank waits for the others.

    Returns:
        The run.

    Raises:
        Interrupted: `stop` said yes; ``path`` holds the run.
        UsageError: The batch does not divide into equal parts, or exceeds the images.
        UserError: Training diverged, ``resume`` is no checkpoint, an image cannot be read, a
            process that decodes them or another rank has died, or ``path`` cannot be written at
            the end. What an earlier epoch left at ``path`` is then still there.
    """
    started = time.perf_counter()
    with fixed_threads(recipe.threads), torch.random.fork_rng(devices=[]), quiet_lightning():
        if data is None:
            data = load(recipe.dataset, machine.data, machine.download, recipe.validation)
        done = checkpoint.read(resume)[0]["global_step"] if resume else 0
        monitor, storage = Monitor(data, machine.workers, report), checkpoint.Storage(resume)
        ranks = machine.devices * machine.nodes
        with without_entry_points():
            trainer = L.Trainer(
                accelerator=recipe.device,
                devices=machine.devices,
                num_nodes=machine.nodes,
                strategy=DDPStrategy(timeout=timeout) if ranks > 1 else "auto",
                plugins=[storage],
                precision=PRECISIONS[recipe.precision],
                sync_batchnorm=recipe.device != "cpu" and torch.cuda.is_available(),
                max_epochs=recipe.epochs,
                accumulate_grad_batches=recipe.accumulate,
                callbacks=[
                    monitor,
                    checkpoint.Checkpoints(path, storage, machine.data, machine.keep_every, stop),
                    *callbacks,
                ],
                logger=list(loggers) or False,
                log_every_n_steps=50,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
        passes = Passes(recipe, data, trainer, machine.workers, done)
        model = Siamese(
            recipe,
            channels(data),
            passes.steps,
            build_views(recipe, getattr(data.pretrain, "maximum", 255), passes.cropped),
        )
        try:
            with deaths_explained(), without_signal_handlers(), watched():
                trainer.fit(model, passes, ckpt_path=resume, weights_only=True)
        except SystemExit as end:  # what Lightning makes of an interrupt
            if isinstance(end.__context__, KeyboardInterrupt):
                raise end.__context__ from None
            raise
    return Run(recipe, monitor.history, time.perf_counter() - started)


PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Passes:
    """The training batches, each cut into the passes of a step.

    Args:
        recipe: Says how large they are.
        data: The images.
        trainer: Says which rank this is, and where it computes.
        workers: Processes that decode files.
        done: Steps that a resumed run has done already.

    Attributes:
        steps: Optimizer steps in an epoch.
        cropped: Whether the images are cropped already.

    Raises:
        UsageError: The batch does not divide into equal parts, or exceeds the images.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, trainer: L.Trainer, workers: int, done: int
    ) -> None:
        ranks, self.accumulate = trainer.world_size, recipe.accumulate
        check(recipe, data, ranks)
        self.cropped = isinstance(data.pretrain, Files)
        self.batches = training_batches(
            recipe,
            data.pretrain,
            trainer.strategy.root_device,
            trainer.global_rank,
            ranks,
            done,
            workers,
        )
        self.steps = len(self.batches)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Pair]:
        """The rest of the current epoch, or the next one where that is done."""
        for raw1, raw2 in self.batches:
            yield from zip(raw1.chunk(self.accumulate), raw2.chunk(self.accumulate), strict=True)


def training_batches(
    recipe: Recipe,
    source: Memory | Files,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    done: int = 0,
    workers: int = 0,
) -> MemoryBatches | FileBatches:
    """The shuffled raw batches of a recipe, as `MemoryBatches` and `FileBatches` say."""
    share, seed, size = recipe.batch_size // ranks, recipe.seed, recipe.size
    if isinstance(source, Memory):
        return MemoryBatches(source, share, seed, device, rank, ranks, done)
    crop = (recipe.crop, 1.0)
    return FileBatches(
        source, share, seed, size, crop, workers=workers, rank=rank, ranks=ranks, done=done
    )


def check(recipe: Recipe, data: Dataset, ranks: int = 1) -> None:
    """Find out before the first step whether the batches of a recipe can be made.

    Raises:
        UsageError: The batch does not divide into equal parts, or exceeds the images.
    """
    share, rest = divmod(recipe.batch_size, ranks * recipe.accumulate)
    if rest or share < 2:
        raise UsageError(
            f"batch_size {recipe.batch_size} does not divide into {ranks} ranks × "
            f"{recipe.accumulate} passes of two or more images"
        )
    images = len(data.pretrain[0])
    if images < recipe.batch_size:
        raise UsageError(f"batch_size {recipe.batch_size} exceeds the {images} training images")


def channels(data: Dataset) -> int:
    """Of the images of a data set."""
    if isinstance(data.pretrain, Memory):
        return data.pretrain.images.shape[1]
    return decode(data.pretrain.paths[0]).shape[0]


def without_entry_points() -> AbstractContextManager[object]:
    """Keep installed packages from adding callbacks of theirs to the trainer.

    stable-pretraining adds fourteen to every one, which print, monitor and save; a run should be
    the same everywhere.
    """
    registry = "lightning.fabric.utilities.registry"
    return mock.patch(f"{registry}.entry_points", create=True, return_value=())


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute with so many threads: another count sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning tells about hardware, tips and data loader workers."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _rank() -> int:
    """Of this process, before there is a trainer: by the environment of its launcher."""
    return int(getattr(rank_zero_only, "rank", 0))


class Speed(L.Callback):
    """Measures the training alone, without evaluations.

    Args:
        recipe: Of the run.

    Attributes:
        images: How many were trained on.
        seconds: In what time.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.images, self.seconds, self.epochs = 0, 0.0, 0
        self.started: tuple[float, int] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock before the first step of an epoch, or of what is left of it."""
        if self.started is None:
            self.started = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop the clock after the last step of an epoch; evaluations come after it."""
        if trainer.is_last_batch and self.started is not None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            started, step = self.started
            self.seconds += time.perf_counter() - started
            self.images += (trainer.global_step - step) * self.recipe.batch_size
            self.epochs += 1
            self.started = None

    def line(self, epochs: int) -> str:
        """Images a second, and how long the rest of the epochs will take."""
        if not self.images:
            return ""
        minutes, seconds = divmod(round(self.seconds / self.epochs * epochs), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02d}:{seconds:02d} left" if epochs else ""
        return f"  {self.images / self.seconds:,.0f} images/s  {left}".rstrip()


class Keeper(L.Callback):
    """Writes what was measured after every epoch, and the views of the first batch.

    Args:
        recipe: Of the run.
        directory: Of the run.
    """

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe, self.directory = recipe, directory

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Pair, batch_idx: int
    ) -> None:
        """Draw the views of the first images, as the first step will see them."""
        path = self.directory / VIEWS
        if not path.exists() and trainer.is_global_zero:
            assert isinstance(pl_module, Siamese)
            view1, view2 = pl_module.augment(batch)
            with _if_it_can_be_written(path):
                save_views(batch[0], view1, view2, path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write metrics.csv; the monitor comes first."""
        if trainer.is_global_zero:
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            (monitor,) = (c for c in callbacks if isinstance(c, Monitor))
            with _if_it_can_be_written(self.directory / "metrics.csv"):
                records.write_metrics(self.directory, [(self.recipe, monitor.history)])


@contextmanager
def _if_it_can_be_written(path: Path) -> Iterator[None]:
    """Go on without a file that is no checkpoint."""
    try:
        yield
    except OSError as error:
        warn(f"cannot write {path}: {files.reason(error)}")


def train(
    options: dict[str, Any],
    out: Path,
    name: str | None,
    resume: Path | None,
    machine: Machine,
) -> None:
    """Train by a recipe, or go on with a run, and write its directory.

    Args:
        options: Of the recipe. To a resumed run, only ``epochs`` can be given.
        out: Where the runs are.
        name: Of the new run.
        resume: A checkpoint or a run to go on from, as `checkpoint.newest` says. It goes on in the
            directory of its run, unless ``name`` is given or the checkpoint is not the run's last;
            then in a new one.
        machine: Where the images are and what computes. A resumed run knows where its images were.

    Raises:
        UserError: Something is wrong with the options, the checkpoint or the directory.
        Interrupted: By Ctrl-C or SIGTERM; the message says how to go on.
    """
    home = None
    if resume is None:
        recipe = Recipe.parse(options)
    else:
        if others := sorted(options.keys() - {"epochs"}):
            raise UsageError(f"--resume goes on with the run's own recipe; leave out {others[0]}")
        resume, content, model, instead = checkpoint.newest(resume)
        if instead and _rank() == 0:
            warn(instead)
        if instead or resume.name == LAST.name:
            home = resume.absolute().parent
        recipe = Recipe.parse(asdict(model.recipe) | options)
        if machine.data is None and content["data"] is not None:
            machine = replace(machine, data=Path(content["data"]))
        if content["global_step"] >= recipe.epochs * content["steps_per_epoch"]:
            raise UserError(f"{resume} has done its {recipe.epochs} epochs; add more with --epochs")

    data = load(recipe.dataset, machine.data, machine.download, recipe.validation)
    check(recipe, data, machine.devices * machine.nodes)
    if home is not None and home.name == LAST.parts[0] and name is None:
        directory = home.parent
    elif _rank() == 0:
        directory = records.new_directory(out, name, "train")
    elif name is not None:
        directory = out / name
    else:
        raise UsageError("several processes need a --name for the run")
    path = directory / LAST

    console = open_console()
    speed, keeper = Speed(recipe), Keeper(recipe, directory)
    with (
        stop_on_signals() as wish,
        Progress(console, total=recipe.epochs) as progress,
        open_logs(directory) as logs,
    ):

        def report(epoch: int, measured: Measurement | None) -> None:
            progress.advance(recipe.predictor, epoch, recipe.epochs)
            if measured is not None:
                pace = speed.line(recipe.epochs - epoch)
                progress.print(f"epoch {epoch:4d}/{recipe.epochs}  {one_line(measured)}{pace}")

        go_on = f"go on by: directpred train --resume {path}"
        try:
            run = fit(
                recipe,
                path,
                machine=machine,
                data=data,
                resume=resume,
                report=report,
                stop=wish,
                callbacks=[speed, keeper],
                loggers=[logs],
            )
        except Interrupted as stopped:
            number = wish.number or signal.SIGTERM  # it may be that of another rank
            raise Interrupted(f"{stopped}; {go_on}", number) from None
        except Lost as lost:
            raise Lost(f"{lost}; {go_on}" if path.exists() else str(lost)) from lost
    if _rank() > 0:
        return
    result = run.history[-1]
    records.write_summary(
        directory,
        {
            "command": "train",
            "recipe": asdict(recipe),
            "seconds": round(run.seconds, 2),
            "result": {k: v for k, v in result.items() if not isinstance(v, list)},
        },
    )
    console.print(f"{run.seconds:.1f} s; written to {directory}", soft_wrap=True)
