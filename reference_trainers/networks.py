"""The encoder, the projector and the learned predictor."""

from __future__ import annotations

from torch import Tensor, nn


def digits_encoder(width: int) -> nn.Sequential:
    """A convolutional encoder of 8×8 images.

    Args:
        width: Channels of the first convolution.

    Returns:
        A module from (n, 1, 8, 8) to (n, 4 · width).
    """

    def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(1, width, stride=1),  # 8×8
        *block(width, 2 * width, stride=2),  # 4×4
        *block(2 * width, 4 * width, stride=2),  # 2×2
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mlp(dim_in: int, hidden: int, dim_out: int) -> nn.Sequential:
    """Linear, BatchNorm without affine, ReLU, Linear: the published projector and predictor.

    Args:
        dim_in: Width of the input.
        hidden: Width of the hidden layer.
        dim_out: Width of the output.

    Returns:
        A module from (n, dim_in) to (n, dim_out).
    """
    return nn.Sequential(
        nn.Linear(dim_in, hidden),
        nn.BatchNorm1d(hidden, affine=False),
        nn.ReLU(),
        nn.Linear(hidden, dim_out),
    )


class OnlineNetwork(nn.Module):
    """Encoder and projector: from images (n, 1, 8, 8) to the features (n, dim) to predict from.

    Args:
        width: Channels of the encoder's first convolution.
        hidden: Hidden units of the projector.
        dim: Width of the output.
    """

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.encoder = digits_encoder(width)
        self.projector = mlp(4 * width, hidden, dim)

    def forward(self, images: Tensor) -> Tensor:
        """The features that enter the predictor."""
        features: Tensor = self.projector(self.encoder(images))
        return features
