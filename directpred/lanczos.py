"""The largest eigenvalue of a symmetric matrix on the host, with a proof.

On a CPU the squarings of `matrix.largest_eigenvalue` cost ten matrix products and more, a
Lanczos iteration some products with a vector. It may converge to the wrong eigenvalue: where its
start has no part of the top eigenvector, or hardly any. Hence the proof, without which the
eigenvalues are computed instead. All of it reads values, so it is for no tracer and no GPU.
"""

from __future__ import annotations

import math

import numpy as np

from directpred.array import Array, array_namespace, device, scipy_linalg
from directpred.matrix import tolerance

SMALL = 240
"""The dim up to which all eigenvalues cost no more than the steps of Lanczos in Python."""


def largest_eigenvalue_on_host(matrix: Array) -> Array:
    """Find the largest eigenvalue, by reading values on the host.

    Args:
        matrix: (dim, dim), float32 or float64, symmetric to rounding, on a CPU; positive
            semi-definite to rounding.

    Returns:
        A 0-d array, within a relative `tolerance(matrix)` of the largest eigenvalue, and rounding;
        0 for a matrix of zeros, NaN or infinity for one that is not finite or whose norm overflows.
    """
    xp = array_namespace(matrix)
    top = xp.max(xp.abs(matrix))
    if not 0 < float(top) < math.inf:
        return top
    a = matrix / top  # nothing over- or underflows
    largest = proven_ritz_value(a, tolerance(matrix)) if a.shape[0] > SMALL else None
    if largest is None:  # clipped, since of no more than rounding errors all may be negative
        largest = max(0.0, float((scipy_linalg(a) or xp.linalg).eigvalsh(a)[-1]))
    return top * largest


def proven_ritz_value(a: Array, tolerance: float) -> float | None:
    """Estimate the largest eigenvalue by Lanczos, where that can be proven.

    After k steps A is, in a basis whose first k vectors are those of Lanczos, [[T, B], [Bᵀ, C]]:
    T tridiagonal, B all zeros but for a row of norm β, and ‖C‖_F² = ‖A‖_F² − ‖T‖_F² − 2β². The
    largest eigenvalue θ of T is a lower bound. The largest of T with one more row, β beside the
    diagonal and ‖C‖_F on it, is an upper one, which is close where A has few large eigenvalues.
    Where it is not, a Cholesky factor of (1 + tolerance) θ I − A proves as much at the cost of a
    product. Rounding adds some units in the last place to either.

    Source: Lanczos, J. Res. Nat. Bur. Stand. 45 (1950); Parlett, The Symmetric Eigenvalue Problem.

    Args:
        a: (dim, dim), symmetric to rounding, no entry beyond ±1.
        tolerance: Largest relative error.

    Returns:
        A lower bound within the tolerance, or None where it is not proven in 8 + dim / 8 steps.
    """
    xp = array_namespace(a)
    dim = a.shape[0]
    squared_norm = float(xp.linalg.vector_norm(a)) ** 2
    v = _start(a)
    most = min(dim, 8 + dim // 8)  # a fourth of the cost of all eigenvalues
    basis = xp.empty((most, dim), dtype=a.dtype, device=device(a))
    alphas: list[float] = []
    betas: list[float] = []
    check = 4
    for k in range(1, most + 1):
        basis[k - 1, :] = v
        known = basis[:k, :]
        w = a @ v
        part = known @ w
        w = w - part @ known
        w = w - (known @ w) @ known  # once leaves rounding, which may be all of a small w
        alphas.append(float(part[-1]))
        betas.append(beta := float(w @ w) ** 0.5)
        exhausted = beta <= 1e-6 * tolerance**0.5 * abs(alphas[0])
        if exhausted or k in (check, most):
            check += 2 + k // 4
            ritz, vectors = np.linalg.eigh(_tridiagonal(alphas, betas[:-1]))
            theta, residual = float(ritz[-1]), beta * abs(float(vectors[-1, -1]))
            # An eigenvalue is within the residual of θ; by its square over the gap, closer still.
            gap = theta - float(ritz[-min(k, 2)])
            if exhausted or residual**2 <= 0.1 * tolerance * theta * max(gap, residual):
                break
        v = w / beta
    else:
        return None
    bound = (1 + tolerance) * theta
    squares = sum(x * x for x in alphas) + 2 * sum(x * x for x in betas)
    rest = max(squared_norm - squares, 0) ** 0.5
    if float(np.linalg.eigvalsh(_tridiagonal([*alphas, rest], betas))[-1]) <= bound:
        return theta
    return theta if _has_cholesky_factor(bound * xp.eye(dim, dtype=a.dtype) - a) else None


def _start(a: Array) -> Array:
    """A unit vector to start from, (dim,).

    It is the sum of the row of the largest diagonal entry, which points where the large eigenvalues
    are, and of the cosines of growing steps, which point everywhere.
    """
    xp = array_namespace(a)
    row = a[int(xp.argmax(xp.linalg.diagonal(a))), :]
    everywhere = xp.cos(xp.astype(xp.arange(a.shape[0], device=device(a)), a.dtype) ** 2)
    v = everywhere + row * (a.shape[0] ** 0.5 / (float(xp.linalg.vector_norm(row)) or 1))
    return v / xp.linalg.vector_norm(v)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> np.ndarray:
    """The lower half of it, which is all that NumPy reads."""
    return np.diag(diagonal) + np.diag(beside, -1)


def _has_cholesky_factor(matrix: Array) -> bool:
    linalg = scipy_linalg(matrix) or array_namespace(matrix).linalg
    try:
        linalg.cholesky(matrix)
    except (RuntimeError, ValueError):  # of PyTorch and of NumPy; the standard names no error
        return False
    return True
