"""Haiku (https://github.com/google-deepmind/dm-haiku): any model with a module named "predictor".

The head lies in the haiku state, where the predictor's own would: it is saved, replicated and
passed on with the rest of the state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

import directpred.jax as dpj
from directpred.correlation import merge

from ._state import Head, close_step, initial_head

__all__ = ["Head", "close_step", "initial_head", "replace_predictor", "step"]


def replace_predictor(
    transformed: hk.TransformedWithState, name: str = "predictor", **options: Any
) -> hk.TransformedWithState:
    """Let a DirectPred head run in place of a learned predictor, which is never built.

    A call of the predictor gives z @ weight. It gathers the statistics of z in the haiku state,
    where the call's argument `is_training` is true or the predictor has no such argument. The step
    is closed by `close_step` on the state that `apply` returned; until then all calls are merged,
    those of both views and of micro-batches.

    Args:
        transformed: What `hk.transform_with_state` gave, also through `hk.without_apply_rng`.
        name: Name of the predictor's module, or its full path, as in the parameters.
        **options: Options of `directpred.jax.init` but dim, which is the width of the features.

    Returns:
        The transformed functions. Their `init` raises a ValueError where no module or more than
        one has that name, or where it does not give predictions of the shape of its features.

    Raises:
        TypeError, ValueError: An option is wrong.
    """
    dpj.init(1, **options)

    def new(shape: Any, dtype: Any) -> Any:
        return initial_head(shape[-1], **options)

    def predict(run: Callable[..., Any], args: Any, kwargs: Any, call: hk.MethodContext) -> Any:
        if not _is_call(call, name):
            return run(*args, **kwargs)
        z, is_training = _arguments(call, args, kwargs)
        head: Any = hk.get_state("directpred", z.shape, init=new)
        if is_training:
            gathered = merge(head.gathered, dpj.gather(head.state, z))
            hk.set_state("directpred", head._replace(gathered=gathered))
        return dpj.apply(head.state, z)

    def init(*args: Any, **kwargs: Any) -> Any:
        _check(lambda: transformed.init(*args, **kwargs), name)
        with hk.intercept_methods(predict):
            return transformed.init(*args, **kwargs)

    def apply(*args: Any, **kwargs: Any) -> Any:
        with hk.intercept_methods(predict):
            return transformed.apply(*args, **kwargs)

    return hk.TransformedWithState(init, apply)


step = close_step
"""The word of the other libraries for it."""


def _is_call(call: hk.MethodContext, name: str) -> bool:
    return call.method_name == "__call__" and name in (call.module.name, call.module.module_name)


def _arguments(call: hk.MethodContext, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The features, and whether to gather them, among the arguments of a predictor's call."""
    bound = inspect.signature(call.orig_method).bind(*args, **kwargs)
    bound.apply_defaults()
    return next(iter(bound.arguments.values())), bound.arguments.get("is_training", True)


def _check(init: Callable[[], Any], name: str) -> None:
    """Run init with the learned predictor, abstractly, and see that a head can replace it."""
    modules: set[str] = set()
    shapes: dict[str, tuple[Any, Any]] = {}

    def observe(run: Callable[..., Any], args: Any, kwargs: Any, call: hk.MethodContext) -> Any:
        out = run(*args, **kwargs)
        if call.method_name == "__call__":
            modules.add(call.module.module_name)
        if _is_call(call, name):
            z, _ = _arguments(call, args, kwargs)
            shapes[call.module.module_name] = jnp.shape(z), jax.tree.map(jnp.shape, out)
        return out

    with hk.intercept_methods(observe):
        jax.eval_shape(init)
    if len(shapes) != 1:
        raise ValueError(
            f"expected a call of one module named {name!r}, found {len(shapes)} among the modules "
            f"called, {', '.join(sorted(shapes or modules))}: pass name=<the predictor's full path>"
        )
    ((path, (features, prediction)),) = shapes.items()
    if prediction != features:
        raise ValueError(
            f"the predictor {path!r} is not square: it maps features of shape {features} to "
            f"{prediction}; DirectPred needs projector outputs as wide as the targets"
        )
