"""stable-pretraining (https://github.com/rbalestr-lab/stable-pretraining): BYOL and SimSiam.

Both its method classes and an `spt.Module` that is given a ``predictor``. Its module drives the
optimizers by hand, callbacks' among them; `directpred.adapters.lightning.DirectPredCallback` closes
the steps of the head after the right one.
"""

from __future__ import annotations

from typing import Any

from stable_pretraining import Module
from torch.optim import Optimizer

from directpred.torch import DirectPredHead

from .replace import find, named, replace, restore

__all__ = ["replace_predictor", "restore"]


def replace_predictor(
    model: Module, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where the module's ``predictor`` stands.

    Args:
        model: An `spt.Module` with a ``predictor``, such as `spt.methods.BYOL`.
        optimizer: As `directpred.adapters.replace.replace`; the module usually makes its own later.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `directpred.adapters.replace.find` and `replace`.
    """
    found = find(model, named("predictor"), "an attribute `predictor`")
    return replace(found, optimizer, **head_options)
