"""A head that lies in a state of haiku or Flax Linen, where a replaced predictor's own would."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import directpred.jax as dpj
from directpred.correlation import Moments

__all__ = ["Head", "close_step", "initial_head"]


class Head(NamedTuple):
    """What stands in a state for a replaced predictor, as ``state[module]["directpred"]``.

    Attributes:
        state: The predictor: its weight, correlation and counts.
        gathered: Moments of the features since the last step was closed.
    """

    state: dpj.State
    gathered: Moments


def initial_head(dim: int, **options: Any) -> Head:
    """Return the head for features of width dim before the first step; options of `dpj.init`."""
    state = dpj.init(dim, **options)
    zero = jnp.zeros_like
    return Head(state, Moments(zero(state.correlation), zero(state.mean), zero(state.step_count)))


def close_step(state: Any, axis_name: Hashable = None) -> Any:
    """Close the step of every head in a state, after the optimizer's update.

    Args:
        state: The state that `apply` returned; pure and jit-able.
        axis_name: As for `directpred.jax.update`: the mapped axes that the batch is spread over.

    Returns:
        The state with the new weights, and nothing gathered.

    Raises:
        ValueError: There is no head in the state.
    """

    def is_head(x: Any) -> bool:
        return isinstance(x, Head)

    def close(x: Any) -> Any:
        if not is_head(x):
            return x
        after, _ = dpj.close(x.state, x.gathered, axis_name)
        return Head(after, jax.tree.map(jnp.zeros_like, x.gathered))

    if not any(map(is_head, jax.tree.leaves(state, is_leaf=is_head))):
        raise ValueError(f"expected a state with a DirectPred head, got one of {[*state]}")
    return jax.tree.map(close, state, is_leaf=is_head)
