"""Which optimizer's step ends that of a head attached to none, and a word when none does.

A gradient that reaches a head goes on to the parameters in front of it. The optimizer that steps
these is the one: PyTorch calls a hook after the step of any optimizer. The head then follows it as
if it had been attached, until another one steps them.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from directpred.torch.closing import after_backward, attached, close_after
from directpred.torch.ranks import several

if TYPE_CHECKING:
    from directpred.torch.head import DirectPredHead

heads: weakref.WeakKeyDictionary[DirectPredHead, None] = weakref.WeakKeyDictionary()
"""All heads, in the order in which they were made: with several ranks it is that of collectives."""

FEW = 3
"""Steps of the optimizer in front of a head, while it waits for another, that are no accident."""

SEVERAL = 10
"""Such steps without a closing by hand, of a head that was closed so before."""

LONG = 50
"""Backward passes without a step, or steps without a backward pass, before a head says so."""


class Leaves(NamedTuple):
    """The tensors that a gradient ends at.

    Attributes:
        ids: The `id` of each.
        parameters: Of those that are an `nn.Parameter`.
        shapes: How many there are of each shape.
        narrow: Whether one is in half precision, of which an optimizer may hold copies in float32.
        opaque: Whether no parameter is among them, but a function behind which there may be some.
    """

    ids: frozenset[int]
    parameters: frozenset[int]
    shapes: Counter[tuple[int, ...]]
    narrow: bool
    opaque: bool


def register(head: DirectPredHead) -> None:
    """Let a head see the steps of all optimizers."""
    global _watching
    if not _watching:
        register_optimizer_step_post_hook(_after_step)
        _watching = True
    heads[head] = None


_watching = False


def leaves(*starts: Any) -> Leaves:
    """Find the leaves of the graph behind nodes of it, or tensors that are leaves themselves."""
    found = {id(x): x for x in starts if isinstance(x, Tensor) and x.requires_grad}
    seen, stack, opaque = set(), [x for x in starts if not isinstance(x, Tensor)], False
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
        with contextlib.suppress(RuntimeError):  # a custom function is gone with its graph
            stack += [parent for parent, _ in node.next_functions]
    parameters = frozenset(key for key, x in found.items() if isinstance(x, nn.Parameter))
    shapes = Counter(tuple(x.shape) for x in found.values())
    narrow = any(x.dtype.itemsize < 4 for x in found.values())
    return Leaves(frozenset(found), parameters, shapes, narrow, opaque and not parameters)


def steps(optimizer: Optimizer, reached: Leaves, sharded: bool = False) -> bool:
    """Tell whether an optimizer steps the leaves that a gradient reached.

    One that holds a part of them does if no other holds them all. One that holds other copies does
    if none holds themselves: copies in float32 of half precision, or the shards of FSDP 2.

    Args:
        optimizer: The optimizer.
        reached: The leaves.
        sharded: Whether the parameters may be shared out over optimizers on several ranks, as by
            `ZeroRedundancyOptimizer`: then one inside of another that holds more does not.
    """
    mine = _parameters(optimizer)
    if mine.keys() & reached.ids:
        whole = reached.parameters
        if whole <= mine.keys() and not sharded:
            return True  # without a look around, which takes time
        others = [_parameters(x).keys() for x in _living()]
        if sharded and any(mine.keys() < other for other in others):
            return False
        return whole <= mine.keys() or not any(whole <= other for other in others)
    copies = Counter(
        tuple(p.shape)
        for p in mine.values()
        if hasattr(p, "full_tensor") or (reached.narrow and p.dtype.itemsize >= 4)
    )
    if copies and reached.shapes <= copies:
        return not any(_parameters(x).keys() & reached.ids for x in _living())
    return reached.opaque and any(p.grad is not None for p in mine.values())


def search(reached: Leaves | None) -> Literal["owner", "others", "none"]:
    """Look for an optimizer that steps the leaves reached, among all in memory."""
    if reached is not None and any(steps(x, reached) for x in _living()):
        return "owner"
    if _living():
        gc.collect()  # it may be of a loop that is over
    return "others" if _living() else "none"


def _living() -> list[Optimizer]:
    return [x for x in gc.get_objects() if issubclass(type(x), Optimizer)]


def _parameters(optimizer: Optimizer) -> dict[int, Tensor]:
    groups = getattr(optimizer, "param_groups", ())  # not all call `Optimizer.__init__`
    return {id(p): p for group in groups for p in group["params"]}


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Close the step of the heads that wait for this optimizer, and let them follow it."""
    ended = [head for head in list(heads) if _ends(optimizer, head)]
    if ended:
        close_after(optimizer, ended)
        for head in ended:
            after_backward(partial(head._follow, optimizer))


def _ends(optimizer: Optimizer, head: DirectPredHead) -> bool:
    """Tell whether the step of an optimizer ends that of a head that does not follow it."""
    watch = head._watch
    followed = watch.followed()
    # Rows of its own, which a copy or a loaded state has not; or on their way in a backward pass.
    own = (watch.holds_rows() and watch.passes > 0) or watch.arriving()
    if not own or followed is optimizer:
        return False
    reached = head._reached()
    if reached is None:
        return followed is None and not watch.by_hand and _is_the_only_one(head)
    watch.foreign += bool(_parameters(optimizer).keys() & reached.ids)
    # A step of the one followed, around this one, closes that of the head by itself.
    if followed is not None and attached[followed].stepping and watch.foreign < FEW:
        return False
    if not steps(optimizer, reached, several(head.process_group)) and watch.foreign < FEW:
        watch.stepped = True
        return False
    if watch.by_hand:
        if watch.foreign < SEVERAL:
            return False
        watch.by_hand = False
        head._say(
            "by hand",
            f"was closed by head.step() before, but not in the last {SEVERAL} steps of the "
            "optimizer in front of it, after which it closes its steps from now on",
        )
        return True
    if followed is None or not watch.attached:
        return True
    theirs = f"({type(followed).__name__}) whose step() has not run, while another"
    if _parameters(followed).keys() == _parameters(optimizer).keys():
        if watch.foreign < FEW:
            return False
        head._say(
            "twin",
            f"was attached to an optimizer {theirs} ({type(optimizer).__name__}) with the same "
            "parameters has stepped: it closes its steps after that one. head.attach(optimizer) "
            "with the optimizer whose step() runs says so",
        )
        return True
    if watch.foreign == FEW:
        head._say(
            "foreign",
            f"is attached to an optimizer {theirs} ({type(optimizer).__name__}) has stepped the "
            f"parameters in front of it {FEW} times: its weight is not set. Call "
            "head.attach(optimizer) with the optimizer whose step() runs",
        )
    return False


def _is_the_only_one(head: DirectPredHead) -> bool:
    """Tell whether a head that does not know its leaves, in compiled code, need not know them."""
    if len(_living()) > 1:
        gc.collect()
    if (count := len(_living())) > 1:
        head._say(
            "compiled",
            f"runs in code that hides which of {count} optimizers steps the parameters in front of "
            "it: its weight is not set. Call head.attach(optimizer)",
        )
    return count == 1
