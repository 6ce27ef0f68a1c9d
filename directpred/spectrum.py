"""Rules: from the eigenvalues s of the features' correlation to the eigenvalues p of the weight.

A rule is any callable ``rule(s) -> p``. ``s`` is a (dim,) floating array of the caller's library,
in ascending order and clipped at 0, so ``s[-1]`` is the spectral norm of the correlation; ``p``
has the same shape and dtype. The weight is then ``U diag(p) Uᵀ``.

Only the shape of the spectrum matters for a cosine loss: ``p`` and ``c · p`` train alike.

A rule that can be had without eigenvectors says so to the matmul solver: its `matrix_power` is the
power of the correlation that it needs, 0.5 or 1, and `matrix` makes the weight from that. One that
depends only on the eigenvalues over the largest says so by `normalize`: the power is then that of
the correlation over its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from directpred.array import Array, array_namespace, readable
from directpred.fused import add_product, add_scaled
from directpred.matrix import positive_part
from directpred.scalars import as_bool, as_float

Rule: TypeAlias = Callable[[Array], Array]
"""Eigenvalues (dim,) of the correlation, ascending and ≥ 0, to those (dim,) of the weight."""


@dataclass(frozen=True)
class Eq18:
    """Equation 18 of the paper over the largest eigenvalue: p_j = √(s_j / s_max) + eps.

    This is what the published code computes. As a matrix function, W_p = (F̂ / ‖F̂‖)^½ + eps · I,
    whatever the scale of the features. A correlation of zero counts as s_j / s_max = 1.

    The printed equation, with `normalize=False`, is p_j = √s_j + eps · s_max. Its second term
    outgrows the first for large features, whose weight then is nearly a multiple of I.

    Source: Tian, Chen, Ganguli, ICML 2021 (arXiv 2102.06810), Eq. 18, and its published code.

    Attributes:
        eps: Boost of all eigenvalues, ≥ 0.
        normalize: Whether the eigenvalues are taken over the largest.
    """

    eps: float = 0.1
    normalize: bool = True

    def __post_init__(self) -> None:
        _require(self, "eps", lambda x: x >= 0, "≥ 0")
        _require_bool(self, "normalize")

    def __call__(self, s: Array) -> Array:
        """Map eigenvalues (dim,), ascending and ≥ 0, to those of the weight (dim,)."""
        sqrt = array_namespace(s).sqrt
        if self.normalize:
            return sqrt(_over_largest(s)) + self.eps
        return sqrt(s) + self.eps * s[-1]

    matrix_power = 0.5

    def matrix(self, powered: Array, largest: Array, eye: Array) -> Array:
        """W_p from F̂^½, ‖F̂‖ (0-d) and I, or with `normalize` from (F̂ / ‖F̂‖)^½, 1 and I."""
        if self.normalize:
            return add_scaled(powered, eye, self.eps)
        return add_product(powered, eye, largest, self.eps)


@dataclass(frozen=True)
class DirectSet:
    """DirectSet(α): p_j = s_j^α + eps · max_j s_j^α, i.e. W_p = F̂^α + eps · ‖F̂^α‖ · I.

    Source: Wang, Chen, Du, Tian, arXiv 2110.04947.

    Attributes:
        alpha: Power of the correlation, > 0. Below ½ it makes much of the rounding of small
            eigenvalues, as `directpred.DirectPred` says.
        eps: Boost of all eigenvalues, ≥ 0, relative to the largest of F̂^α.
    """

    alpha: float = 0.5
    eps: float = 0.1

    def __post_init__(self) -> None:
        _require(self, "alpha", lambda x: x > 0, "> 0")
        _require(self, "eps", lambda x: x >= 0, "≥ 0")

    def __call__(self, s: Array) -> Array:
        """Map eigenvalues (dim,), ascending and ≥ 0, to those of the weight (dim,)."""
        p = array_namespace(s).sqrt(s) if self.alpha == 0.5 else s**self.alpha
        return p + self.eps * p[-1]

    @property
    def matrix_power(self) -> float | None:
        """The power α where products alone give it, 0.5 and 1; else None."""
        return self.alpha if self.alpha in (0.5, 1) else None

    def matrix(self, powered: Array, largest: Array, eye: Array) -> Array:
        """W_p from F̂^α, ‖F̂‖ (0-d) and I; the matrices are (dim, dim)."""
        return add_product(powered, eye, largest**self.alpha, self.eps)


@dataclass(frozen=True)
class DirectCopy:
    """DirectCopy, DirectSet with α = 1: p_j = s_j + eps · max_j s_j, i.e. W_p = F̂ + eps · ‖F̂‖ · I.

    Source: Wang, Chen, Du, Tian, arXiv 2110.04947; the default eps as in Halvagal et al. 2023.

    Attributes:
        eps: Boost of all eigenvalues, ≥ 0, relative to the largest eigenvalue of F̂.
    """

    eps: float = 0.3

    def __post_init__(self) -> None:
        _require(self, "eps", lambda x: x >= 0, "≥ 0")

    def __call__(self, s: Array) -> Array:
        """Map eigenvalues (dim,), ascending and ≥ 0, to those of the weight (dim,)."""
        return s + self.eps * s[-1]

    matrix_power = 1.0

    def matrix(self, powered: Array, largest: Array, eye: Array) -> Array:
        """W_p from F̂, ‖F̂‖ (0-d) and I; the matrices are (dim, dim)."""
        return add_product(powered, eye, largest, self.eps)


@dataclass(frozen=True)
class BoostScale:
    """What the published code computes, which differs from the printed Eq. 18.

    p_j = max((s_j / s_max)^power + eps, floor), or with ``inside``
    p_j = max(s_j / s_max + eps, floor)^power. A correlation of zero counts as s_j / s_max = 1.

    Source: the trainer published with the paper, option ``boost_scale``.

    Attributes:
        eps: Boost of all eigenvalues, relative to the largest; it may be negative.
        power: Power of the normalised eigenvalues, > 0; below ½ as `alpha` of `DirectSet`.
        inside: Whether eps is added before the power is taken.
        floor: Lower bound, > 0, on the sum of the scaled eigenvalue and eps.
    """

    eps: float = 0.01
    power: float = 0.5
    inside: bool = False
    floor: float = 1e-4

    normalize = True

    def __post_init__(self) -> None:
        _require(self, "eps", lambda x: True, "a finite number")
        _require(self, "power", lambda x: x > 0, "> 0")
        _require(self, "floor", lambda x: x > 0, "> 0")
        _require_bool(self, "inside")

    def __call__(self, s: Array) -> Array:
        """Map eigenvalues (dim,), ascending and ≥ 0, to those of the weight (dim,)."""
        xp = array_namespace(s)
        scaled = _over_largest(s)
        if self.inside:
            return xp.clip(scaled + self.eps, min=self.floor) ** self.power
        return xp.clip(scaled**self.power + self.eps, min=self.floor)

    @property
    def matrix_power(self) -> float | None:
        """0.5 for that power with eps outside of it; else None.

        None too for eps < −0.3, which leaves so small a weight that the error of the products,
        which the eigenvalues before the subtraction decide, would be no small part of it; and for
        a floor of more than 1 + eps, beyond all eigenvalues.
        """
        fits = self.eps >= -0.3 and self.floor - self.eps <= 1
        return 0.5 if self.power == 0.5 and not self.inside and fits else None

    def matrix(self, powered: Array, largest: Array, eye: Array) -> Array:
        """W_p from (F̂ / ‖F̂‖)^½, 1 and I; the matrices are (dim, dim)."""
        above = self.eps - self.floor
        if above >= 0:
            return add_scaled(powered, eye, self.eps)
        return add_scaled(positive_part(add_scaled(powered, eye, above)), eye, self.floor)


RULES: tuple[type, ...] = (Eq18, DirectSet, DirectCopy, BoostScale)
"""The rules of this module, which take the arrays of any library."""


def _over_largest(s: Array) -> Array:
    """Eigenvalues (dim,), ascending and ≥ 0, over the largest; all 1 where they are all 0."""
    xp = array_namespace(s)
    if readable(s):
        top = float(s[-1])
        return s / top if top else xp.ones_like(s)
    one, zero = xp.ones_like(s), s[-1] == 0  # and not where it is NaN
    return xp.where(zero, one, s) / xp.where(zero, one[-1], s[-1])


def _require(rule: Any, name: str, holds: Callable[[float], bool], expected: str) -> None:
    """Check an option of a rule, and keep it as a number of Python, which decides no dtype."""
    value = getattr(rule, name)
    if (number := as_float(value)) is None:
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(f"{name} must be {expected}, got {value}")
    if not isinstance(value, int):
        object.__setattr__(rule, name, number)


def _require_bool(rule: Any, name: str) -> None:
    """Check a switch of a rule."""
    value = getattr(rule, name)
    if (flag := as_bool(value)) is None:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    object.__setattr__(rule, name, flag)
