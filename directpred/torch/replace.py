"""A learned predictor out of a model that is built, a `DirectPredHead` in, and back.

An adapter that knows better where a predictor stands hands what it found to `replace`.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from directpred.torch.find import Found, Place, attribute, find, head_options, is_copy, trains
from directpred.torch.head import DirectPredHead
from directpred.torch.wrappers import layers

__all__ = ["replace", "replace_predictor", "restore"]

T = TypeVar("T")


def replace_predictor(
    model: nn.Module,
    optimizer: Any = None,
    name: str | None = None,
    **head_options: Any,
) -> DirectPredHead:
    """Put a `DirectPredHead` where the learned predictor of a model stands.

    Call it before or after the optimizer is built, and before or after `DistributedDataParallel`
    has the model. The head has the width, device and mode of the predictor, and float64 where the
    predictor has. The replaced parameters and their momenta leave every optimizer that holds them;
    their group stays, empty if it held nothing else, since schedules count on the number of groups.
    A target network's copy of the predictor is replaced too, by a head of its own.

    Args:
        model: The model.
        optimizer: The optimizer that trains the features, or a wrapper of it, or several: the head
            is then attached to the first that holds parameters of the model apart from the
            predictor's. Without it the head finds its optimizer by itself.
        name: The predictor's attribute, such as "predictor", or its path, "online.predictor". By
            default it is found by what codebases usually call it.
        **head_options: Options of `DirectPredHead`, `dim` and `channel_dim` among them where the
            predictor's own layers do not tell.

    Returns:
        The head; of a model with a target network, that of the online one.

    Raises:
        TypeError: Of the wrong type: the model, the optimizer, an option; or the model is wrapped
            so that its predictor cannot be replaced any more.
        ValueError: No predictor was found, or several; it is not square or its width cannot be
            told; an option of the head is wrong; the optimizer is that of another model. In any
            case nothing has then been changed.
    """
    return replace(find(model, name), optimizer, **head_options)


def replace(
    found: Found,
    optimizer: Any = None,
    kind: type[DirectPredHead] = DirectPredHead,
    **options: Any,
) -> DirectPredHead:
    """Put a `DirectPredHead` where a learned predictor was found; see `replace_predictor`.

    Args:
        found: The predictor.
        optimizer: As `replace_predictor`.
        kind: A subclass, where the codebase calls its predictor in another way.
        **options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `replace_predictor`.
    """
    places = [found.online, *found.copies]
    dim, options = head_options(found, options)
    given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    chains = [layers(each) for each in given if each is not None]
    main = _main(found, [chain[-1] for chain in chains]) if chains else None
    wrappers = _wrappers(list(found.model.modules()), [place.predictor for place in places])
    old = _parameters_of_its_own(found.model, [place.predictor for place in places])
    known = {id(x): x for chain in chains for x in chain}
    known |= {id(x): x for x in _in_memory(Optimizer) if id(x) not in known}
    removed = [entry for each in known.values() for entry in _entries(each, old)]
    if options.get("between") == "train" and chains and not removed:
        raise ValueError(
            "between='train' needs the weight in an optimizer, but none that is built trains "
            f"{found.online.path}"
        )
    heads = [kind(dim, **options).train(place.predictor.training) for place in places]
    for head, place in zip(heads, places, strict=True):
        head.requires_grad_(place is found.online or trains(place))
    swap = _Swap(places, heads, removed)
    _say_what_goes(found, dim)  # where warnings are errors, before anything has changed
    _say_what_stays(found)
    try:
        swap.do(wrappers)
        if main is not None:
            heads[0].attach(main)
    except BaseException:
        swap.undo(wrappers)
        raise
    _swaps.update(dict.fromkeys(heads, swap))
    return heads[0]


def restore(model: Any) -> nn.Module:
    """Undo `replace_predictor`: the user's own predictor is back, in the optimizer too.

    Args:
        model: What was given to `replace_predictor`, or the head that it returned.

    Returns:
        The predictor, as it was when it was replaced, on the model's device and in its mode.

    Raises:
        ValueError: There is no replaced predictor in the model, or more than one. A copy of a
            model does not know what the original replaced.
    """
    modules = _modules(model)
    swaps = [_swaps[m] for m in modules if isinstance(m, DirectPredHead) and m in _swaps]
    swaps = [swap for i, swap in enumerate(swaps) if swap not in swaps[:i]]
    if len(swaps) != 1:
        raise ValueError(
            f"expected one head that replaced a predictor in {type(model).__name__}, found "
            f"{len(swaps)}: pass the head to undo, in the process that replaced the predictor"
        )
    (swap,) = swaps
    online = swap.heads()[0]
    followed = online._watch.followed() if online is not None else None
    wrappers = _wrappers(modules, [head for head in swap.heads() if head is not None])
    for head, predictor in zip(swap.heads(), swap.predictors, strict=True):
        if head is not None:
            del _swaps[head]
            head.detach()
            predictor.to(head.weight.device).train(head.training)
    swap.undo(wrappers)
    predictor = swap.predictors[0]
    groups = (g for x in _in_memory(Optimizer) for g in getattr(x, "param_groups", ()))
    held = {id(p) for group in groups for p in group["params"]}
    if followed is not None and not any(id(p) in held for p in predictor.parameters()):
        warnings.warn(
            f"the optimizer ({type(followed).__name__}) was built after the predictor was "
            "replaced, and does not train the one that is back: call "
            "optimizer.add_param_group({'params': [*predictor.parameters()]})",
            stacklevel=_outside(),
        )
    return predictor


@dataclass
class _Entry:
    """A parameter's place in an optimizer, and its state there (momentum, say)."""

    optimizer: weakref.ref[Any]
    index: int
    position: int
    parameter: nn.Parameter
    state: dict[str, Any]

    def params(self) -> list[Any]:
        """The group's own list, by its index: loading a checkpoint makes new groups."""
        optimizer = self.optimizer()
        params: list[Any] = (
            [] if optimizer is None else optimizer.param_groups[self.index]["params"]
        )
        return params

    def take_out(self) -> None:
        params = self.params()  # changed in place: LBFGS and wrappers hold the same list
        params[:] = [p for p in params if p is not self.parameter]
        if (optimizer := self.optimizer()) is not None:
            optimizer.state.pop(self.parameter, None)

    def put_back(self) -> None:
        params = self.params()
        if all(p is not self.parameter for p in params):  # a wrapper shares its groups
            params.insert(self.position, self.parameter)
        if (optimizer := self.optimizer()) is not None and self.state:
            optimizer.state[self.parameter] = {
                name: x.to(self.parameter.device) if isinstance(x, Tensor) and x.dim() else x
                for name, x in self.state.items()
            }


class _Swap:
    """What was replaced by what, and where; it can be done and undone."""

    def __init__(
        self, places: list[Place], heads: list[DirectPredHead], removed: list[_Entry]
    ) -> None:
        self.predictors = [place.predictor for place in places]
        self.slots = [
            (i, weakref.ref(owner), name)
            for i, place in enumerate(places)
            for owner, name in place.slots
        ]
        self.removed = removed
        self.emptied: list[tuple[weakref.ref[Any], RemovableHandle | None]] = []
        self._heads = [weakref.ref(head) for head in heads]

    def heads(self) -> list[DirectPredHead | None]:
        """The heads, the online one first; None for one that is gone with its target network."""
        return [head() for head in self._heads]

    def do(self, wrappers: list[DistributedDataParallel]) -> None:
        """Put the heads in the predictors' places, and have the optimizers follow."""
        self._fill(self.heads())
        for entry in self.removed:
            entry.take_out()
        online, head = list(self.predictors[0].parameters()), self.heads()[0]
        home = next((x for x in self.removed if any(x.parameter is p for p in online)), None)
        if home is not None and head is not None:
            home.params().extend(head.parameters())
        self._let_scalers_step()
        for wrapper in wrappers:
            _rebuild(wrapper)

    def undo(self, wrappers: list[DistributedDataParallel]) -> None:
        """Put the predictors back."""
        mine = {id(p) for head in self.heads() if head is not None for p in head.parameters()}
        for entry in self.removed:
            params = entry.params()
            params[:] = [p for p in params if id(p) not in mine]
        for entry in self.removed:
            entry.put_back()
        for reference, handle in self.emptied:
            if (optimizer := reference()) is not None:
                del optimizer._step_supports_amp_scaling
            if handle is not None:
                handle.remove()
        self._fill(self.predictors)
        for wrapper in wrappers:
            _rebuild(wrapper)

    def _fill(self, modules: list[Any]) -> None:
        for index, reference, name in self.slots:
            if (owner := reference()) is not None:
                setattr(owner, name, modules[index])

    def _let_scalers_step(self) -> None:
        """Keep a `GradScaler` from failing at an optimizer that has no gradient any more.

        It raises where it has seen none, unless the optimizer says that it looks after
        infinities itself; one without parameters has none.
        """
        for optimizer in (entry.optimizer() for entry in self.removed):
            if optimizer is None:
                continue
            empty = not any(group["params"] for group in optimizer.param_groups)
            if empty and isinstance(optimizer, LBFGS):
                raise ValueError(
                    "LBFGS cannot step without parameters, and this one has only the predictor's: "
                    "take it out of the training loop, delete it, and replace the predictor then"
                )
            if empty and not getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer._step_supports_amp_scaling = True
                # What it is told of infinities then is refused by most: they get none to see.
                hooked = isinstance(optimizer, Optimizer)
                handle = optimizer.register_step_pre_hook(_forget_scaler) if hooked else None
                self.emptied.append((weakref.ref(optimizer), handle))


def _forget_scaler(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.grad_scale = optimizer.found_inf = None


# Beside the heads and not in them: the replaced parameters are no part of the model any more, and
# must not come along in its state_dict, its copies and its pickles.
_swaps: weakref.WeakKeyDictionary[DirectPredHead, _Swap] = weakref.WeakKeyDictionary()


def _say_what_goes(found: Found, width: int) -> None:
    """Warn of a normalisation at the end of a predictor, which the loss then does not see."""
    leaves = [m for m in found.online.predictor.modules() if not list(m.children())]
    last = [m for m in leaves if not isinstance(m, nn.Identity | nn.Dropout)][-1:]
    for norm in last:
        widths = [getattr(norm, name, None) for name in ("num_features", "num_channels")]
        widths += getattr(norm, "normalized_shape", [])
        if width in widths:
            name, kind = attribute(found.online), type(norm).__name__
            warnings.warn(
                f"the replaced predictor {found.online.path} ended in {kind}, which is gone with "
                f"it; to keep one, set model.{name} = torch.nn.Sequential(head, norm) and have the "
                "optimizer train its parameters",
                stacklevel=_outside(),
            )


def _say_what_stays(found: Found) -> None:
    """Warn of a copy of the predictor elsewhere, where a moving average would miss its partner."""
    if _copy_elsewhere(found) is None:
        return
    gc.collect()  # it may have been a model that is gone
    if (copy := _copy_elsewhere(found)) is not None:
        warnings.warn(
            f"outside of the model, {copy} is a copy of the predictor {found.online.path} that is "
            "replaced: a moving average that goes through the parameters of both, or loads the one "
            "into the other, needs it replaced too, by replace_predictor on the module that holds "
            "it",
            stacklevel=_outside(),
        )


def _copy_elsewhere(found: Found) -> str | None:
    """The name of a module outside of a model that is built as its predictor, and follows it."""
    online = found.online.predictor
    inside = {id(m) for m in [*found.model.modules(), *online.modules()]}
    groups = (g for o in _in_memory(Optimizer) for g in getattr(o, "param_groups", []))
    trained = {id(p) for group in groups for p in group["params"]}
    for owner in _in_memory(nn.Module):
        for name, child in list(vars(owner).get("_modules", {}).items()):
            if child is None or id(child) in inside:
                continue
            place = Place(child, ((owner, name),), name)
            if is_copy(place, found.online) and (
                not trains(place)
                or (
                    not any(id(p) in trained for p in child.parameters())
                    and all(map(_equal, child.parameters(), online.parameters()))
                )
            ):
                return f"{type(owner).__name__}.{name}"
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and torch.equal(a, b)


def _outside() -> int:
    """The stack level, for `warnings`, of the code that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        "directpred."
    ):
        frame, level = frame.f_back, level + 1
    return level


def _in_memory(kind: type[T]) -> Iterator[T]:
    """All living objects of a type; not by isinstance, which would run the code of lazy ones."""
    return (x for x in gc.get_objects() if issubclass(type(x), kind))


def _main(found: Found, optimizers: list[Optimizer]) -> Optimizer:
    """The optimizer that trains what is in front of the predictor."""
    inside = {id(p) for p in found.online.predictor.parameters()}
    before = {id(p) for p in found.model.parameters()} - inside
    for optimizer in optimizers:
        if any(id(p) in before for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise ValueError(
        f"the optimizer ({', '.join(type(o).__name__ for o in optimizers)}) holds no parameter of "
        f"{type(found.model).__name__} apart from those of {found.online.path}: give that of "
        "this model"
    )


def _parameters_of_its_own(model: nn.Module, predictors: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters of predictors that are not shared with other parts of the model."""
    others: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in others and all(module is not each for each in predictors):
            others.add(module)
            waiting += module.children()
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    return [p for each in predictors for p in each.parameters() if id(p) not in shared]


def _entries(optimizer: Any, parameters: list[nn.Parameter]) -> Iterator[_Entry]:
    wanted = {id(p) for p in parameters}
    for index, group in enumerate(getattr(optimizer, "param_groups", [])):
        for position, p in enumerate(group["params"]):
            if id(p) in wanted:
                state = dict(optimizer.state.get(p, {}))
                yield _Entry(weakref.ref(optimizer), index, position, p, state)


def _modules(model: Any) -> list[nn.Module]:
    """All modules of a model, or of the modules in the attributes of a trainer."""
    parts = [model] if isinstance(model, nn.Module) else vars(model).values()
    modules = (m for part in parts if isinstance(part, nn.Module) for m in part.modules())
    return list(dict.fromkeys(modules))


def _wrappers(modules: list[nn.Module], predictors: list[Any]) -> list[DistributedDataParallel]:
    """The DDP wrappers around predictors, which must be told when their parameters change."""
    wrappers = []
    for module in dict.fromkeys([*modules, *predictors]):
        if not any(m is predictor for m in module.modules() for predictor in predictors):
            continue
        kind = type(module).__name__
        if isinstance(module, FullyShardedDataParallel | FSDPModule):
            raise TypeError(f"the predictor is inside of {kind}: replace it before that has it")
        # On a CPU or one device it calls its module, and replicates nothing.
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise TypeError(
                f"the predictor is inside of {kind} on {len(module.device_ids)} devices, whose "
                "copies would forget what they gather: take DistributedDataParallel"
            )
        if isinstance(module, DistributedDataParallel):
            if module._comm_hooks or module.mixed_precision is not None:
                raise TypeError(
                    f"{kind} with communication hooks or mixed_precision cannot be told of the "
                    "change: replace the predictor before the model is wrapped"
                )
            wrappers.append(module)
    return wrappers


def _rebuild(wrapper: DistributedDataParallel) -> None:
    """Construct a DDP wrapper anew in place, by its own arguments.

    It waits for a gradient of every parameter that the model had when it was wrapped; one that is
    gone would stop the training.
    """
    training, broadcast = wrapper.training, wrapper.broadcast_buffers
    arguments: dict[str, Any] = {
        name: getattr(wrapper, name)
        for name in (
            "device_ids",
            "output_device",
            "dim",
            "process_group",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
        )
    }
    module, megabytes = wrapper.module, wrapper.bucket_bytes_cap / 2**20
    for name in ("reducer", "logger"):  # its hooks on the parameters go with it
        vars(wrapper).pop(name, None)
    # The ranks agree already, and buffers that differ by rank have to stay.
    DistributedDataParallel.__init__(
        wrapper, module, init_sync=False, bucket_cap_mb=megabytes, **arguments
    )
    wrapper.broadcast_buffers = broadcast
    wrapper.train(training)
