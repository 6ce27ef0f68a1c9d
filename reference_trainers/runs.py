"""Many runs in one directory, several at a time, each in a process that the next one reuses."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from rich.console import Console

from . import checkpoint, records
from .datasets import Dataset, load
from .errors import Interrupted, UsageError, UserError, number_of
from .progress import Progress, one_line
from .recipe import Recipe
from .signals import deaf_to_signals
from .train import Machine, Run, check, fit


def open_directory(out: Path, name: str | None, command: str, base: Recipe) -> Path:
    """A new directory, or that of the same name where the command with the same recipe goes on.

    Args:
        out: Where the runs are.
        name: Of the directory; by default a new one.
        command: What makes the runs.
        base: The recipe that they share.

    Returns:
        The directory.

    Raises:
        UsageError: The name is a path.
        UserError: The directory holds something else.
    """
    if name is None or Path(name).name != name or not (out / name / "summary.json").is_file():
        return records.new_directory(out, name, command)
    directory = out / name
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        there = Recipe.parse(summary["recipe"])
        if summary["command"] != command:
            raise ValueError
    except (ValueError, KeyError, TypeError, UsageError):
        raise UserError(f"{directory} exists already; choose another --name") from None
    for option, value in asdict(base).items():
        if (other := getattr(there, option)) != value:
            raise UserError(
                f"{directory} holds a {command} with {option} {other}, not {value}; "
                "choose another --name"
            )
    return directory


def load_labelled(base: Recipe, machine: Machine, command: str) -> Dataset:
    """The images of a recipe, where accuracy on them can be measured.

    Raises:
        UsageError: It cannot, or the batch exceeds the images.
        UserError: There are no such images.
    """
    data = load(base.dataset, machine.data, machine.download, base.validation)
    check(base, data)
    if data.train is None or data.test is None or base.probe == "sgd":
        raise UsageError(
            f"{command} measures labelled images by probe logistic or adam, not {base.dataset} "
            f"{'by ' + base.probe if base.probe == 'sgd' else 'without labels'}"
        )
    return data


class Runs:
    """Runs that share a directory. Each is on disk when it is done, and is then not done again.

    A finished run is in ``runs/``, and one that was stopped goes on from its file in
    ``checkpoints/``. A run that fails is remembered, and the others go on.

    Args:
        directory: Of the runs.
        labels: What each is called, beside its seed: words that no two runs of a seed share.
        machine: Where the images are.
        changed: Called with ``running`` before the first run and after each, and at the end with
            ``finished``, ``failed`` or ``interrupted``.
        keep: Whether finished runs keep their checkpoints.

    Attributes:
        finished: The runs that are done.
        failures: Why others failed.
    """

    def __init__(
        self,
        directory: Path,
        labels: Mapping[Recipe, str],
        machine: Machine,
        changed: Callable[[str], None],
        keep: bool,
    ) -> None:
        self.directory, self.labels, self.machine = directory, labels, machine
        self.changed, self.keep = changed, keep
        for folder in ("runs", "checkpoints"):
            (directory / folder).mkdir(exist_ok=True)
        found = ((recipe, self._read(recipe)) for recipe in labels)
        self.finished = {recipe: run for recipe, run in found if run is not None}
        self.failures: dict[Recipe, str] = {}
        self.started = time.perf_counter()

    def run(self, progress: Progress, workers: int) -> None:
        """Do the runs that are left, in so many processes.

        Where a process dies, the runs that were at work are done again one by one, so that the one
        that kills its process is found and fails alone.

        Raises:
            KeyboardInterrupt: By Ctrl-C or SIGTERM, after the processes have stopped and saved
                their runs.
        """
        waiting = deque(recipe for recipe in self.labels if recipe not in self.finished)
        if self.finished:
            progress.print(f"{len(self.finished)} of {len(self.labels)} runs are done already")
        workers = max(1, min(workers, len(waiting)))
        context = multiprocessing.get_context("spawn")
        events: SimpleQueue[tuple[Recipe, int]] = context.SimpleQueue()
        stop = context.Event()
        suspects: set[Recipe] = set()
        at_work: dict[Future[Run], Recipe] = {}
        pool: ProcessPoolExecutor | None = None
        self.changed("running")
        try:
            while waiting or at_work:
                if pool is None:
                    pool = ProcessPoolExecutor(workers, context, _start_worker, (events, stop))
                with deaf_to_signals():  # of what is started here
                    while waiting and len(at_work) < (1 if suspects else workers):
                        recipe = waiting.popleft()
                        path = self._file("checkpoints", recipe, "ckpt")
                        at_work[_submit(pool, recipe, path, self.machine)] = recipe
                done, _ = wait(at_work, timeout=0.1, return_when=FIRST_COMPLETED)
                while not events.empty():
                    recipe, epoch = events.get()
                    progress.advance(self.title(recipe), epoch, recipe.epochs)
                if broken := any(_died(future) for future in done):
                    done, _ = wait(at_work)  # all of the pool's
                for future in done:
                    recipe = at_work.pop(future)
                    if _died(future) and recipe not in suspects:
                        suspects.add(recipe)
                        waiting.appendleft(recipe)
                    else:
                        suspects.discard(recipe)
                        self._finish(recipe, future, progress)
                if broken:
                    pool.shutdown()
                    pool = None
        except KeyboardInterrupt:
            self.changed("interrupted")
            raise
        finally:
            stop.set()
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self.changed("failed" if self.failures else "finished")

    def epochs_left(self) -> int:
        """Epochs of the runs that are not done."""
        return sum(recipe.epochs for recipe in self.labels if recipe not in self.finished)

    def title(self, recipe: Recipe) -> str:
        """What a run is called where it is told of."""
        return f"{self.labels[recipe]} seed {recipe.seed}"

    def ordered(self) -> list[Run]:
        """The finished runs in the order of their recipes, whichever finished first."""
        return [self.finished[recipe] for recipe in self.labels if recipe in self.finished]

    def told_failures(self) -> dict[str, str]:
        """Why runs failed, by what they are called."""
        return {self.title(recipe): reason for recipe, reason in self.failures.items()}

    def stopped(self, interrupt: KeyboardInterrupt) -> Interrupted:
        """What an interrupt ends the command with: how much is done, and how it goes on."""
        return Interrupted(
            f"stopped; {len(self.finished)} of {len(self.labels)} runs are in {self.directory}; "
            f"the same command with --name {self.directory.name} goes on",
            number_of(interrupt),
        )

    def conclude(self, console: Console) -> None:
        """Say where the runs are.

        Raises:
            UserError: Some failed.
        """
        console.print(f"{self.seconds():.0f} s; written to {self.directory}", soft_wrap=True)
        if self.failures:
            failed = f"{len(self.failures)} of {len(self.labels)} runs failed"
            raise UserError(f"{failed}, see above")

    def seconds(self) -> float:
        """Seconds since the start, or since it went on."""
        return time.perf_counter() - self.started

    def _finish(self, recipe: Recipe, future: Future[Run], progress: Progress) -> None:
        count = f"[{len(self.finished) + len(self.failures) + 1:2d}/{len(self.labels)}]"
        width = max(22, *(len(self.title(other)) for other in self.labels))
        title = f"{count} {self.title(recipe):{width}s}"
        error = future.exception()
        if error is None:
            run = self.finished[recipe] = future.result()
            content = {"recipe": asdict(recipe), "history": run.history, "seconds": run.seconds}
            records.write(self._file("runs", recipe, "json"), json.dumps(content) + "\n")
            if not self.keep:
                self._file("checkpoints", recipe, "ckpt").unlink(missing_ok=True)
            progress.print(f"{title} {one_line(run.history[-1])}  {run.seconds:.1f} s")
        else:
            self.failures[recipe] = _reason(error)
            progress.print(f"{title} failed: {self.failures[recipe]}")
        self.changed("running")

    def _file(self, folder: str, recipe: Recipe, suffix: str) -> Path:
        label = self.labels[recipe].replace(" ", ",")
        return self.directory / folder / f"{label}-seed{recipe.seed}.{suffix}"

    def _read(self, recipe: Recipe) -> Run | None:
        """The finished run of a recipe, where there is one."""
        try:
            content = json.loads(self._file("runs", recipe, "json").read_text(encoding="utf-8"))
            if Recipe.parse(content["recipe"]) != recipe:
                return None
            return Run(recipe, content["history"], content["seconds"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, UsageError):
            return None


def _submit(pool: ProcessPoolExecutor, recipe: Recipe, path: Path, machine: Machine) -> Future[Run]:
    try:
        return pool.submit(_work, recipe, path, machine)
    except BrokenProcessPool as error:  # since the last look at it
        failed: Future[Run] = Future()
        failed.set_exception(error)
        return failed


def _died(future: Future[Run]) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


def _reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, BrokenProcessPool):
        return "its process died"
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


# ---- In the worker processes, and what each was given when it started.

_events: SimpleQueue[tuple[Recipe, int]]
_stop: Event


def _start_worker(events: SimpleQueue[tuple[Recipe, int]], stop: Event) -> None:
    global _events, _stop
    _events, _stop = events, stop
    threading.Thread(target=_end_with_the_command, daemon=True).start()


def _end_with_the_command() -> None:
    """Do not go on where the process that collects the runs was killed."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _work(recipe: Recipe, path: Path, machine: Machine) -> Run:
    return fit(
        recipe,
        path,
        machine=machine,
        resume=path if _can_resume(path, recipe) else None,
        report=lambda epoch, _: _events.put((recipe, epoch)),
        stop=_stop.is_set,
    )


def _can_resume(path: Path, recipe: Recipe) -> bool:
    try:
        return checkpoint.read(path)[1].recipe == recipe
    except UserError:
        return False
