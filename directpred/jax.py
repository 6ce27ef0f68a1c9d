"""DirectPred for JAX: the state is a pytree, and every function is pure.

``init`` makes a state, ``update`` takes one step of the method and ``apply`` predicts. All may be
jitted, vmapped (over states and features, for an ensemble) and differentiated: gradient flows
through ``apply`` to the features; the statistics and the weight are constants.

In a training step, apply the weight of the step before, and update after the optimizer::

    loss = ... dpj.apply(state, z1) ...
    state, weight = dpj.update(state, z1, z2)

``update`` is ``close`` after ``gather``. Apart they spread a step over micro-batches, whose moments
`directpred.correlation.merge` adds up, in their dtype: over thousands of them, with ``center``,
take a state in float64 where the mean outweighs the standard deviation.

Nothing relies on JAX promoting dtypes or ranks: ``jax_numpy_dtype_promotion="strict"`` and
``jax_numpy_rank_promotion="raise"`` may be set.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from directpred import state as core
from directpred.correlation import Moments, moments, sum_pairwise
from directpred.features import check_dim, check_features
from directpred.method import Options, advance
from directpred.prediction import predict
from directpred.solvers import SolverName
from directpred.spectrum import Eq18, Rule

__all__ = [
    "State",
    "apply",
    "close",
    "gather",
    "init",
    "load_state_dict",
    "state_dict",
    "update",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a predictor remembers from step to step: a pytree of six arrays.

    Orbax saves it as any pytree; so does `flax.serialization`, if flax is imported before the
    state is made. Both restore into a state made by `init`, from which the options come.

    Attributes:
        core: The arrays, as `directpred.state.State` describes them, with counts of 0-d int32;
            each is an attribute of this state too: `correlation`, `mean`, `weight`, `step_count`,
            `skipped`, `closings`.
        options: The options given to `init`; static, so rules must be hashable.
    """

    core: core.State
    options: Options = field(metadata={"static": True})

    def __post_init__(self) -> None:
        _register_with_flax()

    def __getattr__(self, name: str) -> jax.Array:
        if name in core.State._fields:
            return getattr(self.core, name)  # type: ignore[no-any-return]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def init(
    dim: int,
    rule: Rule = Eq18(),  # noqa: B008 - frozen
    *,
    rho: float = 0.3,
    freq: int = 1,
    center: bool = False,
    solver: SolverName = "auto",
    dtype: DTypeLike = jnp.float32,
) -> State:
    """Make the state before the first update.

    Args:
        dim: Width of the features.
        rule: Spectral rule, one of `directpred.spectrum` or any hashable callable s -> p.
        rho: Weight of the old correlation in the moving average, in [0, 1).
        freq: Set the weight every freq-th update, whatever the updates held.
        center: Whether the weight comes from the centred correlation; its precision is that of
            `directpred.DirectPred`.
        solver: As `directpred.DirectPred`.
        dtype: Of statistics and weight, float32, or float64 where JAX is set to have it.

    Raises:
        TypeError: dim is no integer, or rule no callable or not hashable.
        ValueError: Another option is out of its range.
    """
    options = Options(rule, rho, freq, center, solver, nonfinite="skip").validate()
    try:
        hash(options)
    except TypeError:
        raise TypeError(f"rule must be hashable, to be static under jit, got {rule!r}") from None
    available = jnp.__array_namespace_info__().dtypes(kind="real floating").values()
    if (dtype := jnp.dtype(dtype)) not in available:
        names = " or ".join(map(str, available))
        raise ValueError(f"dtype must be {names} (see jax_enable_x64), got {dtype}")
    return _from_core(core.initial_state(check_dim(dim)), dtype, options)


def update(state: State, *views: ArrayLike, axis_name: Hashable = None) -> tuple[State, jax.Array]:
    """Take one step with all rows of all views: Eq. 19, and the weight where it is due.

    A batch that is not finite, or whose correlation or weight overflows, does not enter F̂ and is
    counted in `skipped`. With freq > 1 the solve is computed at every update.

    Args:
        state: The state before the step.
        *views: One or more arrays of features, (..., n, dim) with any n ≥ 1 of its own, real
            floating. All their rows enter as one batch.
        axis_name: Name, or tuple of names, of the mapped axes (of `pmap`, `shard_map`, `vmap`) to
            sum the statistics over, so that the batch is the global one. Under plain `jit` arrays
            that are sharded over devices are global without it.

    Returns:
        The state after the step, and its weight, (dim, dim).

    Raises:
        TypeError: No views; one is not an array of JAX or NumPy, or not real floating.
        ValueError: A view is of another width or has no rows.
    """
    return close(state, gather(state, *views), axis_name)


def gather(state: State, *views: ArrayLike) -> Moments:
    """Sum the statistics of a micro-batch, for `close`; those of several merge by addition.

    Args:
        state: The state, from which width and dtype come.
        *views: As for `update`.

    Returns:
        The moments of all rows: UNIT · Σ z zᵀ (dim, dim) and Σ z (dim,) in the dtype of the state,
        and the number of rows, 0-d int32. A pytree, constant for differentiation.

    Raises:
        TypeError, ValueError: As `update`.
    """
    if not views:
        raise TypeError("expected at least one array of features, got none")
    features = [_checked(z, state) for z in views]
    dtype = state.weight.dtype
    # Accelerators multiply float32 in fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        batch = sum_pairwise(features, lambda z: moments(jax.lax.stop_gradient(z), dtype))
    return batch._replace(rows=jnp.asarray(batch.rows, jnp.int32))


def close(state: State, batch: Moments, axis_name: Hashable = None) -> tuple[State, jax.Array]:
    """Close a step with what was gathered for it: Eq. 19, and the weight where it is due.

    Moments of no rows leave the state as it was. Those that are not finite do not enter F̂, and are
    counted in `skipped`.

    Args:
        state: The state before the step.
        batch: What `gather` gave, merged over the micro-batches of the step.
        axis_name: As for `update`.

    Returns:
        The state after the step, and its weight, (dim, dim).

    Raises:
        ValueError: The moments are of another width.
    """
    if (got := np.shape(batch.outer)) != (expected := state.weight.shape):
        raise ValueError(f"moments must be of shape {expected}, got {got}")
    if axis_name is not None:
        batch = jax.lax.psum(batch, axis_name)  # type: ignore[no-untyped-call]
    before, batch = jax.lax.stop_gradient((state.core, batch))
    some = batch.rows > 0
    with jax.default_matmul_precision("highest"):
        after = advance(before, batch, state.options, known=False, counts=some)
    after = after._replace(
        weight=jnp.where(some, after.weight, before.weight),
        closings=jnp.where(some, after.closings, before.closings),
    )
    return replace(state, core=after), after.weight


def apply(state: State, z: ArrayLike) -> jax.Array:
    """Predict: z @ weight. The gradient flows through to z; the weight is a constant.

    Args:
        state: The state; one of `init` has the identity for its weight.
        z: Features, (..., n, dim), real floating.

    Returns:
        The prediction, in the shape and dtype of z.

    Raises:
        TypeError, ValueError: As `update`.
    """
    prediction: jax.Array = predict(_checked(z, state), jax.lax.stop_gradient(state.weight))
    return prediction


def state_dict(state: State) -> dict[str, Any]:
    """Return the state in the entries that `DirectPred` and the torch head load and save."""
    return core.to_dict(state.core, None)


def load_state_dict(state: State, entries: Mapping[str, Any]) -> State:
    """Return the saved state of any predictor, with the options and dtype of a state of `init`.

    Args:
        state: Where dim, options and dtype come from.
        entries: What a `state_dict` gave, with arrays of any library.

    Raises:
        ValueError: Of another version, dim or set of entries; not finite; beyond the dtype; or
            within a step that is not closed yet, which a `State` cannot hold.
    """
    loaded, accumulated = core.from_dict(entries, state.mean.shape[-1])
    if accumulated is not None:
        raise ValueError("the state holds an open step: call step() before it is saved")
    loaded = core.moved(loaded, state.weight, state.weight.dtype)
    return _from_core(loaded, state.weight.dtype, state.options)


def _checked(z: Any, state: State) -> jax.Array:
    check_features(z, state.mean.shape[-1])
    if not isinstance(z, jax.Array | np.ndarray):
        raise TypeError(f"expected features of JAX or NumPy, got {type(z).__name__}")
    if isinstance(z, np.ndarray) and z.dtype.kind == "f":  # JAX has no other order of bytes
        z = z.astype(
            f"f{min(z.dtype.itemsize, 8)}" if z.dtype.itemsize > 1 else z.dtype, copy=False
        )
    return jnp.asarray(z)


def _from_core(state: core.State, dtype: Any, options: Options) -> State:
    arrays = (jnp.asarray(x, dtype=dtype if np.ndim(x) else jnp.int32) for x in state)
    return State(core.State(*arrays), options)


def _register_with_flax() -> None:
    """Tell `flax.serialization`, which saves only types registered with it, about `State`."""
    if flax := sys.modules.get("flax.serialization"):
        flax.register_serialization_state(
            State, lambda state: state.core._asdict(), _restored, override=True
        )


def _restored(state: State, entries: Mapping[str, Any]) -> State:
    like = state.core._asdict()
    shapes, got = ({n: np.shape(x) for n, x in d.items()} for d in (like, entries))
    if got != shapes:
        raise ValueError(f"expected a DirectPred state of shapes {shapes}, got {got}")
    arrays = (jnp.asarray(entries[name], x.dtype) for name, x in like.items())
    return State(core.State(*arrays), state.options)
