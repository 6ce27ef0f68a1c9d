"""Lightning: a callback that closes the step of every head in a LightningModule."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from directpred.torch import DirectPredHead

__all__ = ["DirectPredCallback"]


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
