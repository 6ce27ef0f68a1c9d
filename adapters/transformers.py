"""Hugging Face's `transformers.Trainer`: a callback that closes the step of every head in a model.

The loops of accelerate need none: `directpred.torch.replace_predictor(model, optimizer)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from directpred.torch import DirectPredHead, replace_predictor, restore
from directpred.torch.wrappers import unwrapped

__all__ = ["DirectPredCallback", "replace_predictor", "restore"]


class DirectPredCallback(TrainerCallback):
    """Attach every `DirectPredHead` of the model to the trainer's optimizer while it trains.

    Gradient accumulation and mixed precision then close the steps where the optimizer's are.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach.

        Raises:
            ValueError: The model holds no head.
        """
        model = kwargs["model"]
        heads = _heads(model)
        if not heads:
            raise ValueError(
                f"no DirectPredHead in {type(model).__name__}: replace its predictor before "
                "training, or leave this callback out"
            )
        for head in heads:
            head.attach(unwrapped(kwargs["optimizer"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach: another loop may train the model next."""
        for head in _heads(kwargs["model"]):
            head.detach()


def _heads(model: nn.Module) -> list[DirectPredHead]:
    return [m for m in model.modules() if isinstance(m, DirectPredHead)]
