"""Functions of symmetric matrices by matrix products alone.

An eigendecomposition on a GPU waits for the host and cannot be captured in a CUDA graph; a fixed
sequence of products does neither. The polynomials are derived here, not tabulated. Error of the
square root in spectral norm, relative to its own, before rounding (`root_error`); two products more
are shared with the largest eigenvalue:

===== ======== =======
steps products error
===== ======== =======
    2        5 1.3e-02
    3       10 2.2e-03
    4       15 3.4e-04
    5       20 5.3e-05
    6       25 7.8e-06
    7       30 1.1e-06
    8       35 1.6e-07
    9       40 2.3e-08
   10       45 3.3e-09
===== ======== =======

The solver takes 4 steps in float32, where rounding adds about 2e-4, and 9 in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from directpred.array import Array, array_namespace, device
from directpred.fused import (
    Operand,
    add_product,
    add_scaled,
    matmul,
    operand,
    rough_square,
    scaled_matmul,
)

Polynomial: TypeAlias = tuple[float, ...]
"""Coefficients of an odd polynomial, of the powers `FIRST` or `LATER` of x."""

FIRST, LATER = (1, 3, 5, 9), (1, 3, 5, 7, 9)
"""The powers of the first polynomial, which takes A² and A⁴ as it finds them, and of the others."""

MARGIN = 1.002
"""How far above an upper bound of its norm a matrix is scaled: more than rounding can take away."""


class Powers(NamedTuple):
    """A symmetric positive semi-definite matrix over its largest entry, and what both uses share.

    Attributes:
        top: The largest magnitude of an entry, 0-d; 0 for a matrix of zeros.
        one: The matrix over `top`, B, (dim, dim), of norm ≥ 1; the identity for one of zeros.
        two: B².
        four: B⁴.
        norm: Its Frobenius norm, 0-d.
        eye: The identity.
    """

    top: Array
    one: Array
    two: Array
    four: Array
    norm: Array
    eye: Array


def powers(matrix: Array, eye: Array) -> Powers:
    """Scale a symmetric positive semi-definite matrix and square it twice.

    Args:
        matrix: (dim, dim), float32 or float64.
        eye: The identity, likewise.
    """
    xp = array_namespace(matrix)
    # The largest entry is on the diagonal, but not where rounding errors are all that there is.
    top = xp.linalg.vector_norm(matrix, ord=math.inf)
    zero = top == 0  # and not where it is NaN
    one = xp.where(zero, eye, matrix) / xp.where(zero, eye[0, 0], top)
    half = operand(one)
    two = matmul(half, half)
    half = operand(two)
    four = matmul(half, half)
    return Powers(top, one, two, four, xp.linalg.vector_norm(four), eye)


def largest_eigenvalue(a: Powers) -> Array:
    """Find the largest eigenvalue of B by squarings, without a synchronisation with the host.

    B⁴ is squared on, up to B^(2ᵐ). The Frobenius norm of that is between its largest eigenvalue
    and √dim of it, so the middle of the bounds is within ¼ ln dim of the logarithm; on the way back
    to B that error is divided by 2ᵐ. It holds whatever the gaps between the eigenvalues, where a
    power iteration would stall on a cluster. From a largest entry of 1, k squarings leave one of at
    least 1 / dim and at most dim^(2ᵏ − 1), so a new scale is needed only before that overflows.

    Args:
        a: The powers of the matrix; its own largest eigenvalue is `a.top` times that of B.

    Returns:
        A 0-d array, within a relative `tolerance` of the largest eigenvalue, and rounding.
    """
    xp, dim = array_namespace(a.four), a.four.shape[0]
    middle = 0.25 * math.log(dim)
    last = max(3, math.ceil(math.log2(max(1.0, middle / tolerance(a.four)))))
    digits = math.log2(float(xp.finfo(a.four.dtype).max))
    every = int(math.log2(1 + digits / math.log2(max(2, dim))))
    b, tops = a.four, []
    for m in range(3, last + 1):
        b = rough_square(b)
        if m % every == 0 or m == last:
            top = xp.linalg.vector_norm(b, ord=math.inf)
            b = b / top
            tops.append((m, top))
    value, power = xp.linalg.vector_norm(b) * math.exp(-middle), last
    for m, top in reversed(tops):
        value = (value if m == power else value**2.0 ** (m - power)) * top
        power = m
    return value**2.0**-power


def square_root(a: Powers) -> tuple[Array, Array]:
    """Take the square root of B by a coupled iteration.

    With x = √s for the eigenvalues s of B over a bound of its norm, odd polynomials p_k are
    composed to h(x) = p_n(…p_1(x)) ≈ 1, and Y → A^½ h(A^½) without a root taken: with
    p(x) = x q(x²), Y ← Y q(Z Y) and Z ← q(Z Y) Z, from Y = A and Z = I. A later step costs five
    products. An eigenvalue that is too small for h to reach 1 contributes only its own root, so the
    error is bounded for every spectrum, as in the table above.

    Source: the coupled Newton–Schulz iteration, with minimax polynomials as Amsel et al., "The
    Polar Express" (arXiv 2505.16932), use for the matrix sign.

    Args:
        a: The powers of the matrix.

    Returns:
        R, exactly symmetric, (dim, dim), and c, 0-d: R / √c is the square root of B, within 6e-4
        (float32) or 1e-7 (float64) of its own norm in spectral norm.
    """
    xp = array_namespace(a.one)
    first, *later, last = _steps(a.one)
    inverse = a.norm**-0.5  # √ of it is at most 1 / ‖B‖
    scale = xp.sqrt(inverse)
    unit = a.one * scale
    z = add_product(a.two, a.four, inverse, first.inner / first.square)
    z = operand(add_product(add_scaled(unit, a.eye, first.outer), z, inverse, first.square))
    y = operand(matmul(operand(unit), z))
    for step in later:
        q = _factor(matmul(z, y), a.eye, step)
        y, z = operand(matmul(y, q, step.y)), operand(matmul(q, z, step.z))
    half = matmul(y, _factor(matmul(z, y), a.eye, last), last.y * MARGIN**0.5 / 2)
    root = half + half.T
    # A negative eigenvalue beyond rounding diverges: the matrix is no more than rounding errors,
    # and √x ≈ x is as good as any other function of it.
    bounded = xp.linalg.vector_norm(xp.linalg.diagonal(root), ord=math.inf) < 2
    return xp.where(bounded, root, unit), scale


class Step(NamedTuple):
    """A polynomial x q(x²) of the coupled iteration, as its products take it.

    q is divided by one of its coefficients, and in the variable that the step before has left, so
    that no product needs a scaling of its own: q(M) ∝ M + outer · I + product · M² (M + inner · I +
    square · M²). Of the first step, q(B) ∝ B + outer · I + square · B² + inner · B⁴.

    Attributes:
        outer, inner, square, product: As above.
        y, z: What the products of Y and of Z with q are multiplied by.
    """

    outer: float
    inner: float
    square: float
    product: float = 0.0
    y: float = 1.0
    z: float = 1.0


def coupled_steps(polynomials: tuple[Polynomial, ...]) -> tuple[Step, ...]:
    """Prepare polynomials for `square_root`."""
    (a, b, c, e), *later = polynomials
    k = 1 / MARGIN  # Y, Z and Z Y are those of A = k B, and Y is left k² b, Z k b times too small
    steps, y, z = [Step(a / (b * k), e * k**3 / b, c * k / b)], k * k * b, k * b
    for a, b, c, d, e in later:
        m = y * z
        product = d * m * m / b
        steps.append(Step(a / (b * m), c / (d * m), e * m / d, product, y * b * m, z * b * m))
        y = z = 1.0
    return tuple(steps)


def _factor(m: Array, eye: Array, step: Step) -> Operand:
    """The factor q(M) of a step, for products."""
    wide = operand(m)
    square = matmul(wide, wide)
    inner = add_scaled(add_scaled(m, eye, step.inner), square, step.square)
    outer = add_scaled(m, eye, step.outer)
    return operand(matmul(operand(square), operand(inner), step.product, outer))


def positive_part(matrix: Array) -> Array:
    """Take the positive part max(A, 0) = (A + |A|) / 2 of a symmetric matrix, |A| = A sign(A).

    Args:
        matrix: (dim, dim), float32 or float64, of spectral norm at most 1 but for the error of
            `largest_eigenvalue`.

    Returns:
        (dim, dim), exactly symmetric, within 3e-4 (float32) or 1e-7 (float64) in spectral norm.
    """
    xp = array_namespace(matrix)
    eye = xp.eye(matrix.shape[0], dtype=matrix.dtype, device=device(matrix))
    first, *later = _SINGLE if _is_single(matrix) else _DOUBLE
    sign = matrix / (1 + 4 * tolerance(matrix))  # beyond 1 the polynomials leave the interval
    for a, b, c, d, e in ((*first[:3], 0.0, first[3]), *later):
        square = scaled_matmul(sign, sign, 1.0)
        fourth = scaled_matmul(square, square, 1.0)
        inner = scaled_matmul(fourth, c * eye + d * square + e * fourth, 1.0)
        sign = scaled_matmul(sign, a * eye + b * square + inner, 1.0)
    half = scaled_matmul(matrix, eye + sign, 0.25)
    return half + half.T


def sign_polynomials(steps: int, low: float | None = None) -> tuple[Polynomial, ...]:
    """Derive the odd polynomials whose composition is best for a square root in so many steps.

    Each is the minimax approximation of 1 on the interval on which those before it have left the
    values. The first interval is [ℓ, 1], with ℓ between the one that spends the steps on roots too
    small to matter and the one that leaves larger ones short.

    Args:
        steps: How many, ≥ 1.
        low: ℓ; by default that of the least `root_error`, found by a ternary search.
    """
    if low is not None:
        return _compose(low, steps)
    left, right = -9.0, -0.5  # of log10 ℓ
    for _ in range(22):
        a, b = (2 * left + right) / 3, (left + 2 * right) / 3
        if root_error(_compose(10**a, steps)) < root_error(_compose(10**b, steps)):
            right = b
        else:
            left = a
    return _compose(10**left, steps)


def root_error(polynomials: tuple[Polynomial, ...]) -> float:
    """Sup |x − x h(x)| over x in [0, 1]: the error of x h(x) for the root x of an eigenvalue."""
    x = np.concatenate([np.logspace(-12, 0, 1001), np.linspace(0, 1, 1001)])
    h = x
    for step, coefficients in enumerate(polynomials):
        h = _evaluate(coefficients, h, LATER if step else FIRST)
    return float(np.max(x * np.abs(1 - h)))


def _compose(low: float, steps: int) -> tuple[Polynomial, ...]:
    polynomials, high = [], 1.0
    for step in range(steps):
        exponents = LATER if step else FIRST
        coefficients, error = _minimax(low / high, exponents)
        pairs = zip(coefficients, exponents, strict=True)
        polynomials.append(tuple(c / high**p for c, p in pairs))
        low, high = 1 - error, 1 + error
    return tuple(polynomials)


def _minimax(low: float, exponents: tuple[int, ...]) -> tuple[Polynomial, float]:
    """The polynomial of these powers closest to 1 on [low, 1], and its largest deviation.

    By Remez' exchange: at one point more than it has coefficients it deviates as far, alternately
    up and down. Between the ends of the interval these points are where its derivative is 0.
    """
    if low > 0.97 and exponents == LATER:  # the points would coincide to rounding: Taylor at 1
        taylor = tuple(c / 128 for c in (315, -420, 378, -180, 35))
        return taylor, abs(1 - _evaluate(taylor, low, exponents))
    powers, terms = np.array(exponents), len(exponents)
    points = low + (1 - low) * (1 - np.cos(np.pi * np.arange(terms + 1) / terms)) / 2
    for _ in range(50):
        system = np.column_stack([points[:, None] ** powers, (-1.0) ** np.arange(terms + 1)])
        *coefficients, error = np.linalg.solve(system, np.ones(terms + 1))
        derivative = np.zeros(powers[-1] // 2 + 1)  # in x², from the highest power on
        derivative[-1 - powers // 2] = coefficients * powers
        squares = np.roots(derivative)
        inner = np.sqrt(np.sort(squares[(squares.imag == 0) & (squares.real > 0)].real))
        if len(inner) != terms - 1 or np.max(np.abs(inner - points[1:-1])) < 1e-12:
            break
        points = np.array([low, *inner, 1.0])
    return tuple(map(float, coefficients)), abs(float(error))


def _evaluate(coefficients: Polynomial, x: Any, exponents: tuple[int, ...]) -> Any:
    return sum(c * x**p for c, p in zip(coefficients, exponents, strict=True))


def tolerance(matrix: Array) -> float:
    """Relative error that `largest_eigenvalue` may have in the dtype of the matrix."""
    return 5e-4 if _is_single(matrix) else 1e-8


def _is_single(matrix: Array) -> bool:
    return bool(array_namespace(matrix).finfo(matrix.dtype).bits == 32)


# The best ℓ of the search, which takes too long at import. In float32 a fifth step would gain less
# in theory than it loses in rounding, which the inverse roots of small eigenvalues magnify; a tenth
# in float64 likewise. Not computed where they are used, because compilers would trace that.
_SINGLE, _DOUBLE = sign_polynomials(4, 2.687e-3), sign_polynomials(9, 2.812e-7)
_SINGLE_STEPS, _DOUBLE_STEPS = coupled_steps(_SINGLE), coupled_steps(_DOUBLE)


def _steps(matrix: Array) -> tuple[Step, ...]:
    return _SINGLE_STEPS if _is_single(matrix) else _DOUBLE_STEPS
