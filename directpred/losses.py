"""The losses that a closed-form predictor is trained with, for PyTorch and JAX.

Like all of BYOL's and SimSiam's, they are between a prediction and a target without gradient: pass
``target.detach()`` or ``jax.lax.stop_gradient(target)``, and sum over the two directions.
"""

from __future__ import annotations

from array_api_compat import array_namespace, is_jax_array

from directpred.array import Array, detached, is_torch
from directpred.rows import at_least_float32, normalised


def regression_loss(prediction: Array, target: Array, euclidean: bool = False) -> Array:
    """The distance of predictions from targets, mean over the rows.

    By default the normalised regression loss of BYOL, ‖p/‖p‖ − t/‖t‖‖² = 2 − 2 cos∠(p, t), with
    rows of zeros at distance 2 and without a gradient; else ½ ‖p − t‖². Half precision is converted
    to float32 first, and the norm of a row over- or underflows at no scale of it.

    Source: Grill et al., NeurIPS 2020 (arXiv 2006.07733), Eq. 2.

    Args:
        prediction: (n, dim), floating.
        target: (n, dim), of the same library and dtype.
        euclidean: Whether to leave out the normalisation.

    Returns:
        A 0-d array, float32 or float64.
    """
    xp = array_namespace(prediction, target)
    prediction, target = at_least_float32(prediction), at_least_float32(target)
    if euclidean:
        return xp.mean(xp.sum((prediction - target) ** 2, axis=-1)) / 2
    cosine = xp.sum(normalised(prediction) * normalised(target), axis=-1)
    return 2 - 2 * xp.mean(cosine)


def iso_loss(z: Array, prediction: Array, target: Array, euclidean: bool = False) -> Array:
    """IsoLoss: `regression_loss` with its gradient handed to the features past the predictor.

    Through a predictor W_p, an eigenmode of the features learns at a rate that its eigenvalue
    multiplies. Here z takes the gradient with respect to W_p z as its own, ∂L/∂z := ∂L/∂p at
    p = W_p z, so all modes learn alike. The value is that of `regression_loss`.

    Source: Halvagal, Laborieux, Zenke, NeurIPS 2023 (arXiv 2212.04858), whose surrogates have these
    gradients.

    Args:
        z: Features that entered the predictor, (n, dim), floating.
        prediction: The predictor's output for z, (n, dim); a gradient of zero flows into it, so
            that a `DirectPredHead` counts its rows.
        target: (n, dim), of the same library and dtype.
        euclidean: As for `regression_loss`.

    Returns:
        A 0-d array, float32 or float64.

    Raises:
        TypeError: z is of a library without automatic differentiation.
    """
    if not (is_torch(z) or is_jax_array(z)):
        raise TypeError(f"iso_loss needs arrays of PyTorch or JAX, got {type(z).__name__}")
    z = at_least_float32(z)
    prediction = at_least_float32(prediction)
    past = detached(prediction) + (z - detached(z))
    if is_torch(z):  # a gradient of zero, by which a head knows that its rows belong to the step
        past = past + (prediction - prediction)
    return regression_loss(past, target, euclidean)
