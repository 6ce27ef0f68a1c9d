"""Where the predictor of a model stands, what it is like, and which copies of it there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from directpred.torch.head import DirectPredHead

__all__ = ["Found", "Place", "attribute", "find", "head_options", "is_copy", "trains"]

Predicate = Callable[[str, nn.Module], bool]

# In BYOL, SimSiam, moco-v3, lightly, byol-pytorch, AFGRL, SPR (final_classifier) and many more.
NAMES = re.compile(
    r"(?:(?:online|student|query|base|byol|simsiam|ssl)_)?"
    r"(?:predictor|prediction|predict|pred)(?:_(?:head|mlp|net|network|layer|model))?"
    r"|h|q_net|q_network|(?:global_|local_)?final_classifier",
    re.IGNORECASE,
)
"""What codebases call the attribute that holds the predictor."""
USUAL = (
    "predictor, prediction_head, online_predictor, student_predictor, prediction_mlp, pred, "
    "q_network, h and their like"
)
ONLINE = {"online", "student", "query", "base", "q"}
TARGET = {"target", "teacher", "key", "momentum", "ema", "k", "offline", "averaged"}
"""Words in the names of the two sides of a siamese model."""


UNINITIALIZED = UninitializedParameter | UninitializedBuffer


@dataclass(frozen=True)
class Place:
    """A learned predictor and where it stands.

    Attributes:
        predictor: The predictor.
        slots: The objects that hold it, each with the name of the attribute.
        path: Where it is, for messages.
    """

    predictor: nn.Module
    slots: tuple[tuple[Any, str], ...]
    path: str


@dataclass(frozen=True)
class Found:
    """The predictor of a model.

    Attributes:
        online: The predictor and where it stands.
        model: The model, or the part of it that makes the features.
        copies: Copies of the predictor that a target network holds, and that follow it by a moving
            average: they are replaced too.
    """

    online: Place
    model: nn.Module
    copies: tuple[Place, ...] = ()


def find(model: nn.Module, wanted: str | Predicate | None = None, looked_for: str = "") -> Found:
    """Find the one predictor in a model, also inside of wrappers such as DDP.

    Args:
        model: The model.
        wanted: Its attribute or path; or a function that tells from attribute and submodule whether
            this is it; by default what codebases usually call it.
        looked_for: What the function looks for in words, for messages.

    Raises:
        TypeError: Not a module.
        ValueError: There is no such submodule, or there are several that are no copies of one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    places = _places(model)
    if wanted is None:
        looked_for = f"an attribute with a usual name ({USUAL})"
        some = [
            p
            for p in places
            if NAMES.fullmatch(attribute(p))
            and not isinstance(p.predictor, nn.ModuleList | nn.ModuleDict)  # none that is called
        ]
        # A predictor maps features to features: q_network, pred or h may be something else.
        some = [p for p in some if _is_square(p)] or some
    elif isinstance(wanted, str):
        looked_for = f"an attribute `{wanted}`"
        exact = [p for p in places if p.path == wanted]
        some = exact or [p for p in places if p.path.endswith(f".{wanted}")]
    else:
        some = [p for p in places if wanted(attribute(p), p.predictor)]
    some = _once(p for p in some if not any(_inside(p, other) for other in some))
    kind = type(model).__name__
    if not some:
        children = ", ".join(name for name, _ in model.named_children()) or "nothing"
        raise ValueError(
            f"no predictor found in {kind}: looked for {looked_for} in all its submodules (it "
            f"holds {children}); pass the predictor's attribute or path as name=..."
        )
    online = [p for p in some if not _is_target(p)] or some
    if len(online) > 1:
        listed = ", ".join(f"{p.path} ({type(p.predictor).__name__})" for p in online)
        raise ValueError(
            f"{len(online)} predictors found in {kind}, {listed}: pass the path of the one to "
            f"replace as name={online[0].path!r}, or call once for each"
        )
    copies = _once(p for p in places if is_copy(p, online[0]))
    leading = [p.path for p in copies if not _is_target(p)]
    if _side(online[0]) in TARGET and leading:
        raise ValueError(
            f"{online[0].path} follows {leading[0]}: pass name={leading[0]!r}, with which it is "
            "replaced too"
        )
    return Found(online[0], model, tuple(p for p in copies if _is_target(p)))


def _places(model: nn.Module) -> list[Place]:
    """Every submodule under every name that it has, with all the slots that hold it."""
    named: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {}
    for prefix, owner in model.named_modules():
        for name, child in owner._modules.items():  # named_children() would hide a second slot
            if child is not None:
                path = f"{prefix}.{name}".removeprefix(".")
                named.setdefault(child, []).append((owner, name, path))
    return [
        Place(child, tuple((owner, name) for owner, name, _ in slots), path)
        for child, slots in named.items()
        for _, _, path in slots
    ]


def _once(places: Iterable[Place]) -> list[Place]:
    """Each predictor by the first of its names."""
    once: dict[int, Place] = {}
    for place in places:
        once.setdefault(id(place.predictor), place)
    return list(once.values())


def attribute(place: Place) -> str:
    """Return the name under which a predictor is held."""
    return place.path.rpartition(".")[2]


def _words(path: str) -> list[str]:
    return re.split(r"[._]", path.lower())


def _inside(place: Place, other: Place) -> bool:
    parts = other.predictor.modules()
    return place.predictor is not other.predictor and any(m is place.predictor for m in parts)


def trains(place: Place) -> bool:
    """Tell whether any of a predictor's parameters asks for a gradient."""
    return any(p.requires_grad for p in place.predictor.parameters())


def _side(place: Place) -> str | None:
    """The first word of a path that tells on which side of a siamese model it is."""
    return next((word for word in _words(place.path) if word in ONLINE | TARGET), None)


def _is_target(place: Place) -> bool:
    """Tell whether a place belongs to the side of a model that follows the other."""
    side = _side(place)
    return not trains(place) if side is None else side in TARGET


def is_copy(place: Place, online: Place) -> bool:
    """Tell whether one module is built as another and stands under the same name."""

    def stem(p: Place) -> list[str]:
        return [word for word in _words(attribute(p)) if word not in ONLINE | TARGET]

    return (
        type(place.predictor) is type(online.predictor)
        and place.predictor is not online.predictor
        and stem(place) == stem(online)
        and _built(place.predictor) == _built(online.predictor)
    )


def _built(module: nn.Module) -> Any:
    """What a module is made of: kinds of modules, and names and shapes of tensors."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = [None if isinstance(x, UNINITIALIZED) else x.shape for _, x in tensors]
    return [type(m) for m in module.modules()], [name for name, _ in tensors], shapes


def _linear(module: nn.Module) -> list[nn.Linear | _ConvNd]:
    return [m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd)]


def _widths(layer: nn.Linear | _ConvNd) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _is_square(place: Place) -> bool:
    linear = _linear(place.predictor)
    already = isinstance(place.predictor, DirectPredHead)
    return already or (bool(linear) and _widths(linear[0])[0] == _widths(linear[-1])[1])


def head_options(found: Found, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Tell the width and the other options of a head that is to stand in for a predictor.

    Args:
        found: The predictor.
        given: Options that were given, which come first, dim among them.

    Raises:
        ValueError: It is a head already, not initialised or not square; or its layers do not tell.
    """
    predictor = found.online.predictor
    where = f"the predictor {found.online.path} ({type(predictor).__name__})"
    if isinstance(predictor, DirectPredHead):
        raise ValueError(f"{where} is a DirectPredHead already; restore(model) undoes that")
    parameters = list(predictor.parameters())
    if any(isinstance(p, UNINITIALIZED) or p.is_meta for p in parameters):
        raise ValueError(f"{where} is not initialised yet: run a forward pass, then replace it")
    # One without parameters stands for none; the features then are where the model is.
    like = next(iter([*parameters, *found.model.parameters()]), torch.zeros(()))
    options: dict[str, Any] = {"device": like.device}
    if like.dtype == torch.float64:
        options["dtype"] = torch.float64
    if "dim" not in given:
        options |= _shape(predictor, where)
    options |= given
    return options.pop("dim"), options


def _shape(predictor: nn.Module, where: str) -> dict[str, int]:
    linear = _linear(predictor)
    if not linear:
        raise ValueError(
            f"{where} has no nn.Linear and no 1x1 convolution to tell the width of the features "
            "from: pass it as dim=..."
        )
    width, out = _widths(linear[0])[0], _widths(linear[-1])[1]
    if width != out:
        raise ValueError(
            f"{where} is not square: it maps features of width {width} to {out}; DirectPred needs "
            "projector outputs as wide as the targets"
        )
    maps = [isinstance(layer, _ConvNd) for layer in linear]
    wide = [layer.kernel_size for layer in linear if isinstance(layer, _ConvNd)]
    if any(size != 1 for kernel in wide for size in kernel) or (any(maps) and not all(maps)):
        raise ValueError(
            f"{where} looks at more than one position of a feature map at once, and DirectPred "
            f"does not: to replace it anyway pass dim={width}, and channel_dim=1 for maps "
            "(n, channels, ...)"
        )
    # The axis that the layer itself acts on: none is to be guessed from the features.
    return {"dim": width, "channel_dim": 1 if any(maps) else -1}
