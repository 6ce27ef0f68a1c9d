"""Which optimizer's step ends that of a head attached to none, and a word when none does.

A gradient that reaches a head goes on to the parameters in front of it. The optimizer that steps
these is the one: PyTorch calls a hook after the step of any optimizer.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from directpred.torch.closing import Pending, attached, skipped_by

if TYPE_CHECKING:
    from directpred.torch.head import DirectPredHead

heads: weakref.WeakKeyDictionary[DirectPredHead, None] = weakref.WeakKeyDictionary()
"""All heads, in the order in which they were made: with several ranks it is that of collectives."""

STRANGE = 3
"""Steps of the optimizer in front of a head, while it waits for another, before it says so."""

LONG = 50
"""Backward passes without a step, or steps without a backward pass, before a head says so."""


class Leaves(NamedTuple):
    """The parameters that a gradient reached.

    Attributes:
        ids: The `id` of each.
        shapes: How many there are of each shape.
        narrow: Whether one is in half precision, of which an optimizer may hold copies in float32.
        opaque: Whether there may be more, behind a function that autograd does not look into.
    """

    ids: frozenset[int]
    shapes: Counter[tuple[int, ...]]
    narrow: bool
    opaque: bool


def register(head: DirectPredHead) -> None:
    """Let a head see the steps of all optimizers."""
    if not heads:
        _watch_optimizers()
    heads[head] = None


def leaves(*outputs: Tensor) -> Leaves:
    """Find the parameters that the gradient of tensors reaches."""
    found = {id(x): x for x in outputs if x.requires_grad and x.is_leaf}
    opaque = False
    seen, stack = set(), [x.grad_fn for x in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            # FSDP 1 flattens parameters, and its optimizer may hold the original ones.
            for each in (leaf, *(getattr(leaf, "_params", None) or ())):
                found[id(each)] = each
        opaque |= isinstance(node, torch.autograd.function.BackwardCFunction)
        stack += [parent for parent, _ in node.next_functions]
    shapes = Counter(tuple(leaf.shape) for leaf in found.values())
    narrow = any(leaf.dtype.itemsize < 4 for leaf in found.values())
    return Leaves(frozenset(found), shapes, narrow, opaque)


def owns(optimizer: Optimizer, reached: Leaves) -> bool:
    """Tell whether an optimizer steps the parameters reached, or other copies of them.

    Those are the copies in float32 of parameters in half precision, or the shards of FSDP 2.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) in reached.ids for p in parameters):
        return True
    copies = [tuple(p.shape) for p in parameters if reached.narrow or hasattr(p, "full_tensor")]
    return bool(copies) and reached.shapes <= Counter(copies)


def may_step(reached: Leaves) -> bool:
    """Tell whether there is an optimizer whose step the parameters reached may be waiting for."""
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]
    return any(owns(x, reached) or (reached.opaque and _has_gradients(x)) for x in optimizers)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True


_watching = False


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Close the step of the heads that waited for this optimizer, and attach them to it."""
    closed = [head for head in list(heads) if _waits_for(head, optimizer)]
    if not closed:
        return
    Pending(closed).close(skipped_by(optimizer))
    for head in closed:
        head._follow(optimizer)


def _waits_for(head: DirectPredHead, optimizer: Optimizer) -> bool:
    watch = head._watch
    if watch.gathered is None or watch.by_hand:
        return False
    named = watch.closes_after()
    if named is optimizer or (named is not None and attached[named].stepping):
        return False  # its own hooks close the step
    reached = watch.leaves
    if named is None or not watch.attached:
        unseen = reached is None  # by code that is compiled
        hidden = reached and reached.opaque and _has_gradients(optimizer)
        return bool(unseen or hidden or (reached and owns(optimizer, reached)))
    if reached is None or not owns(optimizer, reached):
        return False
    theirs = f"({type(named).__name__}) whose step() has not run, while another"
    if _parameters(named) == _parameters(optimizer):
        say(
            head,
            f"was attached to an optimizer {theirs} ({type(optimizer).__name__}) with the same "
            "parameters has stepped: it closes its steps after that one. head.attach(optimizer) "
            "with the optimizer whose step() runs says so",
        )
        return True
    watch.strange += 1
    if watch.strange == STRANGE:
        say(
            head,
            f"is attached to an optimizer {theirs} ({type(optimizer).__name__}) has stepped the "
            f"parameters in front of it {STRANGE} times: its weight is not set. Call "
            "head.attach(optimizer) with the optimizer whose step() runs",
        )
    return False


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def say(head: DirectPredHead, what: str) -> None:
    """Warn about a head, once for each thing."""
    key = what[:40]
    if key not in head._watch.said:
        head._watch.said.add(key)
        warnings.warn(f"a {type(head).__name__}({head.dim}) {what}", stacklevel=2)
