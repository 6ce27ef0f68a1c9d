"""When a step ends: after an optimizer's step, by hand, or by itself; for several heads at once.

Heads whose step ends together share one collective over the ranks. It is started first, so that
an optimizer's own work runs beside it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from directpred.correlation import Moments, cast
from directpred.torch.ranks import several, sum_over_ranks

if TYPE_CHECKING:
    from directpred.torch.head import DirectPredHead


def step(model: nn.Module) -> None:
    """Close the step of every head in a model, with one collective over the ranks for all of them.

    For a training loop that attaches its heads to no optimizer; see `DirectPredHead.step`.

    Args:
        model: A module with heads anywhere in it.

    Raises:
        ValueError: There is no head in the model; or as `DirectPredHead.step`.
        RuntimeError: As `DirectPredHead.step`.
    """
    from directpred.torch.head import DirectPredHead

    heads = [module for module in model.modules() if isinstance(module, DirectPredHead)]
    if not heads:
        raise ValueError(f"there is no DirectPredHead in {type(model).__name__}")
    close_by_hand(heads)


def close_by_hand(heads: Sequence[DirectPredHead]) -> None:
    """Close the step of heads in a loop that calls for it, which they then leave it to."""
    for head in heads:
        head._watch.by_hand |= head._watch.gathered is not None
    Pending(heads).close()


class Watch:
    """What a head knows between two steps; no part of its state, but for what is gathered.

    Attributes:
        gathered: Moments of the rows that belong to the step so far.
        passes: How many forward passes of this head they came from.
        node: The last node of the graph in front of the head that these saw; or a leaf.
        backwards: How many backward passes.
        task: The number that autograd gave the last of them.
        stepped: Whether an optimizer has stepped that is not known to be the one.
        foreign: Steps of the one in front of the head, while it follows another.
        optimizer: The optimizer that the head follows: it closes its steps after those.
        attached: Whether the user has said so.
        by_hand: Whether the user closes the steps.
        found: What `owner.search` has found, while the head follows none.
        looks: How often that was to be known.
        idle: Steps of its optimizer in a row that found no rows.
        unused: Forward passes that took a gradient, or could have, and gathered nothing.
        used: Whether rows ever entered, or a state was loaded.
        closed: Steps closed, as the host counts them, and the version of the buffer that says so;
            None once a graph of the user's, or compiled code, may count too.
        said: What the head has warned of.
        lock: For backward passes in several threads.
    """

    def __init__(self, gathered: Moments | None = None, by_hand: bool = False) -> None:
        self.gathered = gathered
        self.node: Any = None
        self.passes = self.backwards = self.foreign = 0
        self.stepped = False
        self.optimizer: weakref.ref[Optimizer] | None = None
        self.attached = False
        self.by_hand = by_hand
        self.found = ""
        self.looks = self.idle = self.unused = self.task = 0
        self.used = False
        self.closed: tuple[int, object] | None = (0, None)
        self.said: set[str] = set()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: the optimizer belongs to the original."""
        return Watch, (self.gathered, self.by_hand)

    def drop(self) -> None:
        """Forget the rows of the step."""
        self.gathered = self.node = None
        self.passes = self.backwards = self.foreign = 0
        self.stepped = False

    def holds_rows(self) -> bool:
        """Tell whether there are rows; those that an export has traced are none, and dropped."""
        if self.gathered is not None and isinstance(self.gathered.outer, FakeTensor):
            self.drop()
        return self.gathered is not None

    def arriving(self) -> bool:
        """Tell whether a backward pass that is not over has reached rows of the head."""
        return in_backward() and self.task == torch._C._current_graph_task_id()

    def followed(self) -> Optimizer | None:
        """Return the optimizer that the head follows, if it is still there."""
        return self.optimizer() if self.optimizer is not None else None


class Pending:
    """A step of some heads that is about to be closed: their statistics are on the way.

    Args:
        heads: The heads; with several ranks also those that have no rows on this one.
    """

    def __init__(self, heads: Sequence[DirectPredHead]) -> None:
        self._heads = heads
        if not torch.compiler.is_compiling():
            for head in heads:
                head._watch.holds_rows()
        self._seen = [head._watch.gathered for head in heads]
        self._batches = [
            batch and cast(batch, head.mean.dtype)
            for batch, head in zip(self._seen, heads, strict=True)
        ]
        self._apart = [i for i, head in enumerate(heads) if several(head.process_group)]
        if self._apart:
            with torch.no_grad():
                self._sums = sum_over_ranks(
                    [self._batches[i] or heads[i]._nothing() for i in self._apart],
                    [heads[i].process_group for i in self._apart],
                )

    def holds(self) -> bool:
        """Tell whether no rows have come since."""
        now = (head._watch.gathered for head in self._heads)
        return all(a is b for a, b in zip(now, self._seen, strict=True))

    def close(self, skipped: Tensor | None = None) -> None:
        """Wait for the sums and close the step of all heads; one that raises does not stop others.

        Args:
            skipped: Whether a gradient scaler has skipped the optimizer's step, 0-d bool.
        """
        if self._apart:
            for i, summed in zip(self._apart, self._sums(), strict=True):
                self._batches[i] = summed
        error: ValueError | None = None
        for head, batch in zip(self._heads, self._batches, strict=True):
            try:
                if batch is not None:
                    head._close(batch, skipped)
            except ValueError as raised:
                error = error or raised
        if error is not None:
            raise error


class Attached:
    """The hooks of one optimizer that close the step of the heads that follow it."""

    def __init__(self) -> None:
        # In the order of attachment, which with several ranks is that of collectives.
        self.heads: weakref.WeakKeyDictionary[DirectPredHead, None] = weakref.WeakKeyDictionary()
        self.pending: Pending | None = None
        self.stepping = False
        self.handles: list[RemovableHandle] = []

    def add(self, head: DirectPredHead, optimizer: Optimizer) -> None:
        """Close the steps of a head too."""
        self.heads[head] = None
        if not self.handles:
            self.handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def remove(self, head: DirectPredHead) -> None:
        """Close the steps of a head no more."""
        self.heads.pop(head, None)
        if not self.heads:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stepping = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # The passes of a closure are still to come, and a backward pass goes on. What a step that
        # failed has left is replaced.
        begin = closure is None and not in_backward()
        self.pending = Pending([*self.heads]) if begin else None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        pending, self.pending, self.stepping = self.pending, None, False
        heads = [*self.heads]
        idle = [head for head in heads if head._watch.gathered is None]
        close_after(optimizer, heads, pending)
        for head in heads:
            head._notice_idle(head in idle)


def close_after(
    optimizer: Optimizer, heads: Sequence[DirectPredHead], pending: Pending | None = None
) -> None:
    """Close the step of heads after an optimizer's.

    Args:
        optimizer: It has stepped.
        heads: The heads.
        pending: Their statistics, if they are on the way. An optimizer may have run passes of its
            own since, whose rows are then summed too.
    """
    # Set by a gradient scaler on optimizers that leave out a step themselves (fused).
    found_inf = getattr(optimizer, "found_inf", None)
    skipped = None if found_inf is None else found_inf.any()

    def close() -> None:
        whole = pending if pending is not None and pending.holds() else Pending(heads)
        whole.close(skipped)

    # Of a backward pass, after all rows that it lets enter.
    after_backward(partial(after_backward, close))


def after_backward(run: Callable[[], Any]) -> None:
    """Run a function once the backward pass is over, if this is within one that gets there."""
    if in_backward() and not torch.compiler.is_compiling():  # compiled autograd does not wait
        Variable._execution_engine.queue_callback(run)
    else:
        run()


def in_backward() -> bool:
    """Tell whether this runs within a backward pass, as `torch.utils.checkpoint` tells it."""
    return bool(torch._C._current_graph_task_id() != -1)


attached: weakref.WeakKeyDictionary[Optimizer, Attached] = weakref.WeakKeyDictionary()
"""The hooks of each optimizer that heads follow."""
