"""Functions of symmetric matrices by matrix products alone.

An eigendecomposition on a GPU waits for the host and cannot be captured in a CUDA graph; a fixed
sequence of products does neither. The polynomials are derived here, not tabulated. Error of the
square root in spectral norm, relative to its own, before rounding (`root_error`):

===== ======== =======
steps products error
===== ======== =======
    3        9 7.9e-03
    4       13 2.2e-03
    5       17 6.0e-04
    6       21 1.6e-04
    7       25 4.2e-05
    8       29 1.1e-05
   10       37 7.0e-07
   12       45 4.5e-08
   14       53 3.1e-09
===== ======== =======

The solver takes 6 steps in float32, where rounding adds 1e-4, and 12 in float64.
"""

from __future__ import annotations

import math

import numpy as np
from array_api_compat import array_namespace, device

from directpred.array import Array

Quintic = tuple[float, float, float]
"""Coefficients (a, b, c) of the odd polynomial a·x + b·x³ + c·x⁵."""


def largest_eigenvalue(matrix: Array) -> Array:
    """The largest eigenvalue of a symmetric positive semi-definite matrix, without a host sync.

    The matrix A, over its largest entry and its norm, is squared m times; with B the result over
    its trace, ln λ(B) is between ln tr B² and ½ ln tr B², and the middle of the two is within
    ¼ ln dim. That error is divided by 2ᵐ on the way back to A, so it holds whatever the gaps
    between the eigenvalues, where a power iteration would stall on a cluster. From a
    trace of 1, three squarings leave at least dim⁻⁸, so only every third needs a new scale.

    Args:
        matrix: (dim, dim), float32 or float64.

    Returns:
        A 0-d array, within a relative `tolerance(matrix)` of the largest eigenvalue, and rounding;
        0 for a matrix of zeros.
    """
    xp = array_namespace(matrix)
    dim = matrix.shape[0]
    squarings = math.ceil(math.log2(max(1.0, math.log(dim) / (4 * tolerance(matrix)))))
    tiny = float(xp.finfo(matrix.dtype).smallest_normal)
    # On the diagonal, but where rounding errors are all that there is; a trace might overflow.
    top = xp.max(xp.abs(matrix))
    b = matrix / _or_one(top)
    norm = xp.linalg.matrix_norm(b) + tiny  # rounding may have made the trace negative
    b, log, power = b / norm, xp.log(norm), 1
    for m in range(1, squarings + 1):
        b, power = b @ b, 2 * power
        if m % 3 == 0 or m == squarings:
            trace = xp.linalg.trace(b) + tiny
            b, log = b / trace, log + xp.log(trace) / power
    return top * xp.exp(log + 0.75 * xp.log(xp.sum(b * b) + tiny) / power)


def square_root(matrix: Array, largest: Array) -> Array:
    """The square root of a symmetric positive semi-definite matrix by a coupled iteration.

    With x = √s for the eigenvalues s of the matrix over `largest`, odd quintics p_k are composed
    to h(x) = p_n(…p_1(x)) ≈ 1, and Y → A^½ h(A^½) without a root taken: with p(x) = x q(x²),
    Y ← Y q(Z Y) and Z ← q(Z Y) Z, from Y = A and Z = I. A step costs four products. An eigenvalue
    that is too small for h to reach 1 contributes only its own root, so the error is bounded for
    every spectrum, as in the table above.

    Source: the coupled Newton–Schulz iteration, with the minimax polynomials that Amsel et al.,
    "The Polar Express" (arXiv 2505.16932), use for the matrix sign.

    Args:
        matrix: (dim, dim), float32 or float64.
        largest: Its largest eigenvalue, as `largest_eigenvalue` gives it, 0-d.

    Returns:
        Its square root, exactly symmetric, (dim, dim), within 3e-4 (float32) or 1e-7 (float64) of
        its own norm in spectral norm.
    """
    xp = array_namespace(matrix)
    scale = _or_one(largest) * (1 + 2 * tolerance(matrix))
    eye = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix))
    *steps, (a, b, c) = _polynomials(matrix)
    y = zy = matrix / scale
    z = None
    for p, q, r in steps:
        factor = p * eye + q * zy + r * (zy @ zy)
        y = y @ factor
        z = factor if z is None else factor @ z
        zy = z @ y
    half = y @ ((a / 2) * eye + (b / 2) * zy + (c / 2) * (zy @ zy))
    root = half + half.T
    # A negative eigenvalue beyond rounding diverges: the matrix is no more than rounding errors,
    # and √x ≈ x is as good as any other function of it.
    bounded = xp.max(xp.abs(xp.linalg.diagonal(root))) < 2
    return xp.where(bounded, root, matrix / scale) * xp.sqrt(scale)


def positive_part(matrix: Array) -> Array:
    """The positive part max(A, 0) = (A + |A|) / 2 of a symmetric matrix, |A| = A sign(A).

    Args:
        matrix: (dim, dim), float32 or float64, of spectral norm at most 1 but for the error of
            `largest_eigenvalue`.

    Returns:
        (dim, dim), exactly symmetric, within 3e-4 (float32) or 1e-7 (float64) in spectral norm.
    """
    xp = array_namespace(matrix)
    eye = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix))
    sign = matrix / (1 + 4 * tolerance(matrix))  # beyond 1 the polynomials leave the interval
    for a, b, c in _polynomials(matrix):
        square = sign @ sign
        sign = sign @ (a * eye + b * square + c * (square @ square))
    half = matrix @ (0.25 * (eye + sign))
    return half + half.T


def sign_polynomials(steps: int) -> tuple[Quintic, ...]:
    """The odd quintics whose composition h is best for a square root in so many steps.

    Each is the minimax approximation of 1 on the interval on which those before it have left the
    values. The first interval is [ℓ, 1], with ℓ between the one that spends the steps on roots too
    small to matter and the one that leaves larger ones short: the least `root_error`, by a
    ternary search.
    """
    low, high = -9.0, -0.5  # of log10 ℓ
    for _ in range(22):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        if root_error(_compose(10**left, steps)) < root_error(_compose(10**right, steps)):
            high = right
        else:
            low = left
    return _compose(10**low, steps)


def root_error(polynomials: tuple[Quintic, ...]) -> float:
    """Sup |x − x h(x)| over x in [0, 1]: the error of x h(x) for the root x of an eigenvalue."""
    x = np.concatenate([np.logspace(-12, 0, 1001), np.linspace(0, 1, 1001)])
    h = x
    for a, b, c in polynomials:
        h = h * (a + b * h**2 + c * h**4)
    return float(np.max(x * np.abs(1 - h)))


def _compose(low: float, steps: int) -> tuple[Quintic, ...]:
    polynomials, high = [], 1.0
    for _ in range(steps):
        (a, b, c), error = _minimax_quintic(low / high)
        polynomials.append((a / high, b / high**3, c / high**5))
        low, high = 1 - error, 1 + error
    return tuple(polynomials)


def _minimax_quintic(low: float) -> tuple[Quintic, float]:
    """The odd quintic closest to 1 on [low, 1], and its largest deviation, by Remez' exchange."""
    if low > 0.999:  # the four points of the exchange would coincide to rounding
        a, b, c = 15 / 8, -10 / 8, 3 / 8
        return (a, b, c), abs(1 - low * (a + b * low**2 + c * low**4))
    inner = np.linspace(low, 1, 4)[1:3]
    for _ in range(50):
        x = np.array([low, *inner, 1.0])
        # p(x) = 1 ∓ error at four points with alternating sign
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        extrema = np.sqrt([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)])
        if np.max(np.abs(extrema - inner)) < 1e-13:
            break
        inner = extrema
    return (float(a), float(b), float(c)), abs(float(error))


def tolerance(matrix: Array) -> float:
    """Relative error that `largest_eigenvalue` may have in the dtype of the matrix."""
    return 5e-4 if _is_single(matrix) else 1e-8


def _is_single(matrix: Array) -> bool:
    return bool(array_namespace(matrix).finfo(matrix.dtype).bits == 32)


def _or_one(x: Array) -> Array:
    """X where it is positive, else 1: what to divide by, exact also for denormal numbers."""
    xp = array_namespace(x)
    return xp.where(x > 0, x, xp.ones_like(x))


# In float32, a seventh step would gain less in theory than it loses in rounding, which the inverse
# roots of small eigenvalues magnify; a 13th in float64 likewise. Not computed where they are used,
# because compilers would trace that.
_SINGLE, _DOUBLE = sign_polynomials(6), sign_polynomials(12)


def _polynomials(matrix: Array) -> tuple[Quintic, ...]:
    return _SINGLE if _is_single(matrix) else _DOUBLE
