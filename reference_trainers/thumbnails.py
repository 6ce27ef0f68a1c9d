"""A picture of some images and their augmented views."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from . import files

TILE = 96
"""Pixels of a side of an image."""


def save_views(raw: Tensor, view1: Tensor, view2: Tensor, path: Path) -> None:
    """Write a picture of the first 8 images, with their two views below them.

    Every image is stretched to its own darkest and lightest value, which undoes normalisation but
    for its tint.

    Args:
        raw: Images, (n, c, h, w) of any dtype, on any device.
        view1: Their first views, (n, c, h, w), normalised or not.
        view2: Their second views.
        path: The PNG to write.
    """
    size = view1.shape[-1]
    edge = TILE // size * size if size <= TILE else TILE
    rows = [_tiles(images[:8].detach().cpu().float(), edge) for images in (raw, view1, view2)]
    grid = (torch.cat(rows) * 255).round().byte()
    picture = io.BytesIO()
    Image.fromarray(grid.numpy()).save(picture, format="PNG", optimize=True)
    files.write(path, picture.getvalue())


def _tiles(images: Tensor, edge: int) -> Tensor:
    """A row of images (n, c, h, w) as (edge + 4, n * (edge + 4), 3), in [0, 1], framed in white."""
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    images = images.nan_to_num(0.0, 0.0, 0.0)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp(min=1e-6)
    small = images.shape[-1] < edge
    images = interpolate(images, (edge, edge), mode="nearest" if small else "area")
    return torch.cat(list(pad(images, (2, 2, 2, 2), value=1.0)), dim=-1).permute(1, 2, 0)
