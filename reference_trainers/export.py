"""What other programs read: the encoder as safetensors, features as .npz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet

from .errors import UserError
from .files import reason, whole_file
from .probes import Split


def save_backbone(encoder: nn.Module, path: Path) -> None:
    """Write the weights of an encoder as safetensors, as a whole or not at all.

    Those of a ResNet are in torchvision's names, without ``fc``::

        model = torchvision.models.resnet18()
        model.fc = torch.nn.Identity()
        model.load_state_dict(safetensors.torch.load_file(path))

    and the file's metadata says ``arch``, the name of that function, where torchvision has one,
    and ``stem``: "imagenet", or "cifar" for a 3×3 ``conv1`` of stride 1 and an `nn.Identity` as
    ``maxpool``, which a model must be given before it loads them. ``format`` is "pt", as in all
    such files of PyTorch.

    Args:
        encoder: A torchvision ResNet, or any other module, whose ``state_dict`` is written.
        path: The file.

    Raises:
        UserError: The file cannot be written.
    """
    state: dict[str, Tensor] = encoder.state_dict()
    metadata = {"format": "pt"}
    if isinstance(encoder, ResNet):
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        metadata |= _describe(encoder)
    # Copies: safetensors refuses tensors that share memory or are not contiguous.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    with _whole_file(path) as file:
        file.write(safetensors.torch.save(state, metadata))


def save_features(path: Path, /, **splits: Split) -> None:
    """Write features and labels as .npz, as a whole or not at all.

    Args:
        path: The file. It gets this very name, whatever that ends with.
        **splits: By name, such as ``train`` and ``test``, features (n, d) and labels (n,). The
            arrays in the file are ``<name>_features``, float32, and ``<name>_labels``, int64.

    Raises:
        UserError: The file cannot be written.
        ValueError: A split has not as many labels as features.
    """
    arrays: dict[str, Any] = {}  # of NumPy; savez has other options of its own
    for name, (features, labels) in splits.items():
        if len(features) != len(labels):
            raise ValueError(f"{name} has {len(features)} features and {len(labels)} labels")
        arrays[f"{name}_features"] = features.detach().to("cpu", torch.float32).numpy()
        arrays[f"{name}_labels"] = labels.detach().to("cpu", torch.int64).numpy()
    with _whole_file(path) as file:
        np.savez(file, **arrays)


def _describe(encoder: ResNet) -> dict[str, str]:
    """The metadata of a ResNet. Nothing is said of what torchvision does not have."""
    description = {}
    shapes = _shapes(encoder)
    for arch in torchvision.models.list_models(include=["resn*", "wide_resnet*"]):
        with torch.device("meta"):
            candidate = torchvision.models.get_model(arch)
        if _shapes(candidate) == shapes:
            description["arch"] = arch
    pooled = not isinstance(encoder.maxpool, nn.Identity)
    match encoder.conv1.kernel_size, encoder.conv1.stride, pooled:
        case (7, 7), (2, 2), True:
            description["stem"] = "imagenet"
        case (3, 3), (1, 1), False:
            description["stem"] = "cifar"
    return description


def _shapes(encoder: ResNet) -> dict[str, torch.Size]:
    """Of the weights that neither stem nor classifier changes."""
    state = encoder.state_dict()
    return {name: state[name].shape for name in state if not name.startswith(("conv1.", "fc."))}


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """`whole_file`, for what a user asked for."""
    try:
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
