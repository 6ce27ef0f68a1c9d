"""Training by one recipe, and the command ``directpred train``."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import lightning as L
import torch
from threadpoolctl import threadpool_limits

from directpred.reference_trainers import checkpoint, records
from directpred.reference_trainers.byol import BYOL
from directpred.reference_trainers.data import Batches, load
from directpred.reference_trainers.errors import Interrupted, UsageError, UserError
from directpred.reference_trainers.monitor import Measurement, Monitor
from directpred.reference_trainers.progress import Progress, one_line, open_console
from directpred.reference_trainers.recipe import Recipe

LAST = Path("checkpoints") / "last.ckpt"
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


def fit(
    recipe: Recipe,
    path: Path,
    *,
    resume: Path | None = None,
    report: Callable[[int, Measurement | None], None] = lambda epoch, measured: None,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train by a recipe.

    Args:
        recipe: The options. The same recipe gives the same numbers on the same machine.
        path: The checkpoint to write.
        resume: A checkpoint of the same recipe to go on from, as if it had never stopped.
        report: Called after every epoch, as `Monitor` says.
        stop: Asked after every step whether to stop.

    Returns:
        The run.

    Raises:
        Interrupted: `stop` said yes; ``path`` holds the run.
        UserError: Training diverged, or ``resume`` is no checkpoint.
    """
    started = time.perf_counter()
    with fixed_threads(recipe.threads), torch.random.fork_rng(devices=[]), quiet_lightning():
        data = load(recipe.dataset)
        done = checkpoint.read(resume)[0]["global_step"] if resume else 0
        batches = Batches(data.train.inputs, recipe.batch_size, recipe.seed, done)
        monitor = Monitor(data, report)
        with _without_entry_points():
            trainer = L.Trainer(
                accelerator="cpu",  # the digits' networks are too small to gain from a GPU
                max_epochs=recipe.epochs,
                callbacks=[monitor, checkpoint.Checkpoints(path, stop)],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        trainer.fit(BYOL(recipe), batches, ckpt_path=resume, weights_only=True)
    return Run(recipe, monitor.history, time.perf_counter() - started)


def _without_entry_points() -> AbstractContextManager[object]:
    """Keep installed packages from adding callbacks of theirs to the trainer.

    stable-pretraining adds fourteen to every one, which print, monitor and save; a run should be
    the same everywhere.
    """
    registry = "lightning.fabric.utilities.registry"
    return mock.patch(f"{registry}.entry_points", create=True, return_value=())


def total_steps(recipe: Recipe) -> int:
    """Number of optimizer steps of a run.

    Raises:
        UsageError: The data set has fewer images than a batch.
    """
    images = load(recipe.dataset).train.inputs
    if len(images) < recipe.batch_size:
        raise UsageError(
            f"batch_size {recipe.batch_size} exceeds the {len(images)} training images"
        )
    return recipe.epochs * len(Batches(images, recipe.batch_size, recipe.seed))


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


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a wish, to be asked for between two steps; a second one interrupts."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(options: dict[str, Any], out: Path, name: str | None, resume: Path | None) -> None:
    """Train by a recipe, or go on with a run, and write its directory.

    Args:
        options: Of the recipe. To a resumed run, only ``epochs`` can be given.
        out: Where the runs are.
        name: Of the new run.
        resume: A checkpoint to go on from. It goes on in the directory of its run, unless ``name``
            is given or the run is one of a comparison; then in a new one.

    Raises:
        UserError: Something is wrong with the options, the checkpoint or the directory.
        Interrupted: By Ctrl-C; the message says how to go on.
    """
    if resume is None:
        recipe, done = Recipe.parse(options), 0
    else:
        if others := sorted(options.keys() - {"epochs"}):
            raise UsageError(f"--resume goes on with the run's own recipe; leave out {others[0]}")
        content, model = checkpoint.read(resume)
        recipe, done = Recipe.parse(asdict(model.recipe) | options), content["global_step"]
    if done >= total_steps(recipe):
        raise UserError(f"{resume} has done its {recipe.epochs} epochs; add more with --epochs")

    if resume is not None and name is None and resume.absolute().parts[-2:] == LAST.parts:
        directory = resume.absolute().parent.parent
    else:
        directory = records.new_directory(out, name, "train")
    path = directory / LAST

    console = open_console()
    with stop_on_interrupt() as stop, Progress(console, total=recipe.epochs) as progress:

        def report(epoch: int, measured: Measurement | None) -> None:
            progress.advance(recipe.predictor, epoch, recipe.epochs)
            if measured is not None:
                progress.print(f"epoch {epoch:4d}/{recipe.epochs}  {one_line(measured)}")

        try:
            run = fit(recipe, path, resume=resume, report=report, stop=stop)
        except Interrupted as interrupted:
            raise Interrupted(
                f"{interrupted}; go on by: directpred train --resume {path}"
            ) from None
    records.write_metrics(directory, [(recipe, run.history)])
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
