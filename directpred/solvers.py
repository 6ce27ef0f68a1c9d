"""Solvers: from the correlation and a rule to the predictor's weight.

A solver is a pure function ``solver(correlation, rule, noise) -> weight``: a symmetric positive
semi-definite (dim, dim) matrix to the symmetric (dim, dim) matrix U diag(rule(s)) Uᵀ. ``noise`` is
what rounding may have made of an eigenvalue of 0, beyond the rounding of the matrix itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, cast

from directpred.array import (
    Array,
    array_namespace,
    converted,
    device,
    host_view,
    is_plain,
    is_torch,
    on_host,
    scipy_linalg,
)
from directpred.fused import add_product, add_transposed, both, scaled_matmul
from directpred.lanczos import largest_eigenvalue_on_host
from directpred.matrix import largest_eigenvalue, powers, square_root
from directpred.spectrum import RULES, Rule

Solver: TypeAlias = Callable[[Array, Rule, Array], Array]
SolverName: TypeAlias = Literal["auto", "eigh", "matmul"]


def eigh(correlation: Array, rule: Rule, noise: Array = 0.0) -> Array:
    """Solve by a symmetric eigendecomposition; any rule.

    Eigenvalues within rounding of 0 (below 8 units in the last place of the largest, and `noise`)
    count as 0: a square root would blow a noise of 1e-7 up to 3e-4. In float32, with the rounding
    of the matrix, an eigenvalue is then within 4e-6 of the largest.

    Args:
        correlation: Symmetric (dim, dim), float32 or float64, finite.
        rule: The spectral rule.
        noise: Absolute error of the eigenvalues, ≥ 0, a number or 0-d.

    Returns:
        The weight, exactly symmetric, (dim, dim), in the dtype of the correlation.

    Raises:
        TypeError: The rule returned an array of another library, or not of real numbers.
        ValueError: The rule returned something else than a (dim,) array.
    """
    # On a host LAPACK takes it by columns, and is fastest on the upper triangle.
    if scipy := scipy_linalg(correlation):
        s, u = scipy.eigh(correlation.T, lower=False, driver="evd", check_finite=False)
    elif is_torch(correlation) and on_host(correlation):
        s, u = sys.modules["torch"].linalg.eigh(correlation.T, UPLO="U")
    else:
        s, u = array_namespace(correlation).linalg.eigh(correlation)
    p = _eigenvalues(s, rule, noise)
    if getattr(p, "shape", None) != s.shape:
        raise ValueError(
            f"the rule {rule!r} must return an array of shape {tuple(s.shape)}, "
            f"got {getattr(p, 'shape', p)!r}"
        )
    p = converted(p, s, rule)
    # A matrix product alone is symmetric only to rounding.
    return add_transposed(scaled_matmul(u * p[None, :], u.T, 0.5))


def _eigenvalues(s: Array, rule: Rule, noise: Array) -> Array:
    """Return rule(s), where eigenvalues within rounding of 0 count as 0.

    Where the largest overflows they become NaN.
    """
    units = 8 * float(array_namespace(s).finfo(s.dtype).eps)
    if (view := host_view(s)) is None:
        xp = array_namespace(s)
        return rule(xp.where(s > s[-1] * units + noise, s, s * 0.0))
    top = float(view[-1])
    if not view[0] > (limit := top * units + float(noise)):  # written: they are of nobody else
        view[view <= limit] = 0.0 if math.isfinite(top) else math.nan
    if view is not s and type(rule) in RULES:
        # On a few numbers NumPy is several times faster than PyTorch.
        return sys.modules["torch"].from_numpy(rule(view))
    return rule(s)


def matmul(correlation: Array, rule: Rule, noise: Array = 0.0) -> Array:
    """Solve by a fixed number of matrix products; rules that have a `matrix_power`.

    No host synchronisation, so it can be captured in a CUDA graph. The error is at most 1e-3 of
    ‖W_p‖ in spectral norm in float32, whatever the spectrum, and 2e-7 in float64. Noise enters as
    a ridge under the square root, which diverges for negative eigenvalues.

    Args:
        correlation: Symmetric (dim, dim), float32 or float64, finite.
        rule: A rule for which `solvable_by_matmul` holds.
        noise: As for `eigh`.

    Returns:
        The weight, exactly symmetric, (dim, dim), in the dtype of the correlation.
    """
    xp = array_namespace(correlation)
    form = cast(MatrixRule, rule)
    eye = xp.eye(correlation.shape[0], dtype=correlation.dtype, device=device(correlation))
    if form.matrix_power == 1:
        a = powers(correlation, eye)
        powered = (correlation + correlation.T) / 2  # a product is symmetric only to rounding
        return form.matrix(powered, a.top * largest_eigenvalue(a), eye)
    a = powers(add_product(correlation, eye, noise), eye)
    (root, scale), largest = both(lambda: square_root(a), lambda: largest_eigenvalue(a), like=eye)
    if getattr(form, "normalize", False):
        return form.matrix(root * (scale * largest) ** -0.5, 1.0, eye)
    return form.matrix(root * xp.sqrt(a.top / scale), a.top * largest, eye)


class MatrixRule(Protocol):
    """A rule that can be had without eigenvectors, as `directpred.spectrum` says."""

    @property
    def matrix_power(self) -> float | None:
        """Power of the correlation that `matrix` takes: 0.5 or 1; None for no way."""

    def matrix(self, powered: Array, largest: Array, eye: Array) -> Array:
        """The weight from that power of F̂, ‖F̂‖ and I; of F̂ / ‖F̂‖ if the rule has `normalize`."""


def solvable_by_matmul(rule: Rule) -> bool:
    """Tell whether the matmul solver can take the rule."""
    return getattr(rule, "matrix_power", None) in (0.5, 1)


def auto(correlation: Array, rule: Rule, noise: Array = 0.0) -> Array:
    """Solve by the faster of the two for the rule, the device and the dim.

    On a CPU an eigendecomposition costs less than the products of a square root; on a GPU, where
    it waits for the host, far more. A rule that needs no root never pays for one: on a CPU it takes
    no more than the largest eigenvalue.

    Args:
        correlation: As the solvers.
        rule: As the solvers.
        noise: As the solvers.

    Returns:
        As the solvers.
    """
    host, form = on_host(correlation), cast(MatrixRule, rule)
    if not solvable_by_matmul(rule) or (host and form.matrix_power != 1):
        return eigh(correlation, rule, noise)
    if not (host and is_plain(correlation)):
        return matmul(correlation, rule, noise)
    xp = array_namespace(correlation)
    eye = xp.eye(correlation.shape[0], dtype=correlation.dtype, device=device(correlation))
    symmetric = (correlation + correlation.T) / 2
    return form.matrix(symmetric, largest_eigenvalue_on_host(correlation), eye)


SOLVERS: dict[str, Solver] = {"auto": auto, "eigh": eigh, "matmul": matmul}
