"""When a step ends: after an optimizer's step, by hand, or by itself; for several heads at once.

Heads whose step ends together share one collective over the ranks. It is started first, so that
an optimizer's own work runs beside it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from directpred.correlation import Moments, cast
from directpred.torch.ranks import several, sum_over_ranks

if TYPE_CHECKING:
    from directpred.torch.head import DirectPredHead
    from directpred.torch.owner import Leaves


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
        head._watch.by_hand = True
    Pending(heads).close()


class Watch:
    """What a head knows between two steps; no part of its state, but for what is gathered.

    Attributes:
        gathered: Moments of the rows that belong to the step so far.
        passes: How many forward passes these came from.
        optimizer: The optimizer after whose steps the head closes its own.
        attached: Whether the user has said so.
        by_hand: Whether the user closes the steps.
        alone: Whether nothing else closes the steps, as far as is known.
        leaves: The parameters in front of the head.
        waiting: Forward passes since the last step that found rows of an earlier backward pass.
        strange: Steps of the optimizer in front of the head while it waits for another.
        idle: Steps of its optimizer in a row that found no rows.
        closed: Steps closed, as the host counts them, and the version of the buffer that says so;
            None once a graph of the user's, or compiled code, may count too.
        said: What the head has warned of.
        lock: For forward passes in several threads.
    """

    def __init__(self) -> None:
        self.gathered: Moments | None = None
        self.optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self.attached = False
        self.by_hand = False
        self.alone = False
        self.leaves: Leaves | None = None
        self.waiting = self.strange = self.idle = 0
        self.closed: tuple[int, object] | None = (0, None)
        self.said: set[str] = set()
        self.passes = 0
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: an optimizer's hooks belong to the original."""
        return _watch_of_a_copy, (self.gathered, self.by_hand)

    def drop(self) -> None:
        """Forget the rows of the step."""
        self.gathered = None
        self.passes = self.waiting = self.strange = 0

    def closes_after(self) -> torch.optim.Optimizer | None:
        """Return the optimizer that the head waits for, if it is still there."""
        return self.optimizer() if self.optimizer is not None else None


def _watch_of_a_copy(gathered: Moments | None, by_hand: bool) -> Watch:
    watch = Watch()
    watch.gathered, watch.by_hand = gathered, by_hand
    return watch


class Pending:
    """A step of some heads that is about to be closed: their statistics are on the way.

    Args:
        heads: The heads; with several ranks also those that have no rows on this one.
    """

    def __init__(self, heads: Sequence[DirectPredHead]) -> None:
        self._heads = heads
        gathered = ((head._watch.gathered, head.mean.dtype) for head in heads)
        self._batches = [batch and cast(batch, dtype) for batch, dtype in gathered]
        self._apart = [i for i, head in enumerate(heads) if several(head.process_group)]
        if self._apart:
            with torch.no_grad():
                self._sums = sum_over_ranks(
                    [self._batches[i] or heads[i]._nothing() for i in self._apart],
                    [heads[i].process_group for i in self._apart],
                )

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
    """The hooks of one optimizer that close the step of the heads attached to it."""

    def __init__(self) -> None:
        # In the order of attachment, which with several ranks is that of collectives.
        self.heads: weakref.WeakKeyDictionary[DirectPredHead, None] = weakref.WeakKeyDictionary()
        self.pending: Pending | None = None
        self.stepping = False
        self.handles: list[RemovableHandle] = []

    def add(self, head: DirectPredHead, optimizer: torch.optim.Optimizer) -> None:
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

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.stepping = True
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        # A closure's forward passes are still to come. What a failed step has left is replaced.
        self.pending = Pending([*self.heads]) if closure is None else None

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pending, self.pending = self.pending or Pending([*self.heads]), None
        self.stepping = False
        for head in self.heads:
            head._notice_idle()
        pending.close(skipped_by(optimizer))


def skipped_by(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return whether a gradient scaler has skipped a step, 0-d bool, of optimizers that do it."""
    found_inf = getattr(optimizer, "found_inf", None)  # set by the scaler where they are fused
    return None if found_inf is None else found_inf.any()


attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attached] = weakref.WeakKeyDictionary()
"""The hooks of each optimizer that heads are attached to."""
