"""The random views of a batch of images, made on the images' device."""

from __future__ import annotations

from typing import NamedTuple

import kornia.augmentation as K
import torch
from torch import Tensor, nn

from .recipe import Recipe

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the channels of images in [0, 1], as published trainers have them.

Those of CIFAR are the published DirectPred trainer's, for both sets.
"""


class Views(NamedTuple):
    """From raw images, uint8 (n, c, h, w), to the views of a network, float32.

    Attributes:
        maximum: Value of white in the raw images.
        first: Augmentation of the first view.
        second: Of the second.
        normalise: Of views, and of the images that are evaluated.
    """

    maximum: int
    first: nn.Sequential
    second: nn.Sequential
    normalise: nn.Module

    def __call__(self, raw1: Tensor, raw2: Tensor) -> tuple[Tensor, Tensor]:
        """Two views, each image's drawn for itself; ``raw1`` and ``raw2`` may be the same."""
        # kornia's modules keep what they drew: their forward functions leave nothing behind.
        view1 = self.first.forward(raw1.float() / self.maximum)
        view2 = self.second.forward(raw2.float() / self.maximum)
        return self.normalise(view1), self.normalise(view2)

    def plain(self, raw: Tensor) -> Tensor:
        """The images as they are, for evaluation."""
        images: Tensor = self.normalise(raw.float() / self.maximum)
        return images


def build_views(recipe: Recipe, maximum: int, cropped: bool) -> Views:
    """The augmentation of a recipe.

    Args:
        recipe: Its strengths.
        maximum: Value of white in the raw images.
        cropped: Whether the raw images are random crops of the right size already.
    """
    normalise: nn.Module = nn.Identity()
    if recipe.normalize and recipe.dataset in STATISTICS:
        mean, std = (torch.tensor(values) for values in STATISTICS[recipe.dataset])
        normalise = K.Normalize(mean, std)
    blur2 = recipe.blur if recipe.blur2 is None else recipe.blur2
    first, second = (
        nn.Sequential(*_geometry(recipe, cropped), *_colours(recipe, blur, solarize))
        for blur, solarize in ((recipe.blur, 0.0), (blur2, recipe.solarize))
    )
    return Views(maximum, first, second, normalise)


def _geometry(recipe: Recipe, cropped: bool) -> list[nn.Module]:
    steps: list[nn.Module] = []
    if recipe.rotate or recipe.shift or recipe.zoom:
        shift, zoom = (recipe.shift, recipe.shift), (1 - recipe.zoom, 1 + recipe.zoom)
        steps.append(K.RandomAffine(recipe.rotate, translate=shift, scale=zoom, p=1.0))
    if recipe.crop < 1 and not cropped:
        size = (recipe.size, recipe.size)
        steps.append(K.RandomResizedCrop(size, scale=(recipe.crop, 1.0), cropping_mode="resample"))
    if recipe.flip:
        steps.append(K.RandomHorizontalFlip(p=recipe.flip))
    return steps


def _colours(recipe: Recipe, blur: float, solarize: float) -> list[nn.Module]:
    steps: list[nn.Module] = []
    if recipe.brightness:
        steps.append(K.RandomBrightness((1 - recipe.brightness, 1 + recipe.brightness), p=1.0))
    if recipe.jitter_p:
        steps.append(K.ColorJitter(*recipe.jitter, p=recipe.jitter_p))
    if recipe.grayscale:
        steps.append(K.RandomGrayscale(p=recipe.grayscale))
    if blur:
        kernel = max(3, int(0.1 * recipe.size) // 2 * 2 + 1)
        steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur))
    if solarize:
        steps.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=0.0, p=solarize))
    if recipe.noise:
        steps.append(K.RandomGaussianNoise(std=recipe.noise, p=1.0))
    return steps
