"""Statistics of the features: the moments of a batch, and their average over steps (Eq. 19).

The moments are sums over rows, so views, micro-batches and ranks merge by addition and the
correlation of a step is one of all its rows, however they were spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_jax_array

from directpred.array import Array, array_namespace, host_view, is_torch, readable
from directpred.features import check_features, describe_nonfinite  # noqa: F401 - they were here
from directpred.fused import add_product, add_to, scaled_matmul

UNIT = 2.0**-12
"""The unit of Σ z zᵀ, so that over a million rows it fits float32 where its mean does."""


_AS_IT_IS = nullcontext()

FAINT = 1e-32
"""A sum of this much is far from denormal numbers, of which matrix products may lose digits."""


class Moments(NamedTuple):
    """Sums over the rows z of a batch.

    Attributes:
        outer: UNIT · Σ z zᵀ, (dim, dim).
        total: Σ z, (dim,).
        rows: Number of rows; a number or a 0-d array.
    """

    outer: Array
    total: Array
    rows: Array


def moments(z: Array, dtype: Array) -> Moments:
    """Sum over the rows of one array of features.

    The sum of outer products is one matrix product. Where it overflows or loses digits to denormal
    numbers, and where that cannot be read, the features are scaled by a power of two before, which
    is exact: the product then overflows only where the mean of z zᵀ is beyond 1/16 of the largest
    number, so features of 4e18 fit float32, and features of 1e-20 lose no more than the mean itself
    does. Many rows are summed block by block, and the blocks in halves: rounding does not grow
    with their number, and where features are of another dtype, nor does memory.

    Args:
        z: Features, (..., dim), real floating.
        dtype: The floating dtype to sum in.

    Returns:
        Their moments in `dtype`, on the device of z.
    """
    xp, dim = array_namespace(z), z.shape[-1]
    if z.ndim > 2:
        z = xp.reshape(z, (-1, dim))
    rows, same = z.shape[0], z.dtype == dtype
    if rows > max(4 * dim, 4096) and not (same and _sums_well(z)):
        half = rows // 2
        return merge(moments(z[:half, :], dtype), moments(z[half:, :], dtype))
    part = z if same else xp.astype(z, dtype)
    return Moments(_outer(part), _total(part), rows)


def _sums_well(z: Array) -> bool:
    """Tell whether the library of z sums rows in parts, on a device or as it compiles.

    NumPy adds row after row, and a product on a CPU panel after panel: rounding adds up.
    """
    return not isinstance(z, np.ndarray) and (is_jax_array(z) or not readable(z))


def _total(part: Array) -> Array:
    """Σ z over the rows (n, dim) of one dtype: in halves, where a library adds row after row."""
    half = part.shape[0] // 2
    if half <= 64 or is_torch(part) or _sums_well(part):
        return array_namespace(part).sum(part, axis=0)
    return _total(part[:half, :]) + _total(part[half:, :])


def _outer(part: Array) -> Array:
    """UNIT · Σ z zᵀ over the rows (n, dim) of one dtype."""
    if readable(part):
        with _AS_IT_IS if is_torch(part) else np.errstate(over="ignore"):
            outer = scaled_matmul(part.T, part, UNIT)
        if FAINT < peak_on_host(outer) < math.inf:
            return outer
    scale = 2.0 ** -max(0, math.ceil(math.log2(part.shape[0] / 16) / 2))  # n · scale² ≤ 16
    scaled = part * scale if scale < 1 else part
    return (scaled.T @ scaled) * (UNIT / scale**2)


def sum_pairwise(views: Sequence[Array], gather: Callable[[Array], Moments]) -> Moments:
    """Gather the moments of each of some arrays, and merge them in halves, as `moments` rows."""
    if len(views) == 1:
        return gather(views[0])
    half = len(views) // 2
    return merge(sum_pairwise(views[:half], gather), sum_pairwise(views[half:], gather))


def cast(batch: Moments, dtype: Any) -> Moments:
    """Convert the sums to another dtype; in float64, thousands may be merged one after another."""
    if batch.outer.dtype == dtype:
        return batch
    xp = array_namespace(batch.outer)
    return Moments(xp.astype(batch.outer, dtype), xp.astype(batch.total, dtype), batch.rows)


def merge(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two sets of rows."""
    return Moments(a.outer + b.outer, a.total + b.total, a.rows + b.rows)


def merge_finite(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two forward passes, without one that is not finite.

    Where neither is finite, the result is not.
    """
    if readable(a.outer):
        if not is_finite(b):
            return a
        return merge(a, b) if is_finite(a) else b
    xp = array_namespace(a.outer)
    first, second = peak(a.outer) < math.inf, peak(b.outer) < math.inf

    def merged(x: Array, y: Array) -> Array:
        return xp.where(second, xp.where(first, x, 0.0) + y, x)

    rows = xp.where(second, first * a.rows + b.rows, a.rows)
    return Moments(merged(a.outer, b.outer), merged(a.total, b.total), rows)


def is_finite(batch: Moments) -> bool:
    """Tell whether every feature in the batch, and its correlation, is finite; waits for a device.

    A NaN or infinity in any row shows on the diagonal of Σ z zᵀ, and a finite diagonal bounds the
    other entries, so this reads dim numbers and not the features. False too without rows.
    """
    limit = float(array_namespace(batch.outer).finfo(batch.outer.dtype).max) * UNIT
    rows = int(batch.rows)
    return rows > 0 and peak_on_host(batch.outer) / rows <= limit


def peak_on_host(matrix: Array) -> float:
    """Return `peak` as a number; waits for a device."""
    if (view := host_view(matrix)) is not None:
        return float(np.abs(view.diagonal()).max())
    return float(peak(matrix))


def peak(matrix: Array) -> Array:
    """Return the largest magnitude on the diagonal, 0-d: NaN where there is a NaN.

    It bounds all entries of a semi-definite matrix.
    """
    xp = array_namespace(matrix)
    return xp.linalg.vector_norm(xp.linalg.diagonal(matrix), ord=math.inf)


def moving_average(
    average: Array, batch_sum: Array, rho: Array, share: Array, unit: float = 1.0
) -> Array:
    """Move an average towards a batch, Eq. 19: F̂ ← rho · F̂ + (1 − rho) · E_B[f fᵀ].

    Args:
        average: F̂, or the running mean; any shape.
        batch_sum: The sum over the rows of the batch, of the same shape.
        rho: Weight of the old average in [0, 1], 0 to start at the batch; a number or 0-d.
        share: Weight of the sum, (1 − rho) over the number of rows; likewise.
        unit: What the share is to be multiplied by.

    Source: Tian, Chen, Ganguli, ICML 2021 (arXiv 2102.06810), Eq. 19.
    """
    if isinstance(share, float):
        return add_to(average * rho, batch_sum, share * unit)
    return add_product(average * rho, batch_sum, share, unit)


def rounding(mean: Array, share: Array, center: bool) -> Array:
    """Bound what rounding may have made of an eigenvalue of 0 of the correlation.

    Rounding moves each entry by at most half a unit in the last place; over a (dim, dim) matrix
    that adds up to at most √dim such units in spectral norm. Two roundings are not relative to the
    matrix itself: underflow, in the batch sum and in F̂, and the cancellation in F̂ − m mᵀ.

    Args:
        mean: Moving average of the mean, m, (dim,).
        share: Weight of the batch sum in F̂; a number or 0-d.
        center: Whether m mᵀ is subtracted.

    Returns:
        A number ≥ 0, or a 0-d array.
    """
    xp = array_namespace(mean)
    info = xp.finfo(mean.dtype)
    units = mean.shape[0] ** 0.5 * float(info.eps)
    underflow = units * float(info.smallest_normal)
    noise = share * underflow + underflow
    return noise + 2 * units * xp.max(mean * mean) if center else noise
