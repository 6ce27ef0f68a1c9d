"""Operations that PyTorch does in one kernel, where the array API standard needs several.

Elsewhere they are what they say. On a GPU with tensor cores, products of large float32 matrices run
there: TF32 reads 10 bits of a mantissa, and three products of matrices that are split into two such
parts (`Operand`) give back float32 in less time than one product in float32 takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from array_api_compat import is_cupy_array

from directpred.array import Array, array_namespace, is_torch

LARGE = 1024
"""The dim from which on products take longer than what surrounds them."""


def add_scaled(x: Array, y: Array, scale: float) -> Array:
    """Return x + scale · y, of one shape."""
    return x.add(y, alpha=scale) if is_torch(x) else x + scale * y


def add_to(x: Array, y: Array, scale: float) -> Array:
    """Return x + scale · y, of one shape; x may be overwritten."""
    return x.add_(y, alpha=scale) if is_torch(x) else x + scale * y


def add_product(x: Array, y: Array, z: Array, scale: float = 1.0) -> Array:
    """Return x + scale · y · z, elementwise; z is 0-d or a number."""
    if is_torch(x) and is_torch(z):
        return x.addcmul(y, z, value=scale)
    return x + (scale * z) * y


def add_transposed(x: Array) -> Array:
    """Return x + xᵀ, exactly symmetric; x may be overwritten."""
    # PyTorch copies a large transposed matrix in blocks, but adds it line by line.
    if is_torch(x) and x.is_cpu and x.shape[0] >= LARGE:
        return x.T.contiguous().add_(x)
    return x + x.T


def complement(rho: Array, scale: float) -> Array:
    """Return scale · (1 − rho), of 0-d arrays."""
    return (
        sys.modules["torch"].rsub(rho, scale, alpha=scale) if is_torch(rho) else scale * (1 - rho)
    )


def add_flag(count: Array, flag: Array) -> Array:
    """Return count + 1 where a 0-d boolean holds, else count, 0-d integer."""
    if is_torch(flag):
        return count + flag
    return count + array_namespace(count).astype(flag, count.dtype)


class Operand(NamedTuple):
    """A matrix that enters products.

    Attributes:
        value: The matrix.
        high, low: For products on tensor cores, two matrices that TF32 holds, whose sum is the
            value to 21 bits; else None.
    """

    value: Array
    high: Array | None
    low: Array | None


def operand(x: Array) -> Operand:
    """Prepare a matrix for products: split once, it may enter several."""
    if not _on_tensor_cores(x):
        return Operand(x, None, None)
    torch = sys.modules["torch"]
    high = (x.view(torch.int32) & -0x2000).view(x.dtype)
    return Operand(x, high, x - high)


def matmul(a: Operand, b: Operand, scale: float = 1.0, plus: Array | None = None) -> Array:
    """Return plus + scale · a @ b, in the precision of the dtype; `plus` may be overwritten."""
    if a.high is None:
        return _product(a.value, b.value, scale, plus)
    with _tf32():  # the product of the low parts is below the rounding of float32
        out = _product(a.high, b.low, scale, plus)
        out = _product(a.low, b.high, scale, out)
        return _product(a.high, b.high, scale, out)


def rough_square(x: Array) -> Array:
    """Return x @ x, on tensor cores in TF32."""
    if not _on_tensor_cores(x):
        return _product(x, x, 1.0, None)
    with _tf32():
        return _product(x, x, 1.0, None)


def both(first: Callable[[], Array], second: Callable[[], Array], like: Array) -> tuple[Any, Any]:
    """Return the results of two calls that do not depend on each other.

    While PyTorch captures a CUDA graph they become two branches of it, which run side by side.
    """
    if not (is_torch(like) and like.is_cuda):
        return first(), second()
    cuda = sys.modules["torch"].cuda
    if not cuda.is_current_stream_capturing():
        return first(), second()
    from directpred.torch.graph import stream_for

    here, side = cuda.current_stream(like.device), stream_for("branch", like.device)
    side.wait_stream(here)
    with cuda.stream(side):
        there = second()
    done = first(), there
    here.wait_stream(side)
    return done


def scaled_matmul(a: Array, b: Array, scale: float) -> Array:
    """Return scale · a @ b, of matrices of any shape."""
    return _product(a, b, scale, None)


def _product(a: Array, b: Array, scale: float, plus: Array | None) -> Array:
    if is_torch(a):
        if plus is not None:
            return plus.addmm_(a, b, alpha=scale)
        return a @ b if scale == 1 else a.new_empty(()).addmm(a, b, beta=0, alpha=scale)
    product = _cupy_product(a, b) if is_cupy_array(a) else a @ b
    product = product if scale == 1 else scale * product
    return product if plus is None else plus + product


def _cupy_product(a: Array, b: Array) -> Array:
    from directpred.cupy_graph import product

    return product(a, b)


def _on_tensor_cores(x: Array) -> bool:
    """Tell whether products of x go to tensor cores; code being compiled cannot choose."""
    if not (is_torch(x) and x.is_cuda) or x.shape[0] < LARGE:
        return False
    torch = sys.modules["torch"]
    return (
        x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _tf32() -> AbstractContextManager[None]:
    from directpred.torch.precision import products_in

    return products_in("tf32", "cuda")
