"""The losses that a closed-form predictor is trained with, for PyTorch and JAX.

Like all of BYOL's and SimSiam's, they are between a prediction and a target without gradient: pass
``target.detach()`` or ``jax.lax.stop_gradient(target)``, and sum over the two directions.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace, is_jax_array, is_torch_array

from directpred.array import Array


def regression_loss(prediction: Array, target: Array, euclidean: bool = False) -> Array:
    """The distance of predictions from targets, mean over the rows.

    By default the normalised regression loss of BYOL, ‖p/‖p‖ − t/‖t‖‖² = 2 − 2 cos∠(p, t), with
    rows of zeros at distance 2 and without a gradient; else ½ ‖p − t‖².

    Source: Grill et al., NeurIPS 2020 (arXiv 2006.07733), Eq. 2.

    Args:
        prediction: (n, dim), floating.
        target: (n, dim), of the same library and dtype.
        euclidean: Whether to leave out the normalisation.

    Returns:
        A 0-d array.
    """
    xp = array_namespace(prediction, target)
    if euclidean:
        return xp.mean(xp.sum((prediction - target) ** 2, axis=-1)) / 2
    cosine = xp.sum(_normalised(prediction, xp) * _normalised(target, xp), axis=-1)
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
        prediction: The predictor's output for z, (n, dim); no gradient flows into it.
        target: (n, dim), of the same library and dtype.
        euclidean: As for `regression_loss`.

    Returns:
        A 0-d array.

    Raises:
        TypeError: z is of a library without automatic differentiation.
    """
    past = _stop_gradient(prediction) + (z - _stop_gradient(z))
    return regression_loss(past, target, euclidean)


def _normalised(z: Array, xp: Any) -> Array:
    square = xp.sum(z * z, axis=-1, keepdims=True)
    return z / xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))


def _stop_gradient(x: Array) -> Array:
    if is_torch_array(x):
        return x.detach()
    if is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    raise TypeError(f"iso_loss needs arrays of PyTorch or JAX, got {type(x).__name__}")
