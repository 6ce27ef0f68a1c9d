"""DirectPredHead for Flax NNX, the twin of that of `directpred.torch`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import directpred.jax as dpj
from directpred.correlation import Moments
from directpred.state import State

__all__ = ["DirectPredHead"]

_STATE = State._fields
_close = jax.jit(dpj.close, static_argnames="axis_name")


class DirectPredHead(nnx.Module):
    """A predictor head without trained parameters: `directpred.jax` as an `nnx.Module`.

    In training `head(z)` is z @ weight and gathers the statistics of z; `step()`, or
    `close()`, ends it.
    As for `nnx.BatchNorm`, `train()` and `eval()` of any module around it set the mode, and all of
    its variables are of type `nnx.BatchStat`.

    Example:
        >>> import jax.numpy as jnp
        >>> head = DirectPredHead(4)
        >>> prediction = head(jnp.ones((16, 4)))  # within the loss
        >>> head.step()  # after optimizer.update
        >>> int(head.step_count[...])
        1

    Args:
        dim: Width of the features.
        **options: Options of `directpred.jax.init`.

    Attributes:
        correlation, mean, weight, step_count, skipped, closings: As in `directpred.jax.State`.
        gathered_outer, gathered_total, gathered_rows: Moments since the last step was closed.
        use_running_average: Whether the head is in evaluation, and gathers nothing.

    Raises:
        TypeError, ValueError: As `directpred.jax.init`.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        state = dpj.init(dim, **options)
        self.options = state.options
        self.use_running_average = False
        for name in _STATE:
            setattr(self, name, nnx.BatchStat(getattr(state, name)))
        for name, like in zip(Moments._fields, ("correlation", "mean", "step_count"), strict=True):
            setattr(self, f"gathered_{name}", nnx.BatchStat(jnp.zeros_like(getattr(state, like))))

    @property
    def state(self) -> dpj.State:
        """The variables as a state of `directpred.jax`, for its `state_dict`, say."""
        return dpj.State(State(*(getattr(self, name)[...] for name in _STATE)), self.options)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Predict: z @ weight; in training also gather the statistics of z.

        Args:
            z: Features, (..., n, dim), real floating.

        Returns:
            The prediction, in the shape and dtype of z. The gradient flows through to z alone.

        Raises:
            TypeError, ValueError: As `directpred.jax.update`.
        """
        state = self.state
        if not self.use_running_average:
            for sum_, x in zip(self._gathered(), dpj.gather(state, z), strict=True):
                sum_[...] += x
        return dpj.apply(state, z)

    def step(self, axis_name: Hashable = None) -> None:
        """Close the step after `optimizer.update`, within the jitted function or outside.

        Does nothing where nothing was gathered since the last step.

        Args:
            axis_name: As for `directpred.jax.update`.
        """
        batch = Moments(*(x[...] for x in self._gathered()))
        state, _ = _close(self.state, batch, axis_name=axis_name)
        for name in _STATE:
            getattr(self, name)[...] = getattr(state, name)
        for x in self._gathered():
            x[...] = jnp.zeros_like(x[...])

    close = step

    def _gathered(self) -> list[Any]:
        return [getattr(self, f"gathered_{name}") for name in Moments._fields]
