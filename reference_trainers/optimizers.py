"""The optimizer of a recipe, and the schedules of its learning rate and of the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .recipe import Recipe


def build_optimizer(recipe: Recipe, networks: nn.Module, predictor: nn.Module) -> Optimizer:
    """SGD or LARS over the trained parameters.

    LARS adapts the rates of the parameters that decay, and of no others.

    Args:
        recipe: The options.
        networks: What is in front of the predictor.
        predictor: The predictor, in groups of its own, with a learning rate and weight decay of
            their own. ``fixed_lr`` marks those that no schedule changes.
    """
    groups: list[dict[str, Any]] = []
    own_lr, own_decay = recipe.predictor_lr * recipe.lr, recipe.predictor_weight_decay
    if own_decay is None:
        own_decay = recipe.weight_decay
    for module, lr, decay, fixed in (
        (networks, recipe.lr, recipe.weight_decay, False),
        (predictor, own_lr, own_decay, recipe.fixed_predictor_lr),
    ):
        shared = {"lr": lr, "fixed_lr": fixed}
        trained = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if recipe.decay_all or p.ndim > 1]
        plain = [p for p in trained if not (recipe.decay_all or p.ndim > 1)]
        for parameters, penalty in ((decayed, decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": penalty, **shared})
    if recipe.optimizer == "sgd":
        return SGD(groups, recipe.lr, momentum=recipe.momentum)
    from timm.optim.lars import Lars  # imports a second's worth of models

    lars: Optimizer = Lars(groups, recipe.lr, momentum=recipe.momentum)
    return lars


def build_schedule(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """The learning rate after each step, of every group by itself."""
    changing = learning_rate(recipe, steps_per_epoch)
    return LambdaLR(
        optimizer,
        [_constant if group["fixed_lr"] else changing for group in optimizer.param_groups],
    )


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """From the number of steps done to the share of the full learning rate for the next."""
    warmup, total = round(recipe.warmup * steps_per_epoch), recipe.epochs * steps_per_epoch

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

    return share


def target_momentum(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Share that the target keeps of itself at a step: constant, or by BYOL's cosine up to 1."""
    if recipe.target_schedule == "constant":
        return recipe.target_momentum
    done = step / (recipe.epochs * steps_per_epoch)
    return 1 - (1 - recipe.target_momentum) * (math.cos(math.pi * done) + 1) / 2


def _constant(step: int) -> float:
    return 1.0
