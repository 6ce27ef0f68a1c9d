"""Flax NNX (https://github.com/google/flax): any model with a submodule `predictor`.

For instance those of stable-pretraining's JAX backend, whose trainer calls back after the update::

    class CloseStep(spj.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.predictor.close()
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from directpred.flax import DirectPredHead

__all__ = ["replace_predictor", "restore"]


def replace_predictor(
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any] | None = None,
    name: str = "predictor",
    **head_options: Any,
) -> DirectPredHead:
    """Put a `DirectPredHead` where a learned predictor stands, in the mode of that.

    Args:
        model: The model.
        optimizer: The optimizer of the model, if it is built already: the state of the replaced
            parameters is taken out.
        name: The predictor's attribute, or its path from the model, such as "online.predictor".
        **head_options: Options of `directpred.jax.init` but dim, which the predictor tells.

    Returns:
        The head, whose steps the training loop closes.

    Raises:
        TypeError: Not an `nnx.Module`; an option of the head is of a wrong type.
        ValueError: There is no such predictor, or more than one; it is not square; an option is
            wrong; the optimizer is that of another model. Nothing has then been changed.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"expected an nnx.Module, got {type(model).__name__}")
    *inside, attribute = name.split(".")
    owners = {
        ".".join([*map(str, path), attribute]): owner
        for path, owner in nnx.iter_modules(model)
        if isinstance(vars(owner).get(attribute), nnx.Module)
        and inside in ([], [str(part) for part in path])
    }
    found = {id(vars(owner)[attribute]): vars(owner)[attribute] for owner in owners.values()}
    if len(found) != 1:
        looked_at = owners or [key for key, x in vars(model).items() if isinstance(x, nnx.Module)]
        raise ValueError(
            f"expected one submodule {name!r} in {type(model).__name__} and all it holds, found "
            f"{len(found)}; looked at {', '.join(looked_at)}: pass name=<the predictor's path>"
        )
    (predictor,) = found.values()
    head = DirectPredHead(_width(predictor, name), **head_options)
    modes = _modes(predictor) or _modes(model)
    head.use_running_average = bool(modes) and all(modes)

    record = _Replaced(
        predictor,
        [(weakref.ref(owner), attribute) for owner in owners.values()],
        weakref.ref(model),
        None if optimizer is None else weakref.ref(optimizer),
        {} if optimizer is None else _by_path(optimizer.opt_state),
    )
    try:
        record.put(head)
    except Exception:
        record.fill_slots(predictor)
        raise
    _replaced[head] = record
    return head


def restore(model: nnx.Module) -> nnx.Module:
    """Undo `replace_predictor`: the learned predictor is back, in the optimizer too.

    Args:
        model: What was given to `replace_predictor`, or the head that it returned.

    Returns:
        The predictor as it was when it was replaced, in the head's mode.

    Raises:
        ValueError: There is no replaced predictor in the model, or more than one. A copy of a
            model does not know what the original replaced.
    """
    modules = (module for _, module in nnx.iter_modules(model))
    heads = [x for x in modules if isinstance(x, DirectPredHead) and x in _replaced]
    if len(heads) != 1:
        raise ValueError(
            f"expected one head that replaced a predictor in {type(model).__name__}, found "
            f"{len(heads)}: pass the head to undo, in the process that replaced the predictor"
        )
    (head,) = heads
    record = _replaced.pop(head)
    record.put(record.predictor)
    getattr(record.predictor, "eval" if head.use_running_average else "train")()
    return record.predictor


@dataclass
class _Replaced:
    """A replaced predictor, where it stood, and the optimizer's variables at that time."""

    predictor: nnx.Module
    slots: list[tuple[weakref.ref[nnx.Module], str]]
    model: weakref.ref[nnx.Module]
    optimizer: weakref.ref[nnx.Optimizer[Any]] | None
    variables: dict[Any, Any]

    def fill_slots(self, module: nnx.Module) -> None:
        for owner, attribute in self.slots:
            setattr(owner(), attribute, module)

    def put(self, module: nnx.Module) -> None:
        """Put a module in the predictor's place, and have the optimizer's state follow."""
        self.fill_slots(module)
        if self.optimizer is None or (optimizer := self.optimizer()) is None:
            return
        known = self.variables | _by_path(optimizer.opt_state)
        wanted = jax.eval_shape(optimizer.tx.init, nnx.state(self.model(), optimizer.wrt))
        if unknown := [jax.tree_util.keystr(path) for path in _by_path(wanted).keys() - known]:
            raise ValueError(
                f"the optimizer is not that of {type(self.model()).__name__}: it has no state for "
                f"{', '.join(sorted(unknown))}; pass the model that it was built with"
            )
        optimizer.opt_state = nnx.data(
            jax.tree_util.tree_map_with_path(
                lambda path, _: known[path], wanted, is_leaf=_is_variable
            )
        )


# Beside the heads and not in them: the replaced parameters are no part of the model any more.
_replaced: weakref.WeakKeyDictionary[DirectPredHead, _Replaced] = weakref.WeakKeyDictionary()


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _by_path(opt_state: Any) -> dict[Any, Any]:
    return dict(jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_variable))


def _modes(module: nnx.Module) -> list[bool]:
    """Whether each layer in a module that knows of modes (normalisation, dropout) evaluates."""
    flags = ("use_running_average", "deterministic")
    layers = (vars(layer) for _, layer in nnx.iter_modules(module))
    return [bool(layer[flag]) for layer in layers for flag in flags if flag in layer]


def _width(predictor: nnx.Module, name: str) -> int:
    """The width of the features: that of the linear layer which they can enter by."""
    where = f"the predictor {name!r} ({type(predictor).__name__})"
    if isinstance(predictor, DirectPredHead):
        raise ValueError(f"{where} is a DirectPredHead already; restore(model) undoes that")
    graph, state = nnx.split(predictor)
    layers = [layer for _, layer in nnx.iter_modules(predictor) if isinstance(layer, nnx.Linear)]
    reason = "has no nnx.Linear"
    for layer in layers:
        z = jnp.zeros((2, layer.in_features))
        try:
            out = jax.eval_shape(lambda state, z: nnx.merge(graph, state)(z), state, z)
        except (TypeError, ValueError) as error:
            reason = f"cannot be called with features alone: {error}"
            continue
        if out.shape != z.shape:
            raise ValueError(
                f"{where} is not square: it maps features of shape {z.shape} to {out.shape}; "
                "DirectPred needs projector outputs as wide as the targets"
            )
        return layer.in_features
    raise ValueError(
        f"the width of the features cannot be told, for {where} {reason}; put "
        "directpred.flax.DirectPredHead(dim) in its place by hand"
    )
