"""Products in float32, whatever the user allows for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Multiply float32 as float32: neither in autocast's dtype nor in TF32 or bfloat16.

    Where that is so already, nothing is touched. Code being compiled keeps the precision that the
    user has set, which dynamo cannot change.
    """
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    narrow = _products_of(device).fp32_precision not in ("ieee", "none")
    if narrow or torch.is_autocast_enabled(device.type):
        return _forced(device)
    return _AS_IT_IS


@contextmanager
def _forced(device: torch.device) -> Iterator[None]:
    products = _products_of(device)
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.fp32_precision = before


def _products_of(device: torch.device) -> Any:
    """The settings of matrix products on a kind of device."""
    backends = torch.backends
    return (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul
