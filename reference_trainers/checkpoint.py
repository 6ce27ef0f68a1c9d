"""Checkpoints: written after every epoch and when asked to stop, read with care.

Of the file ``last.ckpt`` the one before it is kept as ``previous.ckpt``: at any moment there is one
that is whole, and where the newer has been damaged since, a run goes on from the older.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from . import files
from .errors import Interrupted, UsageError, UserError, warn
from .recipe import Recipe
from .siamese import Siamese

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

_PARTS = (
    *("recipe", "channels", "data", "steps_per_epoch", "state_dict", "optimizer_states"),
    *("loops", "callbacks", "epoch", "global_step"),
)


AGREE = 20
"""Steps from one agreement of the ranks to the next."""


class Checkpoints(L.Callback):
    """Saves a run to one file, which the next save replaces.

    A disk that is full costs a checkpoint and not the run: at the end of an epoch the failure is a
    warning, and the next epoch tries again. After the last epoch, or when asked to stop, it is an
    error that names the checkpoint that there is.

    Args:
        path: The file.
        storage: What the trainer writes it with.
        data: Directory of the data set, which the checkpoint remembers.
        keep_every: Epochs from one checkpoint that is kept to the next; 0: none.
        stop: Asked after every step; once it says yes the run is saved and ended with
            `Interrupted`.
    """

    def __init__(
        self,
        path: Path,
        storage: Storage,
        data: Path | None,
        keep_every: int,
        stop: Callable[[], bool],
    ) -> None:
        self.path, self.storage, self.data = path, storage, data
        self.keep_every, self.stop = keep_every, stop

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember where the images are."""
        checkpoint["data"] = None if self.data is None else str(self.data.absolute())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End the run if that was asked for; the last step of an epoch leaves it to the epoch."""
        between_steps = trainer.fit_loop._should_accumulate()
        if not trainer.is_last_batch and not between_steps and self._asked(trainer):
            self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the run, and end it if that was asked for."""
        epoch, last = trainer.current_epoch + 1, trainer.current_epoch + 1 == trainer.max_epochs
        if not last and self._asked(trainer):
            self._save_and_stop(trainer)
        if failure := self._save(trainer, self.path):
            if last:
                raise UserError(failure)
            if trainer.is_global_zero:
                warn(f"{failure}; the next epoch tries again")
        if self.keep_every and epoch % self.keep_every == 0:
            failure = self._save(trainer, self.path.with_name(f"epoch-{epoch:04d}.ckpt"))
            if failure and trainer.is_global_zero:
                warn(failure)

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether to stop; ranks agree on it every so often, for they have to stop together."""
        if trainer.world_size == 1:
            return self.stop()
        if trainer.global_step % AGREE and not trainer.is_last_batch:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.stop(), all=False))

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        if failure := self._save(trainer, self.path):
            raise UserError(f"stopped after step {trainer.global_step}; {failure}")
        raise Interrupted(f"stopped and saved after step {trainer.global_step}")

    def _save(self, trainer: L.Trainer, path: Path) -> str:
        """Save the run; what went wrong, the same on all ranks, or ""."""
        failure = ""
        try:
            trainer.save_checkpoint(path)
        except OSError as error:  # on the first rank alone, which writes
            whole = self.storage.whole
            kept = f"{whole[-1]} is still good" if whole else "nothing is saved yet"
            failure = f"cannot write {path}: {files.reason(error)}; {kept}"
            trainer.strategy.barrier()  # that of save_checkpoint, where the others wait
        return str(trainer.strategy.broadcast(failure))


class Storage(CheckpointIO):
    """Writes by `whole_file`, and executes nothing that it reads.

    Lightning's own writes to the directory of temporary files and moves the file, which is a copy,
    cut off by an interruption, where that is another file system; and it does not wait for the
    disk.

    Args:
        resumed: The checkpoint that the run goes on from.

    Attributes:
        whole: Checkpoints of this run that are known to be whole, the newest last.
    """

    def __init__(self, resumed: Path | None = None) -> None:
        self.whole = [] if resumed is None else [resumed.absolute()]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint as a whole, or raise `OSError`."""
        path = Path(path).absolute()
        content = io.BytesIO()  # of a full disk torch.save would tell in a way of its own
        torch.save(checkpoint, content)
        keep = path.name == LAST and path in self.whole  # but not one that is damaged
        with _previous_kept(path) if keep else nullcontext(), files.whole_file(path) as file:
            file.write(content.getbuffer())
        self.whole = [*(p for p in self.whole if p != path), path]

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint that `read` has looked at."""
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove it."""
        Path(path).unlink(missing_ok=True)


@contextmanager
def _previous_kept(path: Path) -> Iterator[None]:
    """Keep the file that is replaced meanwhile as ``previous.ckpt``, once the new one is there."""
    aside, previous = path.with_name(PREVIOUS + ".part"), path.with_name(PREVIOUS)
    aside.unlink(missing_ok=True)  # of a run that was killed
    try:
        try:
            os.link(path, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, aside)
        yield
        aside.replace(previous)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def read(path: Path) -> tuple[dict[str, Any], Siamese]:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: A file that `Checkpoints` wrote.

    Returns:
        Lightning's dictionary of the checkpoint, and the model in it, on the CPU.

    Raises:
        UserError: There is no such file, or it is something else, or damaged.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load checks no sums
                raise KeyError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
        if missing := [part for part in _PARTS if part not in content]:
            raise KeyError(f"it lacks {', '.join(missing)}")
        model = Siamese(Recipe.parse(content["recipe"]), content["channels"])
        model.load_state_dict(content["state_dict"])
    except Exception as error:  # whatever torch.load makes of a file that is not its own
        own = isinstance(error, (KeyError, UsageError))
        reason = f" ({error.args[0]})" if own else ""
        raise UserError(f"{path} is not a checkpoint of directpred{reason}") from error
    return content, model


def newest(path: Path) -> tuple[Path, dict[str, Any], Siamese, str]:
    """The checkpoint to go on from.

    Args:
        path: A checkpoint; or the directory of a run, or of its checkpoints, for its ``last.ckpt``.

    Returns:
        Its path, what `read` gives, and "" or, where ``last.ckpt`` is damaged or missing and the
        newest whole one beside it was taken, a sentence that says so.

    Raises:
        UserError: There is none.
    """
    if path.is_dir():
        below = path / "checkpoints"
        path = (below if below.is_dir() else path) / LAST
    try:
        return path, *read(path), ""
    except UserError as error:
        if path.name != LAST or not (beside := _beside(path)):
            raise
        found = max(beside, key=lambda one: int(one[1]["global_step"]))
        return *found, f"{error}; going on from {found[0]}, after step {found[1]['global_step']}"


def _beside(path: Path) -> list[tuple[Path, dict[str, Any], Siamese]]:
    """The previous checkpoint and the newest of those that are kept, as far as they are whole."""
    kept = sorted(path.parent.glob("epoch-*.ckpt"), reverse=True)
    found = []
    for candidates in ([path.with_name(PREVIOUS)], kept):
        for candidate in candidates:
            with suppress(UserError):
                found.append((candidate, *read(candidate)))
                break
    return found
