"""BYOL and SimSiam, with a predictor that is set, learned, or left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import directpred as dp
from directpred.losses import iso_loss, regression_loss
from directpred.spectrum import Rule
from directpred.torch import DirectPredHead

from .networks import OnlineNetwork, mlp
from .optimizers import (
    build_optimizer,
    build_schedule,
    target_momentum,
)
from .recipe import Recipe
from .seeds import Use, seed_of
from .views import Views

RULES: dict[str, Callable[..., Rule]] = {
    "directpred": dp.Eq18,
    "eq18_printed": partial(dp.Eq18, normalize=False),
    "directset": dp.DirectSet,
    "directcopy": dp.DirectCopy,
    "boost_scale": dp.BoostScale,
    "no_stopgrad": dp.Eq18,
}


def build_predictor(recipe: Recipe) -> nn.Module:
    """The predictor of a recipe: a module from (n, dim) to (n, dim).

    ``no_stopgrad`` has the predictor of ``directpred``; `Siamese` says what it is the control of.
    """
    dim = recipe.dim
    match recipe.predictor:
        case "linear":
            linear = nn.Linear(dim, dim, bias=False)
            if recipe.symmetric:
                symmetrise(linear.weight)
            return linear
        case "mlp":
            return mlp(dim, recipe.predictor_hidden, dim, affine=recipe.bn_affine)
        case "none":
            return nn.Identity()
    return DirectPredHead(
        dim,
        rule=RULES[recipe.predictor](**({} if recipe.eps is None else {"eps": recipe.eps})),
        rho=recipe.rho,
        freq=recipe.freq,
        between="train" if recipe.between == "train" else "hold",
    )


class Siamese(L.LightningModule):
    """Two views of every image: each predicts the target of the other.

    BYOL's target network is a moving average of the online network, SimSiam's is the online network
    itself without gradient. The control ``no_stopgrad`` takes the stop-gradient away from
    DirectPred: the target is the online network itself, since a gradient into a moving average
    would not reach it, and the gradient flows through both branches. That is the setting of the
    paper's Theorem 2, in which the features collapse.

    Args:
        recipe: The options of the run.
        channels: Of the images.
        steps_per_epoch: Optimizer steps, which the schedules count.
        views: The augmentation; a model that is only evaluated needs none.
    """

    def __init__(
        self, recipe: Recipe, channels: int, steps_per_epoch: int = 1, views: Views | None = None
    ) -> None:
        super().__init__()
        self.recipe, self.channels, self.steps_per_epoch = recipe, channels, steps_per_epoch
        # The seed decides the networks, whatever the predictor draws after them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(recipe.seed, Use.WEIGHTS))
            self.online = OnlineNetwork(recipe, channels)
            self.predictor = build_predictor(recipe)
        self.stop_gradient = recipe.predictor != "no_stopgrad"
        self.has_target = self.stop_gradient and recipe.method == "byol"
        if self.has_target:
            self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        self.to(memory_format=self.memory_format)
        self.passes = 0
        self.views = views  # a tuple, no submodule: what kornia keeps is none of a checkpoint's

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch of raw images, uint8 (n, channels, height, width) for each view."""
        view1, view2 = self.augment(batch)
        self.passes += 1
        z1, z2 = self.online(view1), self.online(view2)
        if self.has_target:
            with torch.no_grad():
                target1, target2 = self.target(view1), self.target(view2)
        elif self.stop_gradient:
            target1, target2 = z1.detach(), z2.detach()
        else:
            target1, target2 = z1, z2
        loss = self.loss(z1, target2) + self.loss(z2, target1)
        self.log("loss", loss)
        return loss

    def augment(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The two views that the next pass has of a batch, float32 (n, channels, size, size)."""
        assert self.views is not None
        count = self.global_step * self.recipe.accumulate + self.passes
        torch.manual_seed(seed_of(self.recipe.seed, Use.VIEWS, count, self.global_rank))
        with torch.autocast(self.device.type, enabled=False):
            made = self.views(*batch)
        return [view.contiguous(memory_format=self.memory_format) for view in made]

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """The loss of the features of one view, both (n, dim): how far they predict the target."""
        prediction: Tensor = self.predictor(z)
        loss: Tensor
        if self.recipe.loss == "iso":
            loss = iso_loss(z, prediction, target)
        else:
            loss = regression_loss(prediction, target)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule; DirectPred sets its weight after each of its steps."""
        optimizer = build_optimizer(self.recipe, self.online, self.predictor)
        if isinstance(self.predictor, DirectPredHead):
            self.predictor.attach(optimizer)
        schedule = build_schedule(self.recipe, optimizer, self.steps_per_epoch)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_model(self) -> None:
        """Compile the networks where the recipe says so."""
        if self.recipe.compile:
            self.online.compile()
            if self.has_target:
                self.target.compile()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the online network, then let the target follow it."""
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.passes = 0
        if self.recipe.symmetric and isinstance(self.predictor, nn.Linear):
            symmetrise(self.predictor.weight)
        if self.has_target:
            momentum = target_momentum(self.recipe, step, self.steps_per_epoch)
            follow(self.target, self.online, momentum)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what the model can be built from again."""
        checkpoint["recipe"] = asdict(self.recipe)
        checkpoint["channels"] = self.channels
        checkpoint["steps_per_epoch"] = self.steps_per_epoch


@torch.no_grad()
def symmetrise(weight: Tensor) -> None:
    """Make a matrix (dim, dim) symmetric, in place: W becomes (W + Wᵀ) / 2.

    After every step of SGD this is the same as to train the symmetric part alone, since SGD with
    momentum and weight decay is linear in weight and gradient.
    """
    weight.copy_((weight + weight.T) / 2)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the parameters of ``target`` to ``momentum · target + (1 - momentum) · online``."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)
