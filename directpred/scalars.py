"""Options that are numbers: of any library, kept as Python's, which decide no dtype."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np


def as_float(value: Any) -> float | None:
    """Return a real number or a 0-d array of one as a float of Python; None for anything else."""
    if not (isinstance(value, Real) or getattr(value, "shape", None) == ()):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf")
    except (TypeError, ValueError):  # complex, text, traced
        return None


def as_int(value: Any) -> int | None:
    """Return a whole number as an int of Python; None for anything else, a bool too."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_bool(value: Any) -> bool | None:
    """Return True or False, also NumPy's, as Python's; None for anything else."""
    return bool(value) if isinstance(value, bool | np.bool_) else None
