"""What features may be: the checks before any state changes, and their messages."""

from __future__ import annotations

from array_api_compat import is_array_api_obj

from directpred.array import Array, array_namespace, is_torch


def check_dim(dim: int) -> int:
    """Return dim, or raise where it is no positive integer."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if dim < 1:
        raise ValueError(f"dim must be ≥ 1, got {dim}")
    return dim


def check_features(z: Array, dim: int, empty: bool = False) -> None:
    """Check that z can be features of a predictor.

    Args:
        z: What came as features.
        dim: The width expected.
        empty: Whether no rows are rows too.

    Raises:
        TypeError: z is no array of a known library, or not real floating.
        ValueError: z is not (..., n, dim) or has no rows.
    """
    if not (is_torch(z) or is_array_api_obj(z)):
        raise TypeError(f"features must be an array, got {type(z).__name__}")
    if not array_namespace(z).isdtype(z.dtype, "real floating"):
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
