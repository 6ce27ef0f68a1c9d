"""Products in float32, whatever the user allows for the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 as float32: neither in autocast's dtype nor in TF32 or bfloat16.

    Code being compiled keeps the precision that the user has set, which dynamo cannot change.
    """
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():
            yield
            return
        before = [(matmul, matmul.fp32_precision) for matmul in _MATMULS]
        for matmul in _MATMULS:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            for matmul, precision in before:
                matmul.fp32_precision = precision
