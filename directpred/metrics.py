"""What to watch while training: alignment of the predictor, effective rank, collapse."""

from __future__ import annotations

import math

from array_api_compat import array_namespace, is_array_api_obj

from directpred.array import Array, detached, is_real_floating, is_torch, undisturbed
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
    return _effective_rank(xp.linalg.eigvalsh(_over_largest(correlation)))


def _effective_rank(eigenvalues: Array) -> Array:
    xp = array_namespace(eigenvalues)
    s = xp.clip(eigenvalues, min=0.0)
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


def diagnose(z: Array) -> dict[str, float]:
    """Measure outputs: have their rows collapsed to one, or to a few directions?

    All figures but the norm are free of the outputs' scale, and 0 where all outputs are 0. It reads
    numbers, so on a GPU it waits for the device.

    Args:
        z: Outputs, (..., dim), real floating, of any array library; half precision is measured in
            float32. Any leading axes count as rows. n rows show an effective rank of at most n, and
            one row alone a spread of 0.

    Returns:
        ``spread``: As the function `spread`: 0 where all rows are alike, about 1 where their
            directions are isotropic.
        ``effective_rank``: That of the correlation of the rows, E[z zᵀ], from 1 to dim.
        ``leading_share``: Share of its largest eigenvalue in their sum, from 1 / dim to 1.
        ``norm``: Mean length of a row.

    Raises:
        TypeError: z is not real floating.
        ValueError: z holds NaN or infinity, or no numbers at all.
    """
    z, scale = _scaled(z, "outputs")
    xp, dim = array_namespace(z), z.shape[-1]
    z = xp.reshape(z, (-1, dim))
    rows = z.shape[0]
    with undisturbed(z):  # of the two with the same eigenvalues the smaller matrix
        gram = (z.T @ z if rows > dim else z @ z.T) / rows
    norm = float(xp.mean(xp.linalg.vector_norm(z, axis=1)))
    return {"spread": float(spread(z)), **_filled(xp.linalg.eigvalsh(gram)), "norm": norm * scale}


def diagnostics(weight: Array, correlation: Array, mean: Array) -> dict[str, float]:
    """Measure the state of a predictor: what its features fill, and what it makes of them.

    The names mean what they mean in `diagnose`, of the average over steps in place of a batch. It
    reads numbers, so on a GPU it waits for the device. Before the first step, when F̂ is 0 and the
    weight the identity, all is 0 but the condition, which is 1.

    Args:
        weight: The predictor W_p, (dim, dim).
        correlation: F̂, uncentred, symmetric (dim, dim).
        mean: Moving average of the features' mean, (dim,).

    Returns:
        ``spread``: √dim times the mean over dimensions of the standard deviation √(F̂_jj − m_j²),
            over the root mean square norm: that of `spread` where all rows have one norm.
        ``effective_rank``, ``leading_share``: Those of F̂.
        ``condition``: Largest over smallest singular value of the weight. A weight that is singular
            to rounding has 1 over the epsilon of its dtype; one of zero, 0.
        ``norm``: Root mean square norm of the features, √(tr F̂).
        ``alignment``: Mean of the function `alignment` over the eigenvectors of F̂ with an
            eigenvalue above rounding: 1 where weight and F̂ share them, as after a step they do.

    Raises:
        TypeError: One of them is not real floating.
        ValueError: One of them holds NaN or infinity.
    """
    correlation, square = _scaled(correlation, "the correlation")
    weight, _ = _scaled(weight, "the weight")
    mean, unit = _scaled(mean, "the mean")
    xp, dim, dtype = array_namespace(correlation), correlation.shape[-1], correlation.dtype
    second = xp.linalg.diagonal(correlation)
    first = mean * (unit / math.sqrt(square))
    deviations = xp.sqrt(xp.clip(second - xp.astype(first * first, dtype), min=0.0))
    rms = math.sqrt(max(0.0, float(xp.sum(second))))
    with undisturbed(correlation):
        s = xp.linalg.eigvalsh(correlation)
        cosines = alignment(xp.astype(weight, dtype), correlation)
    singular = xp.linalg.svdvals(weight)
    largest, smallest = float(xp.max(singular)), float(xp.min(singular))
    epsilon = float(xp.finfo(weight.dtype).eps)
    shown = xp.astype(s > dim * epsilon * s[-1], dtype)
    return {
        "spread": dim**0.5 * float(xp.mean(deviations)) / rms if rms else 0.0,
        **_filled(s),
        "condition": largest / max(smallest, epsilon * largest) if largest else 0.0,
        "norm": rms * math.sqrt(square),
        "alignment": float(xp.sum(cosines * shown)) / max(1.0, float(xp.sum(shown))),
    }


def _filled(eigenvalues: Array) -> dict[str, float]:
    """Effective rank and leading share of eigenvalues, ascending, of a correlation."""
    xp = array_namespace(eigenvalues)
    s = xp.clip(eigenvalues, min=0.0)
    total = float(xp.sum(s))
    return {
        "effective_rank": float(_effective_rank(s)),
        "leading_share": float(s[-1]) / total if total else 0.0,
    }


def _scaled(x: Array, what: str) -> tuple[Array, float]:
    """Scale an array by a power of 4, exactly, so that its largest magnitude is from 1 to 4.

    Denormal numbers stay below that, and zeros what they are.

    Args:
        x: Real floating, of any shape.
        what: Its name, for errors.

    Returns:
        x in float32 or float64, without gradient, over the power; and the power.
    """
    if not (is_torch(x) or is_array_api_obj(x)):
        raise TypeError(f"{what} must be an array, got {type(x).__name__}")
    xp = array_namespace(x)
    if not is_real_floating(x):
        raise TypeError(f"{what} must be real floating, got {x.dtype}")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"{what} must hold numbers along an axis, got shape {tuple(x.shape)}")
    x = at_least_float32(detached(x))
    peak = float(xp.max(xp.abs(x)))
    if not math.isfinite(peak):
        bad = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int32)))
        raise ValueError(f"{what} must be finite, got NaN or infinity in {bad} places")
    normal = max(peak, float(xp.finfo(x.dtype).smallest_normal))
    scale = 4.0 ** ((math.frexp(normal)[1] - 1) // 2)
    return x / scale, scale
