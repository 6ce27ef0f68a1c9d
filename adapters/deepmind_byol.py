"""google-deepmind/deepmind-research, ``byol`` (JAX, haiku): its pre-training experiment.

The head lies in the experiment's `online_state`, which its checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import directpred.jax as dpj

from . import haiku

__all__ = ["Replaced", "replace_predictor", "restore"]

NAME = "predictor"


class Replaced:
    """A head in an experiment, and what it replaced.

    Attributes:
        experiment: The experiment.
        originals: Its attributes that were set anew, by name.
        removed: The part of its state that belonged to the predictor, or None.
    """

    def __init__(self, experiment: Any, removed: Any) -> None:
        names = ("forward", "_update_fn", "update_pmap", "eval_batch_jit")
        self.experiment, self.removed = experiment, removed
        self.originals = {name: getattr(experiment, name) for name in names}

    @property
    def state(self) -> dpj.State:
        """The head's state (weight, correlation, counts), on the first device.

        Raises:
            ValueError: The experiment is not initialised yet; its first step does that.
        """
        if self.experiment._byol_state is None:
            raise ValueError("the experiment has no state yet: run a step or load a checkpoint")
        head: Any = self.experiment._byol_state.online_state[NAME]["directpred"]
        first: dpj.State = jax.tree.map(lambda x: x[0], head.state)
        return first


def replace_predictor(experiment: Any, optimizer: None = None, **head_options: Any) -> Replaced:
    """Let a DirectPred head run in place of the experiment's predictor.

    An experiment that has a state, of a checkpoint say, loses what belongs to the predictor, in
    the parameters, the batch statistics and the optimizer; a checkpoint that was trained with the
    head is loaded after this call.

    Args:
        experiment: A `byol_experiment.ByolExperiment`.
        optimizer: None; the optimizer and its state lie in the experiment.
        **head_options: Options of `directpred.jax.init` but dim.

    Returns:
        A handle, whose `state` is the head's.

    Raises:
        TypeError: Not such an experiment; an optimizer was given; an option is of a wrong type.
        ValueError: The predictor is replaced already, or an option is wrong.
    """
    if not all(hasattr(experiment, name) for name in ("forward", "_update_fn", "_byol_state")):
        raise TypeError(f"expected a ByolExperiment, got {type(experiment).__name__}")
    if optimizer is not None:
        raise TypeError("the optimizer's state lies in the experiment: leave optimizer out")
    if hasattr(experiment, "_directpred"):
        raise ValueError("its predictor is replaced already: restore(experiment) undoes that")
    forward = haiku.replace_predictor(experiment.forward, NAME, **head_options)
    state, removed = experiment._byol_state, None
    if state is not None:
        removed = _entries(state, of_predictor=True)
        first = removed.online_params[f"{NAME}/linear"]["w"]
        head = haiku.initial_head(first.shape[-2], **head_options)
        head = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(first), *x.shape)), head)
        experiment._byol_state = _with_heads(_entries(state, of_predictor=False), head, head)
    replaced = experiment._directpred = Replaced(experiment, removed)
    update_fn = experiment._update_fn

    def update(before: Any, *args: Any, **kwargs: Any) -> Any:
        after, logs = update_fn(before, *args, **kwargs)
        online = haiku.close_step(after.online_state, "i")[NAME]["directpred"]
        # Nobody reads the target's predictions: its head stays as it is.
        return _with_heads(after, online, before.target_state[NAME]["directpred"]), logs

    experiment.forward, experiment._update_fn = forward, update
    experiment.update_pmap = jax.pmap(update, axis_name="i")
    # Not the bound method itself, under which JAX keeps what it compiled with the old forward.
    experiment.eval_batch_jit = jax.jit(lambda *args: experiment._eval_batch(*args))
    return replaced


def restore(experiment: Any) -> None:
    """Undo `replace_predictor`: the learned predictor is back as it was then, its momentum too.

    Args:
        experiment: What was given to `replace_predictor`.

    Raises:
        ValueError: Its predictor is not replaced; or the experiment was initialised after the
            replacement, so that there never were parameters of a learned predictor.
    """
    replaced: Replaced | None = getattr(experiment, "_directpred", None)
    if replaced is None:
        raise ValueError("the experiment's predictor is not replaced")
    if (state := experiment._byol_state) is not None:
        if replaced.removed is None:
            raise ValueError(
                "the experiment has no parameters of a learned predictor to go back to, since it "
                "was initialised with the head: construct another experiment"
            )
        kept = _entries(state, of_predictor=False)
        experiment._byol_state = _on_mappings(lambda a, b: {**a, **b}, kept, replaced.removed)
    for name, value in replaced.originals.items():
        setattr(experiment, name, value)
    del experiment._directpred


def _entries(state: Any, of_predictor: bool) -> Any:
    """The state with, of all that is kept by module, only what is the predictor's, or the rest."""
    return _on_mappings(
        lambda x: {k: v for k, v in x.items() if (k.split("/")[0] == NAME) == of_predictor}, state
    )


def _on_mappings(f: Callable[..., Any], *states: Any) -> Any:
    def is_mapping(x: Any) -> bool:
        return isinstance(x, Mapping)

    return jax.tree.map(
        lambda x, *rest: f(x, *rest) if is_mapping(x) else x, *states, is_leaf=is_mapping
    )


def _with_heads(state: Any, online: haiku.Head, target: haiku.Head) -> Any:
    return state._replace(
        online_state={**state.online_state, NAME: {"directpred": online}},
        target_state={**state.target_state, NAME: {"directpred": target}},
    )
