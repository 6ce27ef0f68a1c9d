"""The options of one training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from .errors import UsageError

PREDICTORS = (
    *("directpred", "eq18_printed", "directset", "directcopy", "boost_scale"),
    *("mlp", "linear", "none", "no_stopgrad"),
)
"""The predictors by name, in the order in which tables show them."""

LABELS = {
    "directpred": "DirectPred",
    "eq18_printed": "Eq. 18 as printed",
    "directset": "DirectSet",
    "directcopy": "DirectCopy",
    "boost_scale": "BoostScale",
    "mlp": "learned, 2-layer",
    "linear": "learned, linear",
    "none": "no predictor",
    "no_stopgrad": "no stop-gradient",
    "untrained": "untrained network",
}
"""The predictors, and the network before training, as tables and pictures call them."""

COMPARED = ("directpred", "mlp", "linear", "none", "no_stopgrad")
"""Those that are compared by default."""

DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "stl10", "imagenet", "folder")
"""The data sets by name."""

Positive = Annotated[int, (1, math.inf)]
NonNegative = Annotated[float, (0, math.inf)]
Share = Annotated[float, (0, 1)]
Switch = Annotated[bool, ()]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the numbers of a run; the defaults are the digits' recipe.

    Attributes:
        dataset: One of digits, fashion_mnist, cifar10, cifar100, stl10, imagenet, folder.
        validation: Share of the labelled training images that is held out and evaluated on in place
            of the test images, to choose options by; 0: none.
        method: byol, whose target is a moving average of the online network, or simsiam, whose
            target is the online network itself, without gradient.
        predictor: One of directpred (Eq. 18 over the largest eigenvalue), eq18_printed, directset,
            directcopy, boost_scale (as the published code, which has eps 0.01), mlp, linear, none,
            no_stopgrad.
        loss: cosine, or iso: the cosine's value with IsoLoss's gradient.
        seed: Decides the initial weights, the order of the images and their views.
        epochs: Passes over the training images.
        batch_size: Images an optimizer step, over all ranks; an incomplete last batch is left out.
        accumulate: Passes, forward and backward, that a step is spread over.
        backbone: small (for images of 8 to 32 pixels), resnet18 or resnet50.
        stem: cifar (3x3 first convolution, no pooling) or imagenet, of a ResNet; with imagenet
            the small backbone's first convolution has stride 2.
        width: Channels of the small backbone's first convolution; four times as many come out.
        projector_layers: 2 or 3 linear layers.
        hidden: Hidden units of the projector.
        predictor_hidden: Hidden units of the 2-layer predictor.
        dim: Width d of the features that enter the predictor.
        bn_affine: Whether the batch normalisations of projector and predictor scale and shift.
        bn_output: Whether one without scale and shift ends the projector, as SimSiam's.
        optimizer: sgd or lars.
        lr: Learning rate, for this batch size.
        momentum: Momentum of the optimizer.
        weight_decay: L2 penalty.
        decay_all: Whether biases and normalisations decay too (and LARS adapts their rates).
        schedule: Of the learning rate: constant, or cosine to 0 over the run.
        warmup: Epochs over which the learning rate rises linearly from 0.
        predictor_lr: Factor of the trained predictor's learning rate: it is this times lr.
        predictor_weight_decay: L2 penalty of the trained predictor; null: as weight_decay.
        fixed_predictor_lr: Whether the trained predictor's learning rate keeps its first value.
        symmetric: Whether the learned linear predictor starts symmetric and is made so again after
            every step: W becomes (W + Wᵀ) / 2.
        target_momentum: Share that byol's target keeps of itself at every step.
        target_schedule: Of that share: constant, or cosine up to 1 over the run.
        rho: Share that the running correlation keeps of itself at every step (Eq. 19).
        eps: Boost of the small eigenvalues (Eq. 18); null takes the default of the rule.
        freq: Steps from one setting of the predictor to the next.
        between: What happens to the predictor in between: hold or train.
        size: Side of the views in pixels.
        rotate: Views are rotated by up to this many degrees.
        shift: Views are shifted by up to this share of the side of the image.
        zoom: Views are scaled by a factor of 1 ± this.
        crop: A random part of the image, at least this share of its area, becomes the view; 1: all.
        flip: Probability of a mirrored view.
        brightness: Views are made brighter or darker by up to this share of the full range.
        jitter: Strength of the changes in brightness, contrast, saturation and hue.
        jitter_p: Probability of these changes.
        grayscale: Probability of a view without colour.
        blur: Probability of a Gaussian blur (kernel of a tenth of the side, sigma 0.1 to 2).
        blur2: The same for the second view, where it differs.
        solarize: Probability of a solarized second view.
        noise: Standard deviation of the Gaussian noise on the views; images lie in [0, 1].
        normalize: Whether views are normalised by the data set's mean and standard deviation.
        device: cpu, or auto, which takes a GPU where there is one.
        precision: 32, bf16 or fp16: of the networks, by autocast.
        channels_last: Whether images and convolutions keep their channels last in memory.
        compile: Whether torch.compile compiles the networks.
        evaluate_every: Epochs from one evaluation to the next; the last is always evaluated.
        probe: Protocol of the linear probe: logistic (scikit-learn's), adam (the published one for
            small images), or sgd (ImageNet's, with augmentation, by `directpred evaluate` alone).
        threads: CPU threads; the last digits of the numbers depend on it.
    """

    dataset: Annotated[str, DATASETS] = "digits"
    validation: Annotated[float, (0, 0.9)] = 0.0
    method: Annotated[str, ("byol", "simsiam")] = "byol"
    predictor: Annotated[str, PREDICTORS] = "directpred"
    loss: Annotated[str, ("cosine", "iso")] = "cosine"
    seed: Annotated[int, (0, 2**32 - 1)] = 0
    epochs: Positive = 45
    batch_size: Annotated[int, (2, math.inf)] = 64
    accumulate: Positive = 1
    backbone: Annotated[str, ("small", "resnet18", "resnet50")] = "small"
    stem: Annotated[str, ("cifar", "imagenet")] = "cifar"
    width: Positive = 32
    projector_layers: Annotated[int, (2, 3)] = 2
    hidden: Positive = 256
    predictor_hidden: Positive = 256
    dim: Annotated[int, (2, math.inf)] = 64
    bn_affine: Switch = False
    bn_output: Switch = False
    optimizer: Annotated[str, ("sgd", "lars")] = "sgd"
    lr: NonNegative = 0.03
    momentum: Share = 0.9
    weight_decay: NonNegative = 4e-4
    decay_all: Switch = True
    schedule: Annotated[str, ("constant", "cosine")] = "constant"
    warmup: NonNegative = 0.0
    predictor_lr: NonNegative = 1.0
    predictor_weight_decay: Annotated[float | None, (0, math.inf)] = None
    fixed_predictor_lr: Switch = False
    symmetric: Switch = False
    target_momentum: Share = 0.99
    target_schedule: Annotated[str, ("constant", "cosine")] = "constant"
    rho: Annotated[float, (0, 0.9999)] = 0.3
    eps: Annotated[float | None, (0, math.inf)] = None
    freq: Positive = 1
    between: Annotated[str, ("hold", "train")] = "hold"
    size: Annotated[int, (4, math.inf)] = 8
    rotate: Annotated[float, (0, 180)] = 25.0
    shift: Share = 0.15
    zoom: Annotated[float, (0, 0.99)] = 0.3
    crop: Annotated[float, (0.01, 1)] = 1.0
    flip: Share = 0.0
    brightness: Share = 0.4
    jitter: Annotated[tuple[float, ...], (0, 1)] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: Share = 0.0
    grayscale: Share = 0.0
    blur: Share = 0.0
    blur2: Annotated[float | None, (0, 1)] = None
    solarize: Share = 0.0
    noise: NonNegative = 0.15
    normalize: Switch = False
    device: Annotated[str, ("cpu", "auto")] = "cpu"
    precision: Annotated[str, ("32", "bf16", "fp16")] = "32"
    channels_last: Switch = False
    compile: Switch = False
    evaluate_every: Positive = 5
    probe: Annotated[str, ("logistic", "adam", "sgd")] = "logistic"
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

    @property
    def images(self) -> str:
        """The data set, and the share that stands for its test images, as titles name them."""
        return self.dataset + (f", validation {self.validation:g}" if self.validation else "")


@cache
def descriptions() -> dict[str, str]:
    """What each option of a `Recipe` means, from the class's own docstring, for ``--help``."""
    text = " ".join((Recipe.__doc__ or "").split()).partition("Attributes:")[2]
    starts = [text.index(f" {field.name}: ") for field in fields(Recipe)] + [len(text)]
    return {
        field.name: f"{text[start + len(field.name) + 3 : end].strip()} Default: {default}."
        for field, start, end in zip(fields(Recipe), starts, starts[1:], strict=False)
        for default in [spelled(field.default)]
    }


def spelled(value: Any) -> str:
    """An option's value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _value(name: str, hint: Any, given: Any) -> Any:
    """``given`` as the type of the hint, an ``Annotated[type, (low, high) or choices]``."""
    kind, allowed = get_args(hint)
    if kind is str:
        if str(given) not in allowed:
            raise UsageError(f"unknown {name} {given!r}; known are {', '.join(allowed)}")
        return str(given)
    if kind is bool:
        if str(given).lower() not in ("true", "false"):
            raise UsageError(f"{name} must be true or false, not {given!r}")
        return str(given).lower() == "true"
    if get_origin(kind) is tuple:
        parts = given.split(",") if isinstance(given, str) else given
        if not isinstance(parts, list | tuple) or len(parts) != 4:
            raise UsageError(f"{name} must be four numbers, not {given!r}")
        return tuple(_number(name, float, allowed, part) for part in parts)
    if kind not in (int, float):  # float | None
        if given is None or given in ("null", "None"):
            return None
        kind = float
    return _number(name, kind, allowed, given)


def _number(name: str, kind: type, allowed: tuple[float, float], given: Any) -> Any:
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
