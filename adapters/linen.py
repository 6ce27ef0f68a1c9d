"""Flax Linen (https://github.com/google/flax): any model with a submodule named "predictor".

The head lies in the collection ``batch_stats``, as the state of a batch normalisation does: it is
initialised, saved, replicated and passed on with that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import directpred.jax as dpj
from directpred.correlation import merge

from ._state import Head, close_step, initial_head

__all__ = ["Head", "Replaced", "close_step", "replace_predictor", "restore"]

COLLECTION = "batch_stats"


@dataclass(frozen=True)
class Replaced:
    """A Linen module in which a DirectPred head runs in place of a learned predictor.

    Its `init` and `apply` are those of the module but for that; all else of the module is its too.

    Attributes:
        module: The module.
        name: The predictor's name or path.
        options: Options of `directpred.jax.init`.
    """

    module: nn.Module
    name: str
    options: tuple[tuple[str, Any], ...]

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initialise all variables but the predictor's; see `flax.linen.Module.init`.

        Raises:
            ValueError: No module or more than one has the name, or it does not give predictions of
                the shape of its features.
        """
        _check(lambda: self.module.init(*args, **kwargs), self.name)
        with nn.intercept_methods(self._predict):
            return self.module.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; features are gathered where ``batch_stats`` is among the mutable."""
        with nn.intercept_methods(self._predict):
            return self.module.apply(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)

    def _predict(
        self, run: Callable[..., Any], args: Any, kwargs: Any, call: nn.module.InterceptorContext
    ) -> Any:
        if not _is_call(call, self.name):
            return run(*args, **kwargs)
        z, options = _features(args, kwargs), dict(self.options)
        scope: Any = call.module.scope
        held = scope.variable(
            COLLECTION, "directpred", lambda: initial_head(z.shape[-1], **options)
        )
        head: Head = held.value
        if scope.is_mutable_collection(COLLECTION) and not call.module.is_initializing():
            gathered = merge(head.gathered, dpj.gather(head.state, z))
            held.value = head._replace(gathered=gathered)
        return dpj.apply(head.state, z)


def replace_predictor(module: nn.Module, name: str = "predictor", **options: Any) -> Replaced:
    """Let a DirectPred head run in place of a learned predictor, whose parameters are not made.

    A call of the predictor gives z @ weight. It gathers the statistics of z where ``apply`` may
    change ``batch_stats``, as in training; until `close_step` on what it returned all calls are
    merged, those of both views and of micro-batches.

    Args:
        module: The model.
        name: The predictor's name, or its path from the model, such as "online/predictor".
        **options: Options of `directpred.jax.init` but dim, which is the width of the features.

    Returns:
        The model with its predictor replaced, to be used in place of it.

    Raises:
        TypeError: Not a Linen module, or an option is of a wrong type.
        ValueError: An option is wrong.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a flax.linen.Module, got {type(module).__name__}")
    dpj.init(1, **options)
    return Replaced(module, name, tuple(options.items()))


def restore(model: Replaced) -> nn.Module:
    """Undo `replace_predictor`: the model with its learned predictor, as it always was."""
    return model.module


def _is_call(call: nn.module.InterceptorContext, name: str) -> bool:
    path = "/".join(call.module.path)
    return call.method_name == "__call__" and name in (call.module.name, path)


def _features(args: Any, kwargs: Any) -> Any:
    """The features among the arguments of a predictor's call: the first."""
    return next(iter([*args, *kwargs.values()]))


def _check(init: Callable[[], Any], name: str) -> None:
    """Run init with the learned predictor, abstractly, and see that a head can replace it."""
    modules: set[str] = set()
    shapes: dict[str, tuple[Any, Any]] = {}

    def observe(run: Callable[..., Any], args: Any, kwargs: Any, call: Any) -> Any:
        out = run(*args, **kwargs)
        path = "/".join(call.module.path)
        if call.method_name == "__call__":
            modules.add(path)
        if _is_call(call, name):
            z = _features(args, kwargs)
            shapes[path] = jnp.shape(z), jax.tree.map(jnp.shape, out)
        return out

    with nn.intercept_methods(observe):
        jax.eval_shape(init)
    if len(shapes) != 1:
        raise ValueError(
            f"expected a call of one module named {name!r}, found {len(shapes)} among the modules "
            f"called, {', '.join(sorted(shapes or modules - {''}))}: pass name=<the predictor's "
            "path>"
        )
    ((path, (features, prediction)),) = shapes.items()
    if prediction != features:
        raise ValueError(
            f"the predictor {path!r} is not square: it maps features of shape {features} to "
            f"{prediction}; DirectPred needs projector outputs as wide as the targets"
        )
