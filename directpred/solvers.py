"""Solvers: from the correlation and a rule to the predictor's weight.

A solver is a pure function ``solver(correlation, rule) -> weight``: a symmetric positive
semi-definite (dim, dim) matrix to the symmetric (dim, dim) matrix U diag(rule(s)) Uᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from array_api_compat import array_namespace

from directpred.spectrum import Array, Rule

Solver: TypeAlias = Callable[[Array, Rule], Array]


def eigh(correlation: Array, rule: Rule) -> Array:
    """Solve by a symmetric eigendecomposition; any rule.

    Eigenvalues within rounding of 0 (below 8 units in the last place of the largest) count as 0:
    they are noise, and a square root would blow a noise of 1e-7 up to 3e-4.

    Args:
        correlation: Symmetric (dim, dim), float32 or float64, finite.
        rule: The spectral rule.

    Returns:
        The weight, exactly symmetric, (dim, dim), in the dtype of the correlation.

    Raises:
        ValueError: The rule returned something else than a (dim,) array.
    """
    xp = array_namespace(correlation)
    s, u = xp.linalg.eigh(correlation)
    noise = 8 * xp.finfo(s.dtype).eps * s[-1]
    p = rule(xp.where(s > noise, s, xp.zeros_like(s)))
    if getattr(p, "shape", None) != s.shape:
        raise ValueError(
            f"the rule {rule!r} must return an array of shape {tuple(s.shape)}, "
            f"got {getattr(p, 'shape', p)!r}"
        )
    half = (u * (p / 2)) @ u.T
    return half + half.T  # a matrix product alone is symmetric only to rounding


SOLVERS: dict[str, Solver] = {"eigh": eigh}
