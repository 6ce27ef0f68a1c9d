"""SimSiam by its authors (https://github.com/facebookresearch/simsiam): ``builder.SimSiam``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from directpred.torch import DirectPredHead

from .replace import find, named, replace, restore

__all__ = ["replace_predictor", "restore"]


def replace_predictor(
    model: nn.Module, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where ``predictor`` stands, before or after DDP has the model.

    With ``--fix-pred-lr`` the predictor's parameter group stays, empty.

    Args:
        model: A `simsiam.builder.SimSiam`, bare or in `DistributedDataParallel`.
        optimizer: As `directpred.adapters.replace.replace`.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `directpred.adapters.replace.find` and `replace`.
    """
    found = find(model, named("predictor"), "an attribute `predictor`")
    return replace(found, optimizer, **head_options)
