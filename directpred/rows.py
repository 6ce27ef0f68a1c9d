"""Rows of an array over their norm, at any scale and with a gradient."""

from __future__ import annotations

from directpred.array import Array, array_namespace, as_features, detached, is_double


def at_least_float32(x: Array) -> Array:
    """Return an array in float32 where it is in half precision or less, else as it is."""
    xp = array_namespace(x)
    x = as_features(x)
    return x if is_double(x) else xp.astype(x, xp.float32, copy=False)


def normalised(x: Array) -> Array:
    """Divide each row by its norm; rows of zeros stay zeros, and have no gradient.

    A row is divided by its largest number first, so that no square over- or underflows. That number
    is a constant for differentiation, which changes no gradient: a row and its multiples give one.

    Args:
        x: (..., dim), float32 or float64.
    """
    xp = array_namespace(x)
    top = xp.max(xp.abs(detached(x)), axis=-1, keepdims=True)
    x = xp.where(top == 0, xp.zeros_like(x), x) / or_one(top)
    return x / xp.sqrt(or_one(xp.sum(x * x, axis=-1, keepdims=True)))


def or_one(x: Array) -> Array:
    """Numbers ≥ 0 to divide by: with 1 for 0."""
    xp = array_namespace(x)
    return xp.where(x == 0, xp.ones_like(x), x)
