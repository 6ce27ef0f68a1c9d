"""byol-pytorch (https://github.com/lucidrains/byol-pytorch): its BYOL, SimSiam mode included.

It passes both views through the predictor in one call, as one batch.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from directpred.torch import DirectPredHead, restore
from directpred.torch.find import find
from directpred.torch.replace import replace

__all__ = ["replace_predictor", "restore"]


def replace_predictor(
    model: nn.Module, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where ``online_predictor`` stands.

    Args:
        model: A `byol_pytorch.BYOL`, or a `byol_pytorch.BYOLTrainer`, which has its own optimizer.
        optimizer: As `directpred.torch.replace_predictor`.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `directpred.torch.replace_predictor`.
    """
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
    return replace(find(model, "online_predictor"), optimizer, **head_options)
