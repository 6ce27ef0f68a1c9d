"""Checkpoints: written after every epoch and when asked to stop, read with care."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from .errors import Interrupted, UsageError, UserError
from .recipe import Recipe
from .siamese import Siamese

_PARTS = (
    *("recipe", "channels", "data", "steps_per_epoch", "state_dict", "optimizer_states"),
    *("loops", "callbacks", "epoch", "global_step"),
)


AGREE = 20
"""Steps from one agreement of the ranks to the next."""


class Checkpoints(L.Callback):
    """Saves a run to one file, which the next save replaces.

    Args:
        path: The file.
        data: Directory of the data set, which the checkpoint remembers.
        stop: Asked after every step; once it says yes the run is saved and ended with
            `Interrupted`.
    """

    def __init__(
        self, path: Path, data: Path | None, keep_every: int, stop: Callable[[], bool]
    ) -> None:
        self.path, self.data, self.keep_every, self.stop = path, data, keep_every, stop

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
        if trainer.current_epoch + 1 != trainer.max_epochs and self._asked(trainer):
            self._save_and_stop(trainer)
        trainer.save_checkpoint(self.path)
        epoch = trainer.current_epoch + 1
        if self.keep_every and epoch % self.keep_every == 0:
            trainer.save_checkpoint(self.path.with_name(f"epoch-{epoch:04d}.ckpt"))

    def _asked(self, trainer: L.Trainer) -> bool:
        """Whether to stop; ranks agree on it every so often, for they have to stop together."""
        if trainer.world_size == 1:
            return self.stop()
        if trainer.global_step % AGREE and not trainer.is_last_batch:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.stop(), all=False))

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        raise Interrupted(f"stopped and saved after step {trainer.global_step}")


def read(path: Path) -> tuple[dict[str, Any], Siamese]:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: A file that `Checkpoints` wrote.

    Returns:
        Lightning's dictionary of the checkpoint, and the model in it, on the CPU.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:
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
