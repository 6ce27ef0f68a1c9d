"""lightly (https://github.com/lightly-ai/lightly): its BYOL and SimSiam prediction heads."""

from __future__ import annotations

from typing import Any

from lightly.models.modules import BYOLPredictionHead, SimSiamPredictionHead
from torch import nn
from torch.optim import Optimizer

from directpred.torch import DirectPredHead, restore
from directpred.torch.find import find
from directpred.torch.replace import replace

__all__ = ["replace_predictor", "restore"]


def replace_predictor(
    model: nn.Module, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where lightly's prediction head stands, under whatever name.

    Args:
        model: Holds one `BYOLPredictionHead` or `SimSiamPredictionHead`.
        optimizer: As `directpred.torch.replace_predictor`.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `directpred.torch.replace_predictor`.
    """
    heads = BYOLPredictionHead, SimSiamPredictionHead
    found = find(
        model,
        lambda name, module: isinstance(module, heads),
        "a BYOLPredictionHead or SimSiamPredictionHead",
    )
    return replace(found, optimizer, **head_options)
