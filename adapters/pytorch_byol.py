"""The ``BYOLTrainer`` of https://github.com/sthalles/PyTorch-BYOL, and of luckmatters.

luckmatters (https://github.com/facebookresearch/luckmatters, ``ssl/real-dataset``) is where
DirectPred was published. Its trainer has an optimizer of its own for the predictor, and sets and
initialises predictors by itself, which has to be off here.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

import directpred.torch
from directpred.torch import DirectPredHead
from directpred.torch.find import Found, Place
from directpred.torch.replace import replace

__all__ = ["replace_predictor", "restore"]

OWN_WAYS = ("predictor_reg", "predictor_wd", "rand_pred_n_epoch", "rand_pred_n_iter")


def replace_predictor(
    model: Any, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where the trainer's ``predictor`` stands.

    Args:
        model: A `BYOLTrainer`, before or after its `train()`.
        optimizer: One more than those of the trainer, which are taken by themselves.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError: `model` is no such trainer.
        ValueError: As `directpred.torch.replace_predictor`; or the trainer changes the predictor
            by itself.
    """
    parts = [getattr(model, name, None) for name in ("predictor", "online_network")]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise TypeError(
            "expected a BYOLTrainer, with modules for `predictor` and `online_network`, got "
            f"{type(model).__name__} with {', '.join(type(part).__name__ for part in parts)}"
        )
    if own := [name for name in OWN_WAYS if getattr(model, name, None)]:
        values = ", ".join(f"{name}={getattr(model, name)!r}" for name in own)
        raise ValueError(f"the trainer changes the predictor by itself: turn off {values}")
    place = Place(model.predictor, ((model, "predictor"),), "predictor")
    found = Found(place, model.online_network)
    optimizers = [optimizer, model.optimizer, getattr(model, "predictor_optimizer", None)]
    head = replace(found, [o for o in optimizers if o is not None], **head_options)
    # luckmatters looks for the linear layers of its predictor, for their width.
    model.get_pred_linear_layers = lambda: setattr(model, "linear_layers", [head])
    return head


def restore(model: Any) -> nn.Module:
    """Undo `replace_predictor`; as `directpred.torch.restore`."""
    predictor = directpred.torch.restore(model)
    del model.get_pred_linear_layers
    return predictor
