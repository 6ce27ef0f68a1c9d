"""What an array is to this package: its library, where it is, and how it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from array_api_compat import is_jax_array

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""


def is_torch(x: Any) -> bool:
    """Tell whether x is a tensor of PyTorch; dynamo can trace this, and array-api-compat's not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def array_namespace(x: Array) -> Any:
    """Return the functions of the array API standard for the library of x."""
    if is_torch(x):
        compat = sys.modules.get("array_api_compat.torch")
        return compat or array_api_compat.array_namespace(x)  # which imports it
    return array_api_compat.array_namespace(x)


def device(x: Array) -> Any:
    """Return the device of x, in the words of its library."""
    return x.device if is_torch(x) else array_api_compat.device(x)


def on_host(x: Array) -> bool:
    """Tell whether reading the values of x costs no synchronisation with a device."""
    if is_torch(x):
        return bool(x.is_cpu)
    where = device(x)
    if where is None:  # JAX traces x, for its default device
        where = sys.modules["jax"].default_backend()
    return "cpu" in str(where).lower()


def readable(x: Array) -> bool:
    """Tell whether Python may branch on the values of x: they are on the host, and not traced."""
    if is_torch(x):
        return on_host(x) and not sys.modules["torch"].compiler.is_compiling()
    traced = is_jax_array(x) and isinstance(x, sys.modules["jax"].core.Tracer)
    return not traced and on_host(x)


def is_plain(x: Array) -> bool:
    """Tell whether x is its values alone and may be computed in place, without JAX or autograd."""
    return readable(x) and not is_jax_array(x) and not getattr(x, "requires_grad", False)


def host_view(x: Array) -> np.ndarray[Any, Any] | None:
    """Return x as an array of NumPy in the same memory, where that costs nothing, else None.

    On a few numbers NumPy is several times faster than PyTorch.
    """
    if isinstance(x, np.ndarray):
        return x
    if is_torch(x) and readable(x):
        try:
            view: np.ndarray[Any, Any] = x.numpy(force=x.requires_grad)
            return view
        except RuntimeError:  # within a transform of torch.func a tensor has no memory
            return None
    return None


def scipy_linalg(x: Array) -> Any:
    """Return `scipy.linalg` where it is installed and faster for a matrix x, else None.

    NumPy converts float32 to float64 for a decomposition: twice the time. For smaller matrices the
    threads of SciPy's own OpenBLAS, which wait for those of NumPy's, cost more than that.
    """
    single = isinstance(x, np.ndarray) and x.dtype == np.float32
    return _scipy_linalg() if single and x.shape[0] >= 256 else None


@cache
def _scipy_linalg() -> Any:
    try:
        import scipy.linalg
    except ImportError:
        return None
    return scipy.linalg


def exact_products(x: Array) -> AbstractContextManager[None]:
    """Multiply arrays like x in their dtype, whatever PyTorch's user allows for a network."""
    return _full_precision()(x.device) if is_torch(x) else nullcontext()


@cache
def _full_precision() -> Any:
    from directpred.torch.precision import full_precision

    return full_precision


def detached(x: Array) -> Array:
    """Return x as a constant for automatic differentiation."""
    return x.detach() if is_torch(x) else x


def assign(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Write arrays into others of the same shapes and of one dtype, in place."""
    pairs = [(x, y) for x, y in zip(targets, values, strict=True) if x is not y]
    if pairs and is_torch(targets[0]):
        sys.modules["torch"]._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return
    for target, value in pairs:
        target[...] = value


def fill(target: Array, value: Array) -> None:
    """Write a number or 0-d array into a 0-d array, without a synchronisation."""
    if not is_torch(target):
        target[...] = value
    elif is_torch(value):
        target.copy_(value)
    else:
        target.fill_(value)


def changed(arrays: Sequence[Array]) -> None:
    """Tell autograd that arrays were written behind its back: a backward through them raises."""
    if is_torch(arrays[0]):
        sys.modules["torch"].autograd.graph.increment_version(arrays)
