"""Matrices to start from, and what is measured of a course of them."""

from __future__ import annotations

import math

import numpy as np

from .equations import Array, commutator


def correlations(
    dim: int, sigma2: float, rng: np.random.Generator, isotropic: bool = False
) -> tuple[Array, Array]:
    """X and X′, (dim, dim): I and σ²I, or with eigenvalues of 0.4 to 2 times that, turned."""
    if isotropic:
        return np.eye(dim), sigma2 * np.eye(dim)
    spread = np.geomspace(0.4, 2.0, dim)
    bases = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2)]
    X, X_prime = ((basis * spread) @ basis.T for basis in bases)
    return X, sigma2 * X_prime


def random_matrix(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """A (rows, columns) matrix of normal numbers, with a spectral norm of about 1."""
    return rng.normal(size=(rows, columns)) / math.sqrt(rows + columns)


def random_symmetric(dim: int, rng: np.random.Generator) -> Array:
    """The symmetric part of such a (dim, dim) matrix."""
    matrix = random_matrix(dim, dim, rng)
    return (matrix + matrix.T) / 2


def norm(x: Array) -> Array:
    """Frobenius norms of the matrices in the last two axes."""
    norms: Array = np.linalg.norm(x, axis=(-2, -1))
    return norms


def misalignment(F: Array, W_p: Array) -> Array:
    """‖[F, W_p]‖ / (‖F‖ ‖W_p‖), (t,), of courses (t, n, n); 0 where the eigenvectors are shared."""
    return norm(commutator(F, W_p)) / (norm(F) * norm(W_p))


def integral(y: Array, x: Array) -> Array:
    """The integral from the first x to each, by the trapezoidal rule; all (m,)."""
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])


def decay_rate(times: Array, size: Array) -> float:
    """The rate of an exponential decay, fitted down to 1e-5 of its start; both (m,)."""
    seen = size > 1e-5 * size[0]
    return float(-np.polyfit(times[seen], np.log(size[seen]), 1)[0])
