"""The options of one training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from directpred.reference_trainers.errors import UsageError

PREDICTORS = ("directpred", "directcopy", "mlp", "linear", "none", "no_stopgrad")
"""The predictors by name, in the order in which tables show them."""

LABELS = {
    "directpred": "DirectPred",
    "directcopy": "DirectCopy",
    "mlp": "learned, 2-layer",
    "linear": "learned, linear",
    "none": "no predictor",
    "no_stopgrad": "no stop-gradient",
    "untrained": "untrained network",
}
"""The predictors, and the network before training, as tables and pictures call them."""

DATASETS = ("digits",)
"""The data sets by name."""

LOSSES = ("cosine", "iso")
"""The losses by name."""

Positive = Annotated[int, (1, math.inf)]
NonNegative = Annotated[float, (0, math.inf)]
Share = Annotated[float, (0, 1)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the numbers of a run; the defaults are the digits' recipe.

    Optimisation, loss, the target and the heads' form are those of the published small-image
    trainer; the encoder and the views are made for images of 8×8 pixels.

    Attributes:
        dataset: One of `DATASETS`.
        predictor: One of `PREDICTORS`.
        loss: One of `LOSSES`; iso is the cosine's value with IsoLoss's gradient.
        seed: Decides the initial weights, the order of the images and their views.
        epochs: Passes over the training images.
        batch_size: Images a step; an incomplete last batch of an epoch is left out.
        width: Channels of the encoder's first convolution; its output has four times as many.
        hidden: Hidden units of the projector and of the 2-layer predictor.
        dim: Width d of the features that enter the predictor.
        lr: Learning rate of SGD, constant.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty on every parameter.
        target_momentum: Share that the target network keeps of itself at every step.
        rho: Share that the running correlation keeps of itself at every step (Eq. 19).
        eps: Boost of the small eigenvalues (Eq. 18); null takes the default of the rule.
        freq: Steps from one setting of the predictor to the next.
        rotate: Views are rotated by up to this many degrees.
        shift: Views are shifted by up to this share of the side of the image.
        zoom: Views are scaled by a factor of 1 ± this.
        brightness: Views are made brighter or darker by up to this share of the full range.
        noise: Standard deviation of the Gaussian noise on the views; images lie in [0, 1].
        evaluate_every: Epochs from one evaluation to the next; the last is always evaluated.
        threads: CPU threads; the last digits of the numbers depend on it.
    """

    dataset: Annotated[str, DATASETS] = "digits"
    predictor: Annotated[str, PREDICTORS] = "directpred"
    loss: Annotated[str, LOSSES] = "cosine"
    seed: Annotated[int, (0, math.inf)] = 0
    epochs: Positive = 30
    batch_size: Annotated[int, (2, math.inf)] = 128
    width: Positive = 32
    hidden: Positive = 256
    dim: Annotated[int, (2, math.inf)] = 64
    lr: NonNegative = 0.03
    momentum: Share = 0.9
    weight_decay: NonNegative = 4e-4
    target_momentum: Share = 0.996
    rho: Annotated[float, (0, 0.9999)] = 0.3
    eps: Annotated[float | None, (0, math.inf)] = None
    freq: Positive = 1
    rotate: Annotated[float, (0, 180)] = 15.0
    shift: Share = 0.1
    zoom: Annotated[float, (0, 0.99)] = 0.2
    brightness: Share = 0.4
    noise: NonNegative = 0.1
    evaluate_every: Positive = 2
    threads: Positive = 1

    @classmethod
    def parse(cls, options: Mapping[Any, Any]) -> Recipe:
        """A recipe from options as a command line, a YAML file or a checkpoint spells them.

        Args:
            options: Values, or strings of them, by the names of the attributes.

        Returns:
            The recipe, with the default for each option that is left out.

        Raises:
            UsageError: An option is unknown, of another type, or out of range.
        """
        hints = get_type_hints(cls, include_extras=True)
        for name in options:
            if name not in hints:
                raise UsageError(f"unknown option {name!r}; known are {', '.join(hints)}")
        return cls(**{name: _value(name, hints[name], given) for name, given in options.items()})


@cache
def descriptions() -> dict[str, str]:
    """What each option of a `Recipe` means, from the class's own docstring, for ``--help``."""
    lines = [line.strip() for line in (Recipe.__doc__ or "").splitlines()]
    return {
        field.name: f"{text} Default: {'null' if field.default is None else field.default}."
        for field in fields(Recipe)
        for name, _, text in (line.partition(": ") for line in lines)
        if name == field.name
    }


def _value(name: str, hint: Any, given: Any) -> Any:
    """``given`` as the type of the hint, an ``Annotated[type, (low, high) or choices]``."""
    kind, allowed = get_args(hint)
    if kind is str:
        if given not in allowed:
            raise UsageError(f"unknown {name} {given!r}; known are {', '.join(allowed)}")
        return given
    if get_origin(kind) is not None or kind not in (int, float):  # float | None
        if given is None or given in ("null", "None"):
            return None
        kind = float
    what = "a whole number" if kind is int else "a number"
    try:
        if isinstance(given, bool) or (kind is int and isinstance(given, float)):
            raise ValueError
        value = kind(given)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {what}, not {given!r}") from None
    low, high = allowed
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UsageError(f"{name} must be {what}, {limits}, not {given!r}")
    return value
