"""What to watch while training: alignment of the predictor, effective rank, collapse."""

from __future__ import annotations

from array_api_compat import array_namespace

from directpred.array import Array
from directpred.rows import at_least_float32, normalised, or_one


def alignment(weight: Array, correlation: Array) -> Array:
    """How far each eigenvector of the correlation is mapped onto itself by the predictor.

    For eigenvectors u_j of F: cos∠(u_j, W u_j) = u_jᵀ W u_j / ‖W u_j‖; 1 where u_j is an
    eigenvector of W with a positive eigenvalue, −1 with a negative one, and 0 where W u_j = 0. All
    of them at ±1 is the eigenspace alignment of the paper's Theorem 3. The predictor acts as
    z @ weight, so pass the transpose of the weight of a `torch.nn.Linear`.

    Args:
        weight: The predictor W, (dim, dim), floating, of any scale.
        correlation: F, symmetric (dim, dim), likewise.

    Returns:
        The cosines (dim,), in ascending order of the eigenvalues of F.
    """
    xp = array_namespace(weight, correlation)
    u = xp.linalg.eigh(_over_largest(correlation))[1]
    mapped = u.T @ _over_largest(weight)
    return xp.clip(xp.sum(u.T * normalised(mapped), axis=-1), min=-1.0, max=1.0)


def effective_rank(correlation: Array) -> Array:
    """Number of directions that the features fill: exp of the entropy of the spectrum.

    With s̄_j = s_j / Σ s: exp(−Σ s̄_j log s̄_j), between 1 and dim; 0 for a correlation of zero.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, there on singular values.

    Args:
        correlation: Symmetric positive semi-definite (dim, dim), floating, of any scale.

    Returns:
        A 0-d array.
    """
    xp = array_namespace(correlation)
    s = xp.clip(xp.linalg.eigvalsh(_over_largest(correlation)), min=0.0)
    total = xp.sum(s)
    share = s / or_one(total)
    entropy = -xp.sum(share * xp.log(or_one(share)))
    return xp.exp(entropy) * xp.astype(total > 0, s.dtype)


def spread(z: Array) -> Array:
    """Spread of the normalised outputs: std × √dim of rows of norm 1, the mean over dimensions.

    About 1 where the directions of the rows are isotropic, 0 where they have all collapsed to one.
    Source: Chen and He, "Exploring simple Siamese representation learning", CVPR 2021.

    Args:
        z: Outputs, (..., dim), floating, of any scale. Rows of zeros count as zero.

    Returns:
        A 0-d array.
    """
    xp = array_namespace(z)
    dim = z.shape[-1]
    z = normalised(at_least_float32(xp.reshape(z, (-1, dim))))
    return xp.mean(xp.std(z, axis=0)) * dim**0.5


def _over_largest(matrix: Array) -> Array:
    """A matrix over its largest number, so that nothing made of it over- or underflows."""
    xp, matrix = array_namespace(matrix), at_least_float32(matrix)
    return matrix / or_one(xp.max(xp.abs(matrix)))
