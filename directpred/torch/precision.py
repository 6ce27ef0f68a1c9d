"""The precision of products in float32, whatever the user allows for the network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_AS_IT_IS: AbstractContextManager[None] = nullcontext()
_backends: Any = torch.backends
_KINDS: tuple[Any, Any] = (_backends.mkldnn.matmul, _backends.cuda.matmul)
"""The settings of matrix products, on a CPU and with CUDA; they are those of the whole process."""
_changing = threading.RLock()
_changed = False


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Multiply float32 as float32: neither in autocast's dtype nor in TF32 or bfloat16.

    Where that is so already, nothing is touched. Code being compiled keeps the precision that the
    user has set, which dynamo cannot change.
    """
    kind = device.type
    if kind == "meta":
        return _AS_IT_IS
    if torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    # In this order: another thread that has changed the setting has said so before.
    narrow = _KINDS[kind == "cuda"].fp32_precision not in ("ieee", "none")
    if narrow or _changed or torch.is_autocast_enabled(kind):
        return _full(kind)
    return _AS_IT_IS


@contextmanager
def _full(kind: str) -> Iterator[None]:
    with products_in("ieee", kind), torch.autocast(kind, enabled=False):
        yield


@contextmanager
def products_in(precision: str, kind: str) -> Iterator[None]:
    """Multiply float32 in a precision of `torch.backends`; other threads that come here wait."""
    global _changed
    products = _KINDS[kind == "cuda"]
    with _changing:
        outer, _changed = _changed, True
        before = _setting(products)
        products.fp32_precision = precision
        try:
            yield
        finally:
            products.fp32_precision = before
            _changed = outer


def _setting(products: Any) -> str:
    """What the user has set, "none" where the value read is that of all of PyTorch."""
    read: str = products.fp32_precision
    generic = _backends.fp32_precision
    if read == "none" or generic != read:
        return read
    _backends.fp32_precision = "ieee" if read != "ieee" else "tf32"
    inherits = products.fp32_precision != read
    _backends.fp32_precision = generic
    return "none" if inherits else read
