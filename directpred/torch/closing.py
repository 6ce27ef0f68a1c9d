"""When a step ends: after an optimizer's step, by hand, or by itself; for several heads at once.

Heads whose step ends together share one collective over the ranks. It is started first, so that
an optimizer's own work runs beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from directpred.correlation import Moments
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
        head._stepped_by_hand = True
    Pending(heads).close()


class Pending:
    """A step of some heads that is about to be closed: their statistics are on the way.

    Args:
        heads: The heads; with several ranks also those that have no rows on this one.
    """

    def __init__(self, heads: Sequence[DirectPredHead]) -> None:
        self._heads = heads
        self._batches: list[Moments | None] = [head._gathered for head in heads]
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
        self.heads: list[weakref.ref[DirectPredHead]] = []
        self.pending: Pending | None = None
        self.handles: list[RemovableHandle] = []

    def add(self, head: DirectPredHead, optimizer: torch.optim.Optimizer) -> None:
        """Close the steps of a head too."""
        self.heads.append(weakref.ref(head))
        if not self.handles:
            self.handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def remove(self, head: DirectPredHead) -> None:
        """Close the steps of a head no more."""
        self.heads = [each for each in self.heads if each() not in (None, head)]
        if not self.heads:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:  # a closure's forward passes are still to come
            self.pending = self._start()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pending, self.pending = self.pending or self._start(), None
        # Set by a gradient scaler on optimizers that do the skipping themselves (fused).
        found_inf = getattr(optimizer, "found_inf", None)
        pending.close(None if found_inf is None else found_inf.any())

    def _start(self) -> Pending:
        return Pending([head for each in self.heads if (head := each()) is not None])


attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attached] = weakref.WeakKeyDictionary()
"""The hooks of each optimizer that heads are attached to."""
