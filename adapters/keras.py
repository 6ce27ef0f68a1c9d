"""Keras 3 (https://keras.io), on its torch and JAX backends: a layer that is the predictor.

Keras owns the training step, and nothing of a user runs after its optimizer. The layer therefore
ends a step within its own call: the last one of a training step, of the two for a pair of views,
sets the weight for the step to come. Its prediction is by the weight of the step before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
from keras import ops

import directpred.spectrum
from directpred.correlation import Moments, merge, moments
from directpred.features import check_dim, check_features
from directpred.method import Options, advance
from directpred.solvers import SolverName
from directpred.spectrum import Eq18, Rule
from directpred.state import State, initial_state

__all__ = ["DirectPredHead", "replace_predictor", "restore"]

if (BACKEND := keras.config.backend()) == "torch":
    from directpred.torch.precision import full_precision
elif BACKEND == "jax":
    import jax
else:
    raise ImportError(f"directpred needs Keras on torch or JAX; KERAS_BACKEND is {BACKEND!r}")


@keras.saving.register_keras_serializable(package="directpred")
class DirectPredHead(keras.layers.Layer):  # type: ignore[misc]
    """A predictor layer without trained weights, for BYOL, SimSiam and their like.

    Args:
        rule: Spectral rule, one of `directpred.spectrum`, or any callable s -> p, with which the
            model cannot be saved by its configuration.
        calls: How often a training step calls the layer: twice for two views one after the other.
            Its features are merged, and the last call ends the step.
        rho: As `directpred.DirectPred`; freq, center and solver likewise.
        outputs: The width of the predictions that the targets ask for, if that is to be checked.
        **options: Options of any layer, such as its name.

    Attributes:
        weight, correlation, mean, step_count, skipped, closings: As `directpred.DirectPred`, each a
            variable that is not trained.

    Raises:
        TypeError, ValueError: An option is of the wrong type or out of range; or, when it is
            called, the features are of another width than the targets.
    """

    def __init__(
        self,
        rule: Rule | dict[str, Any] = Eq18(),  # noqa: B008 - frozen
        *,
        calls: int = 2,
        rho: float = 0.3,
        freq: int = 1,
        center: bool = False,
        solver: SolverName = "auto",
        outputs: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        chosen: Any = rule
        if isinstance(rule, dict):  # out of a configuration
            fields = dict(rule)
            chosen = getattr(directpred.spectrum, fields.pop("type"))(**fields)
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise ValueError(f"calls must be a whole number of at least 1, got {calls!r}")
        self.options = Options(chosen, rho, freq, center, solver, "skip").validate()
        self.calls, self.outputs = calls, outputs

    def build(self, input_shape: Any) -> None:
        """Make the variables, for features of the last axis' width."""
        dim = check_dim(input_shape[-1])
        if self.outputs not in (None, dim):
            raise ValueError(
                f"the replaced predictor is not square: it maps features of width {dim} to "
                f"{self.outputs}; DirectPred needs projector outputs as wide as the targets"
            )
        start = initial_state(dim)._asdict()
        sums = {"gathered_outer": start["correlation"], "gathered_total": start["mean"]}
        counts = {"gathered_rows": 0, "gathered_calls": 0}
        for name, value in {**start, **sums, **counts}.items():
            whole = isinstance(value, int)
            variable = self.add_weight(
                name=name,
                shape=getattr(value, "shape", ()),
                dtype="int32" if whole else "float32",
                initializer="identity" if name == "weight" else "zeros",
                trainable=False,
                autocast=False,
            )
            setattr(self, name, variable)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Predict: inputs @ weight; in training also gather, and with the last call end the step.

        Args:
            inputs: Features, (..., n, dim), floating.
            training: Whether to gather.

        Returns:
            The prediction, in the shape and dtype of the inputs.
        """
        check_features(inputs, self.mean.shape[0])
        state = State(*(_constant(getattr(self, name)) for name in State._fields))
        prediction = ops.matmul(inputs, ops.cast(state.weight, inputs.dtype))
        if training:
            self._gather(_constant(inputs), state)
        return prediction

    def _gather(self, z: Any, state: State) -> None:
        names = [f"gathered_{name}" for name in Moments._fields]
        before = Moments(*(_constant(getattr(self, name)) for name in names))
        with _full_precision(z):
            batch = moments(z, state.weight.dtype)
            batch = merge(before, batch._replace(rows=ops.convert_to_tensor(batch.rows, "int32")))
            called = _constant(self.gathered_calls) + 1
            after, batch, called = ops.cond(
                called >= self.calls,
                lambda: self._closed(state, batch, called),
                lambda: (tuple(state), tuple(batch), called),
            )
        names = [*State._fields, *names, "gathered_calls"]
        for name, value in zip(names, [*after, *batch, called], strict=True):
            getattr(self, name).assign(value)

    def _closed(self, state: State, batch: Moments, called: Any) -> Any:
        after = advance(state, batch, self.options, known=False)
        like = [ops.cast(x, y.dtype) for x, y in zip(after, state, strict=True)]
        return tuple(like), tuple(map(ops.zeros_like, batch)), ops.zeros_like(called)

    def get_config(self) -> dict[str, Any]:
        """Describe the layer, with a rule of `directpred.spectrum`, for a saved model."""
        options = self.options._asdict()
        del options["nonfinite"]
        rule: Any = options["rule"]
        if hasattr(directpred.spectrum, type(rule).__name__):
            options["rule"] = {"type": type(rule).__name__, **dataclasses.asdict(rule)}
        own = {"calls": self.calls, "outputs": self.outputs}
        return {**super().get_config(), **options, **own}


def replace_predictor(
    model: keras.Model, name: str = "predictor", **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredHead` where the learned predictor of a model stands, before it is built.

    Args:
        model: A model of a class of its own; a functional one takes the layer where it is wired.
        name: The predictor's attribute, or its path from the model, such as "online.predictor".
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head, whose width the first features tell.

    Raises:
        TypeError: Not a model, or an option is of the wrong type.
        ValueError: There is no such predictor; an option is wrong; or the model is built, and so
            its optimizer may be, whose variables Keras cannot take out again.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"expected a keras.Model, got {type(model).__name__}")
    if model.built:
        raise ValueError(
            f"{type(model).__name__} is built already: replace its predictor before it is called"
        )
    *inside, attribute = name.split(".")
    owner: Any = model
    for part in inside:
        owner = getattr(owner, part, None)
    predictor = getattr(owner, attribute, None)
    if not isinstance(predictor, keras.layers.Layer):
        attributes = {**vars(model), **vars(model).get("_modules", {})}  # as torch keeps them
        held = ", ".join(k for k, x in attributes.items() if isinstance(x, keras.layers.Layer))
        raise ValueError(
            f"no predictor {name!r} in {type(model).__name__}, which holds {held or 'no layers'}: "
            "pass name=<the predictor's attribute or path>"
        )
    if isinstance(predictor, DirectPredHead):
        raise ValueError(f"{name} is a DirectPredHead already; restore(model) undoes that")
    dense = [x for x in predictor._flatten_layers() if isinstance(x, keras.layers.Dense)]
    outputs = {"outputs": dense[-1].units} if dense else {}
    head = DirectPredHead(**{**outputs, **head_options})
    _put(owner, attribute, head)
    head.replaced = _Replaced(predictor, owner, attribute)
    return head


def restore(model: Any) -> Any:
    """Undo `replace_predictor`, before the model is built.

    Args:
        model: What was given to `replace_predictor`, or the head that it returned.

    Returns:
        The predictor.

    Raises:
        ValueError: There is no replaced predictor in the model, or more than one; or the model is
            built.
    """
    heads = [x for x in model._flatten_layers() if hasattr(x, "replaced")]
    if len(heads) != 1 or heads[0].built:
        raise ValueError(
            f"expected one head that replaced a predictor in {type(model).__name__} and is not "
            f"built yet, found {sum(not head.built for head in heads)}"
        )
    replaced = heads[0].replaced
    _put(replaced.owner, replaced.attribute, replaced.predictor)
    return replaced.predictor


class _Replaced:
    """A predictor and where it stood; hidden in an object of its own from Keras' tracking."""

    def __init__(self, predictor: Any, owner: Any, attribute: str) -> None:
        self.predictor, self.owner, self.attribute = predictor, owner, attribute


def _put(owner: Any, attribute: str, layer: Any) -> None:
    owner._tracker.untrack(getattr(owner, attribute))
    delattr(owner, attribute)
    setattr(owner, attribute, layer)


def _constant(x: Any) -> Any:
    """The value of a variable or tensor, without gradient, safe from what is assigned later."""
    value = ops.stop_gradient(getattr(x, "value", x))
    return value.clone() if BACKEND == "torch" else value


def _full_precision(z: Any) -> Any:
    return (
        full_precision(z.device) if BACKEND == "torch" else jax.default_matmul_precision("highest")
    )
