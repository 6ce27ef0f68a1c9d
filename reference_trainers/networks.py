"""The encoder, the projector and the learned predictor."""

from __future__ import annotations

from itertools import pairwise

import torchvision
from torch import Tensor, nn

from .recipe import Recipe


def small_encoder(channels: int, width: int, stem: str) -> nn.Sequential:
    """A convolutional encoder of images of 8 to 32 pixels.

    Args:
        channels: Of the images.
        width: Channels of the first convolution.
        stem: That has stride 1 ("cifar") or 2 ("imagenet").

    Returns:
        A module from (n, channels, height, width) to (n, 4 · width).
    """

    def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(channels, width, stride=1 if stem == "cifar" else 2),
        *block(width, 2 * width, stride=2),
        *block(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def resnet(name: str, stem: str) -> torchvision.models.ResNet:
    """Torchvision's ResNet without its classifier, with the stem for small images or its own.

    Its `state_dict` is that of ``torchvision.models.resnet18()`` but for ``fc`` (and, with the stem
    "cifar", the shape of ``conv1``).
    """
    network: torchvision.models.ResNet = getattr(torchvision.models, name)()
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def mlp(*widths: int, affine: bool = False) -> nn.Sequential:
    """Linear layers, with batch normalisation and ReLU between: projectors and predictors.

    Args:
        *widths: Of the input, of every hidden layer and of the output.
        affine: Whether the normalisations scale and shift; in the published trainer they do not.

    Returns:
        A module from (n, widths[0]) to (n, widths[-1]).
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after, affine=affine), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class OnlineNetwork(nn.Module):
    """Encoder and projector: from images to the features (n, dim) to predict from.

    Args:
        recipe: What they are made of.
        channels: Of the images.
    """

    def __init__(self, recipe: Recipe, channels: int) -> None:
        super().__init__()
        self.encoder: nn.Module
        if recipe.backbone == "small":
            self.encoder = small_encoder(channels, recipe.width, recipe.stem)
            width = 4 * recipe.width
        else:
            self.encoder = resnet(recipe.backbone, recipe.stem)
            width = 512 if recipe.backbone == "resnet18" else 2048
        hidden = [recipe.hidden] * (recipe.projector_layers - 1)
        self.projector = mlp(width, *hidden, recipe.dim, affine=recipe.bn_affine)
        if recipe.bn_output:
            self.projector.append(nn.BatchNorm1d(recipe.dim, affine=False))

    def forward(self, images: Tensor) -> Tensor:
        """The features that enter the predictor."""
        features: Tensor = self.projector(self.encoder(images))
        return features
