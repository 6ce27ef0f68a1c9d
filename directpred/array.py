"""What an array is to this package, and the fused operations of PyTorch that the standard lacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import array_api_compat
from array_api_compat import is_jax_array

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""

First, Second = TypeVar("First"), TypeVar("Second")


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


def detached(x: Array) -> Array:
    """Return x as a constant for automatic differentiation."""
    return x.detach() if is_torch(x) else x


def add_scaled(x: Array, y: Array, scale: float) -> Array:
    """Return x + scale · y, of one shape."""
    if is_torch(x):
        return x.add(y, alpha=scale)
    return x + scale * y


def add_product(x: Array, y: Array, z: Array, scale: float = 1.0) -> Array:
    """Return x + scale · y · z, elementwise; z is 0-d or a number."""
    if is_torch(x) and is_torch(z):
        return x.addcmul(y, z, value=scale)
    return x + (scale * z) * y


def add_matmul(x: Array, a: Array, b: Array, scale: float) -> Array:
    """Return x + scale · a @ b, of matrices; x may be overwritten."""
    return x.addmm_(a, b, alpha=scale) if is_torch(x) else x + scale * (a @ b)


def scaled_matmul(a: Array, b: Array, scale: float) -> Array:
    """Return scale · a @ b, of matrices."""
    if is_torch(a):
        return a.new_empty(()).addmm(a, b, beta=0, alpha=scale)
    return a @ b if scale == 1 else scale * (a @ b)


def both(
    first: Callable[[], First], second: Callable[[], Second], like: Array
) -> tuple[First, Second]:
    """Return the results of two calls that do not depend on each other.

    While PyTorch captures a CUDA graph they become two branches of it, which run side by side.
    """
    if not (is_torch(like) and like.is_cuda):
        return first(), second()
    cuda = sys.modules["torch"].cuda
    if not cuda.is_current_stream_capturing():
        return first(), second()
    here, side = cuda.current_stream(like.device), cuda.Stream(like.device)
    side.wait_stream(here)
    with cuda.stream(side):
        there = second()
    done = first(), there
    here.wait_stream(side)
    return done


def assign(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Write arrays into others of the same shapes and of one dtype, in place."""
    pairs = [(x, y) for x, y in zip(targets, values, strict=True) if x is not y]
    if is_torch(targets[0]):
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
