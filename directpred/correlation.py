"""Statistics of the features: the moments of a batch, and their average over steps (Eq. 19).

The moments are sums over rows, so views, micro-batches and ranks merge by addition and the
correlation of a step is one of all its rows, however they were spread.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from array_api_compat import array_namespace, is_array_api_obj

from directpred.array import Array

UNIT = 2.0**-12
"""The unit of Σ z zᵀ, so that over a million rows it fits float32 where its mean does."""


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

    The sum of outer products is one matrix product, of features scaled by a power of two, which is
    exact: the product overflows only where the mean of z zᵀ is beyond 1/16 of the largest number,
    so features of 4e18 fit float32, and features of 1e-20 lose no more than the mean itself does.
    Features of another dtype are converted block by block, so that memory stays O(dim²) whatever
    the number of rows.

    Args:
        z: Features, (..., dim), real floating.
        dtype: The floating dtype to sum in.

    Returns:
        Their moments in `dtype`, on the device of z.
    """
    xp = array_namespace(z)
    dim = z.shape[-1]
    z = xp.reshape(z, (-1, dim))
    rows = z.shape[0]
    block = rows if z.dtype == dtype else max(4 * dim, 4096)
    merged: Moments | None = None
    for start in range(0, rows, block):
        n = min(block, rows - start)
        part = xp.astype(z[start : start + n, :], dtype, copy=False)
        scale = 2.0 ** -max(0, math.ceil(math.log2(n / 16) / 2))  # n · scale² ≤ 16
        scaled = part * scale if scale < 1 else part
        summed = Moments((scaled.T @ scaled) * (UNIT / scale**2), xp.sum(part, axis=0), n)
        merged = summed if merged is None else merge(merged, summed)
    assert merged is not None, "callers check that there is at least one row"
    return merged


def merge(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two sets of rows."""
    return Moments(a.outer + b.outer, a.total + b.total, a.rows + b.rows)


def is_finite(batch: Moments) -> Array:
    """Tell whether every feature in the batch, and its correlation, is finite.

    A NaN or infinity in any row shows on the diagonal of Σ z zᵀ, and a finite diagonal bounds the
    other entries, so this reads dim numbers and not the features.

    Returns:
        A 0-d boolean array: no synchronisation with a device. False too when there are no rows.
    """
    xp = array_namespace(batch.outer)
    return xp.all(xp.isfinite(xp.linalg.diagonal(batch.outer) / (batch.rows * UNIT)))


def moving_average(average: Array, batch_sum: Array, rows: Array, rho: Array) -> Array:
    """Move an average towards the mean of a batch, Eq. 19: F̂ ← rho · F̂ + (1 − rho) · E_B[f fᵀ].

    Args:
        average: F̂, or the running mean; any shape.
        batch_sum: The sum over the rows of the batch, of the same shape.
        rows: Number of rows.
        rho: Weight of the old average in [0, 1]; 0 starts the average at the batch.

    Source: Tian, Chen, Ganguli, ICML 2021 (arXiv 2102.06810), Eq. 19.
    """
    return rho * average + ((1 - rho) / rows) * batch_sum


def check_features(z: Array, dim: int) -> None:
    """Check that z can be features of a predictor.

    Args:
        z: What came as features.
        dim: The width expected.

    Raises:
        TypeError: z is no array of a known library, or not real floating.
        ValueError: z is not (..., n, dim) or has no rows.
    """
    if not is_array_api_obj(z):
        raise TypeError(f"features must be an array, got {type(z).__name__}")
    if not array_namespace(z).isdtype(z.dtype, "real floating"):
        raise TypeError(f"features must be real floating, got {z.dtype}")
    if z.ndim < 2 or z.shape[-1] != dim:
        raise ValueError(f"features must be of shape (n, {dim}), got {tuple(z.shape)}")
    if 0 in z.shape:
        raise ValueError(f"features must have at least one row, got shape {tuple(z.shape)}")


def describe_nonfinite(z: Array) -> str:
    """Say in one sentence why `is_finite` is false for features (..., dim)."""
    xp = array_namespace(z)
    rows = xp.reshape(xp.isfinite(z), (-1, z.shape[-1]))
    bad = int(xp.sum(xp.astype(~xp.all(rows, axis=1), xp.int32)))
    if bad:
        return f"features must be finite, got NaN or infinity in {bad} of {rows.shape[0]} rows"
    largest = float(xp.max(xp.abs(z)))
    return f"the correlation of the features overflows: their largest magnitude is {largest:.3g}"
