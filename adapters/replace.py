"""What the adapters for PyTorch share: a learned predictor out, a `DirectPredHead` in, and back.

An adapter says where its codebase keeps the predictor (`find`), and hands that to `replace`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from directpred.torch import DirectPredHead

__all__ = ["Found", "find", "named", "replace", "restore"]

Predicate = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Found:
    """A learned predictor and where it stands.

    Attributes:
        predictor: The predictor.
        slots: The objects that hold it, each with the name of the attribute.
        path: Where it is, for messages.
        model: The model, or the part of it that makes the features.
    """

    predictor: nn.Module
    slots: tuple[tuple[Any, str], ...]
    path: str
    model: nn.Module


def named(name: str) -> Predicate:
    """Accept submodules held under that attribute name."""
    return lambda attribute, module: attribute == name


def find(model: nn.Module, wanted: Predicate, looked_for: str) -> Found:
    """Find the one predictor in a model, also inside of wrappers such as DDP.

    Args:
        model: The model.
        wanted: Tells from its attribute name and itself whether a submodule is the predictor.
        looked_for: The same in words, for messages.

    Raises:
        TypeError: Not a module.
        ValueError: There is no such submodule, or more than one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    slots: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    paths: dict[nn.Module, str] = {}
    for prefix, owner in model.named_modules():
        for name, child in owner._modules.items():  # named_children() would hide a second slot
            if child is not None and wanted(name, child):
                slots.setdefault(child, []).append((owner, name))
                paths.setdefault(child, f"{prefix}.{name}".removeprefix("."))
    kind = type(model).__name__
    if not slots:
        children = ", ".join(name for name, _ in model.named_children()) or "nothing"
        raise ValueError(
            f"no predictor found in {kind}: looked for {looked_for} in all its submodules (it "
            f"holds {children}); pass the module that holds the predictor"
        )
    if len(slots) > 1:
        raise ValueError(
            f"{len(slots)} predictors found in {kind}, {', '.join(paths.values())}: pass the "
            "submodule that holds the one to replace, or call once for each"
        )
    ((predictor, where),) = slots.items()
    return Found(predictor, tuple(where), paths[predictor], model)


def replace(
    found: Found,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    kind: type[DirectPredHead] = DirectPredHead,
    **head_options: Any,
) -> DirectPredHead:
    """Put a `DirectPredHead` where a learned predictor stands.

    The head has the predictor's width, device and mode, and float64 where the predictor has. In an
    optimizer, the group of the replaced parameters stays, empty if it held nothing else: learning
    rate schedules count on the number of groups.

    Args:
        found: The predictor.
        optimizer: The optimizer, if it is built already: the replaced parameters and their momenta
            are taken out, and the head closes its steps after `optimizer.step()`. Of several, it is
            the first that holds parameters of the model apart from the predictor's. Wrappers that
            keep a torch optimizer in their attribute ``optimizer`` are looked through.
        kind: A subclass, where the codebase calls its predictor in another way.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError: Of the wrong type: the optimizer; or the model is wrapped so that its predictor
            cannot be replaced any more.
        ValueError: The predictor is not square or its width cannot be told; an option of the head
            is wrong; the optimizer is that of another model. Nothing has then been changed.
    """
    predictor, optimizers = found.predictor, _optimizers(optimizer)
    dim = _width(found)
    wrappers = _wrappers(list(found.model.modules()), predictor)
    old = list(predictor.parameters())
    main = _main(found, optimizers) if optimizers else None
    removed = [entry for each in optimizers for entry in _entries(each, old)]
    if head_options.get("between") == "train" and optimizers and not removed:
        raise ValueError(
            f"between='train' needs the weight in an optimizer, but none given trains {found.path}"
        )
    defaults: dict[str, Any] = {"device": old[0].device}
    if old[0].dtype == torch.float64:
        defaults["dtype"] = torch.float64
    head = kind(dim, **{**defaults, **head_options}).train(predictor.training)

    for owner, name in found.slots:
        setattr(owner, name, head)
    for entry in removed:
        entry.take_out()
    for parameter in head.parameters():
        if removed:
            removed[0].group()["params"].append(parameter)
    for wrapper in wrappers:
        _rebuild(wrapper)
    if main is not None:
        head.attach(main)
    elif not hasattr(found.model, "configure_optimizers"):  # Lightning builds it later
        warnings.warn(
            "no optimizer was given: one that is built already still holds the replaced "
            "parameters, and the head closes its steps by itself, which is wrong with gradient "
            "accumulation; pass optimizer=..., or head.attach(optimizer) once it is built",
            stacklevel=3,
        )
    _replaced[head] = _Replaced(
        predictor, [(weakref.ref(owner), name) for owner, name in found.slots], removed
    )
    return head


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
    heads = [m for m in modules if isinstance(m, DirectPredHead) and m in _replaced]
    if len(heads) != 1:
        raise ValueError(
            f"expected one head that replaced a predictor in {type(model).__name__}, found "
            f"{len(heads)}: pass the head to undo, in the process that replaced the predictor"
        )
    (head,) = heads
    wrappers = _wrappers(modules, head)
    record = _replaced.pop(head)
    head.detach()
    record.predictor.to(head.weight.device).train(head.training)
    for entry in record.removed:
        entry.put_back(head)
    for reference, name in record.slots:
        if (owner := reference()) is not None:
            setattr(owner, name, record.predictor)
    for wrapper in wrappers:
        _rebuild(wrapper)
    return record.predictor


@dataclass
class _Entry:
    """A parameter's place in an optimizer, and its state there (momentum, say)."""

    optimizer: weakref.ref[Optimizer]
    index: int
    position: int
    parameter: nn.Parameter
    state: dict[str, Any]

    def group(self) -> dict[str, Any]:
        """The group, by its index: loading a checkpoint makes new ones."""
        optimizer = self.optimizer()
        return {"params": []} if optimizer is None else optimizer.param_groups[self.index]

    def take_out(self) -> None:
        group = self.group()
        group["params"] = [p for p in group["params"] if p is not self.parameter]
        if optimizer := self.optimizer():
            optimizer.state.pop(self.parameter, None)

    def put_back(self, head: DirectPredHead) -> None:
        mine = {id(p) for p in head.parameters()}
        group = self.group()
        group["params"] = [p for p in group["params"] if id(p) not in mine]
        group["params"].insert(self.position, self.parameter)
        if (optimizer := self.optimizer()) and self.state:
            optimizer.state[self.parameter] = {
                name: x.to(self.parameter.device) if isinstance(x, Tensor) and x.dim() else x
                for name, x in self.state.items()
            }


@dataclass
class _Replaced:
    predictor: nn.Module
    slots: list[tuple[weakref.ref[Any], str]]
    removed: list[_Entry]


# Beside the heads and not in them: the replaced parameters are no part of the model any more, and
# must not come along in its state_dict, its copies and its pickles.
_replaced: weakref.WeakKeyDictionary[DirectPredHead, _Replaced] = weakref.WeakKeyDictionary()


def _width(found: Found) -> int:
    where = f"the predictor {found.path} ({type(found.predictor).__name__})"
    if isinstance(found.predictor, DirectPredHead):
        raise ValueError(f"{where} is a DirectPredHead already; restore(model) undoes that")
    layers = [m for m in found.predictor.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{where} has no nn.Linear to tell the width of the features from; put "
            "directpred.torch.DirectPredHead(dim) in its place by hand"
        )
    parameters = list(found.predictor.parameters())
    if any(isinstance(p, nn.parameter.UninitializedParameter) or p.is_meta for p in parameters):
        raise ValueError(f"{where} is not initialised yet: run a forward pass, then replace it")
    width, out = layers[0].in_features, layers[-1].out_features
    if width != out:
        raise ValueError(
            f"{where} is not square: it maps features of width {width} to {out}; DirectPred needs "
            "projector outputs as wide as the targets"
        )
    return width


def _optimizers(given: Any) -> list[Optimizer]:
    several = isinstance(given, list | tuple)
    optimizers = []
    for each in given if several else [] if given is None else [given]:
        inner = each
        while isinstance(getattr(inner, "optimizer", None), Optimizer):  # Lightning, Accelerate
            inner = inner.optimizer
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(each).__name__}")
        optimizers.append(inner)
    return optimizers


def _main(found: Found, optimizers: list[Optimizer]) -> Optimizer:
    """The optimizer that trains what is in front of the predictor."""
    inside = {id(p) for p in found.predictor.parameters()}
    before = {id(p) for p in found.model.parameters()} - inside
    for optimizer in optimizers:
        if any(id(p) in before for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise ValueError(
        f"the optimizer ({', '.join(type(o).__name__ for o in optimizers)}) holds no parameter of "
        f"{type(found.model).__name__} apart from those of {found.path}: give that of this model"
    )


def _entries(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Iterator[_Entry]:
    wanted = {id(p) for p in parameters}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) in wanted:
                state = dict(optimizer.state.get(p, {}))
                yield _Entry(weakref.ref(optimizer), index, position, p, state)


def _modules(model: Any) -> list[nn.Module]:
    """All modules of a model, or of the modules in the attributes of a trainer."""
    parts = [model] if isinstance(model, nn.Module) else vars(model).values()
    modules = (m for part in parts if isinstance(part, nn.Module) for m in part.modules())
    return list(dict.fromkeys(modules))


def _wrappers(modules: list[nn.Module], predictor: nn.Module) -> list[DistributedDataParallel]:
    """The DDP wrappers around a predictor, which must be told when its parameters change."""
    wrappers = []
    for module in dict.fromkeys([*modules, predictor]):
        if predictor not in module.modules():
            continue
        kind = type(module).__name__
        if isinstance(module, nn.DataParallel | FullyShardedDataParallel | FSDPModule):
            raise TypeError(
                f"the predictor is inside of {kind}: replace it before the model is wrapped (and "
                "take DistributedDataParallel in place of nn.DataParallel)"
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
    del wrapper.reducer, wrapper.logger  # its hooks on the parameters go with it
    # The ranks agree already, and buffers that differ by rank have to stay.
    DistributedDataParallel.__init__(
        wrapper, module, init_sync=False, bucket_cap_mb=megabytes, **arguments
    )
    wrapper.broadcast_buffers = broadcast
    wrapper.train(training)
