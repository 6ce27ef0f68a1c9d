"""BYOL, with a predictor that is set, learned, or left out."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import directpred as dp
from directpred.losses import iso_loss, regression_loss
from directpred.reference_trainers.data import Use, seed_of, views
from directpred.reference_trainers.networks import OnlineNetwork, mlp
from directpred.reference_trainers.recipe import Recipe
from directpred.torch import DirectPredHead


def build_predictor(recipe: Recipe) -> nn.Module:
    """The predictor of a recipe: a module from (n, dim) to (n, dim).

    ``no_stopgrad`` has the predictor of ``directpred``; `BYOL` says what it is the control of.
    """
    dim = recipe.dim
    eps = {} if recipe.eps is None else {"eps": recipe.eps}
    match recipe.predictor:
        case "directpred" | "no_stopgrad":
            return DirectPredHead(dim, rule=dp.Eq18(**eps), rho=recipe.rho, freq=recipe.freq)
        case "directcopy":
            return DirectPredHead(dim, rule=dp.DirectCopy(**eps), rho=recipe.rho, freq=recipe.freq)
        case "linear":
            return nn.Linear(dim, dim, bias=False)
        case "mlp":
            return mlp(dim, recipe.hidden, dim)
        case "none":
            return nn.Identity()
    raise ValueError(f"unknown predictor {recipe.predictor!r}")


class BYOL(L.LightningModule):
    """BYOL as published with DirectPred: two views, each predicts the target of the other.

    The control ``no_stopgrad`` takes the stop-gradient away from DirectPred. A gradient into an
    EMA target would not reach the online network, so the target is the online network itself and
    the gradient flows through both branches: the setting of the paper's Theorem 2, in which the
    features collapse. (That the target is shared is not what does it: with the stop-gradient and
    ``target_momentum`` 0, which is SimSiam with DirectPred, nothing collapses.)

    Args:
        recipe: The options of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        # The seed decides the networks, whatever the predictor draws after them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(recipe.seed, Use.WEIGHTS))
            self.online = OnlineNetwork(recipe.width, recipe.hidden, recipe.dim)
            self.predictor = build_predictor(recipe)
        self.stop_gradient = recipe.predictor != "no_stopgrad"
        if self.stop_gradient:
            self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.views = views(recipe)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch of images (n, channels, height, width)."""
        torch.manual_seed(seed_of(self.recipe.seed, Use.VIEWS, self.global_step))
        view1, view2 = self.views(images), self.views(images)
        z1, z2 = self.online(view1), self.online(view2)
        if self.stop_gradient:
            with torch.no_grad():
                target1, target2 = self.target(view1), self.target(view2)
        else:
            target1, target2 = z1, z2
        return self.loss(z1, target2) + self.loss(z2, target1)

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss of the features of one view, both (n, dim): how far they predict the target."""
        prediction = self.predictor(z)
        if self.recipe.loss == "iso":
            return iso_loss(z, prediction, target)
        return regression_loss(prediction, target)

    def configure_optimizers(self) -> Optimizer:
        """SGD on all parameters; DirectPred sets its weight after each of the optimizer's steps."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        recipe = self.recipe
        optimizer = SGD(
            parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        if isinstance(self.predictor, DirectPredHead):
            self.predictor.attach(optimizer)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the recipe into the checkpoint, from which the model can be built again."""
        checkpoint["recipe"] = asdict(self.recipe)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the online network, then let the target follow it."""
        super().optimizer_step(*args, **kwargs)
        if self.stop_gradient:
            follow(self.target, self.online, self.recipe.target_momentum)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the parameters of ``target`` to ``momentum · target + (1 - momentum) · online``."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
