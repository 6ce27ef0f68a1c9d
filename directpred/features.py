"""What features may be: the checks before any state changes, and their messages."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, is_pydata_sparse_array

from directpred.array import Array, array_namespace, is_real_floating, is_torch
from directpred.scalars import as_int

WAYS = ("toarray", "todense", "to_numpy", "numpy")
"""Methods by which what is no array here gives one."""


def check_dim(dim: Any) -> int:
    """Return dim as an integer of Python, or raise where it is no positive one."""
    if (number := as_int(dim)) is None:
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if number < 1:
        raise ValueError(f"dim must be ≥ 1, got {dim}")
    return number


def check_features(z: Array, dim: int, empty: bool = False) -> None:
    """Check that z can be features of a predictor.

    Args:
        z: What came as features.
        dim: The width expected.
        empty: Whether no rows are rows too.

    Raises:
        TypeError: z is no array of a known library, sparse, masked, or not real floating.
        ValueError: z is not (..., n, dim) or has no rows.
    """
    if is_torch(z):
        if z.layout != sys.modules["torch"].strided:
            raise TypeError(f"features must be dense, got {z.layout}: pass z.to_dense()")
    elif not is_array_api_obj(z) or is_pydata_sparse_array(z):
        cure = next((f"z.{way}()" for way in WAYS if hasattr(z, way)), "numpy.asarray(z)")
        raise TypeError(f"features must be an array, got {type(z).__name__}: pass {cure}")
    elif isinstance(z, np.ma.MaskedArray):
        raise TypeError(
            f"features must have no mask, got {type(z).__name__}: pass the rows that are whole, "
            "numpy.ma.compress_rows(z), or z.filled(value)"
        )
    if not is_real_floating(z):
        raise TypeError(f"features must be real floating, got {z.dtype}")
    if z.ndim < 2 or z.shape[-1] != dim:
        raise ValueError(f"features must be of shape (n, {dim}), got {tuple(z.shape)}")
    if 0 in z.shape and not empty:
        raise ValueError(f"features must have at least one row, got shape {tuple(z.shape)}")


def describe_nonfinite(z: Array) -> str:
    """Say in one sentence why features (..., dim) have no finite correlation."""
    xp = array_namespace(z)
    rows = xp.reshape(xp.isfinite(z), (-1, z.shape[-1]))
    bad = int(xp.sum(xp.astype(~xp.all(rows, axis=1), xp.int32)))
    if bad:
        return f"features must be finite, got NaN or infinity in {bad} of {rows.shape[0]} rows"
    largest = float(xp.max(xp.abs(z)))
    return f"the correlation of the features overflows: their largest magnitude is {largest:.3g}"
