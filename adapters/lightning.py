"""Lightning: a callback that closes the step of every head in a LightningModule, and a monitor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from directpred import monitor
from directpred.torch import DirectPredHead

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # the one package under its two names, of which one may be missing
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

__all__ = ["CollapseMonitor", "DirectPredCallback"]


class DirectPredCallback(Callback):
    """Attach every `DirectPredHead` of the module to an optimizer of the trainer.

    Gradient accumulation, mixed precision and manual optimisation then close the steps where the
    optimizer's are.

    Args:
        optimizer: Which of several optimizers, by its place in `configure_optimizers`, trains the
            features in front of the heads.
    """

    def __init__(self, optimizer: int | None = None) -> None:
        self.optimizer = optimizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach.

        Raises:
            ValueError: The module holds no head; or has several optimizers and none was chosen, or
                has not the one that was.
        """
        heads = _heads(pl_module)
        if not heads:
            raise ValueError(
                f"no DirectPredHead in {type(pl_module).__name__}: replace its predictor before "
                "training, or leave this callback out"
            )
        optimizers = trainer.optimizers
        index = 0 if self.optimizer is None else self.optimizer
        if not 0 <= index < len(optimizers) or (self.optimizer is None and len(optimizers) > 1):
            sizes = (sum(len(group["params"]) for group in o.param_groups) for o in optimizers)
            have = ", ".join(
                f"{i}: {type(o).__name__} of {size} tensors"
                for i, (o, size) in enumerate(zip(optimizers, sizes, strict=True))
            )
            raise ValueError(
                f"{type(self).__name__}(optimizer={self.optimizer}) with {len(optimizers)} "
                f"optimizers ({have}): say which one trains the features in front of the head"
            )
        for head in heads:
            head.attach(optimizers[index])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach: another loop may train the module next."""
        for head in _heads(pl_module):
            head.detach()


def _heads(module: LightningModule) -> list[DirectPredHead]:
    return [m for m in module.modules() if isinstance(m, DirectPredHead)]


class CollapseMonitor(Callback):
    """Log how the outputs of a module spread, and warn once when they collapse.

    For any LightningModule, with or without DirectPred; what is read, and when it warns, says
    `directpred.monitor.CollapseMonitor`. The figures go to every logger of the trainer at each
    reading, whatever its `log_every_n_steps`, and to its `callback_metrics`, where
    `EarlyStopping` and the like find them; as ``projector/spread`` for the module "projector".

    Args:
        module: The module whose outputs to watch, that in front of the predictor, or its dotted
            path in the LightningModule.
        every: Optimizer steps from one reading to the next; the first is at once.
        select: From the output of the module to the tensor to watch.
        channel_dim: Axis of the features, of feature maps 1.

    Attributes:
        latest: Figures of the last reading.

    Raises:
        TypeError, ValueError: As `directpred.monitor.CollapseMonitor`.
    """

    def __init__(
        self,
        module: str | nn.Module,
        *,
        every: int = 25,
        select: Callable[[Any], Tensor] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        self.module, self.every = module, monitor.check_every(every)
        self._monitor = monitor.CollapseMonitor(
            every=None, log=self._keep, select=select, channel_dim=channel_dim
        )
        self._name, self._next, self._looks = "", 0, 0
        self._figures: dict[str, float] = {}  # read, and not logged yet

    @property
    def latest(self) -> dict[str, float]:
        """Figures of the last reading; empty before the first."""
        return self._monitor.latest

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the module.

        Raises:
            AttributeError: The LightningModule has no module of that path.
            ValueError: The module is none of its modules.
        """
        if isinstance(self.module, str):
            module = pl_module.get_submodule(self.module)
        else:
            module = self.module
        paths = [path for path, m in pl_module.named_modules() if m is module]
        if not paths:
            raise ValueError(
                f"the {type(module).__name__} to watch is no module of "
                f"{type(pl_module).__name__}: give its dotted path, as in CollapseMonitor"
                '("projector")'
            )
        self._name, self._next = paths[0] or type(module).__name__, trainer.global_step
        self._monitor.watch(module, self._name)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the pass to come where it is time; warn once where no pass ever came."""
        if trainer.global_step >= self._next:
            self._looks += 1
            if self._looks == 2 and not self._monitor.passes and trainer.is_global_zero:
                warnings.warn(
                    f"CollapseMonitor has seen no training pass of {self._name} in {self.every} "
                    "steps: watch a module that training_step calls as module(...)",
                    stacklevel=2,
                )
            self._next = trainer.global_step + self.every
            self._monitor.look()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was read."""
        if self._figures:
            for logger in trainer.loggers:
                logger.log_metrics(self._figures, step=trainer.global_step)
            pl_module.log_dict(self._figures, logger=False, rank_zero_only=True)
            self._figures = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._monitor.remove()

    def _keep(self, figures: dict[str, float]) -> None:
        self._figures = {f"{self._name}/{name}": value for name, value in figures.items()}
