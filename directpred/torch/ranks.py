"""Summing the statistics of all ranks: one collective a step, however many heads there are.

What it costs at many ranks is in docs/ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from directpred.correlation import Moments


def several(group: dist.ProcessGroup | None) -> bool:
    """Tell whether a group, by default that of all ranks, holds other ranks beside this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def sum_over_ranks(
    batches: Sequence[Moments], groups: Sequence[dist.ProcessGroup | None]
) -> Callable[[], list[Moments]]:
    """Start to sum moments over the ranks of their groups, and go on without the sums.

    Outer products, totals and rows of all batches that share group, dtype and device travel in one
    buffer. It needs no flag for features that are not finite: a NaN or infinity of one rank makes
    the sum of all of them not finite, so that every rank sees it and decides alike. Every rank gets
    the same bits.

    Args:
        batches: One for each head; every rank passes as many, in the same order, with rows = 0
            where it has none.
        groups: The process group of each, with other ranks in it.

    Returns:
        A function that waits for the sums and returns them in the order of the batches, with the
        rows as 0-d tensors.

    Raises:
        RuntimeError: Here or in that function: a rank is gone, or did not come within the timeout
            of the process group.
    """
    together: dict[object, list[int]] = {}
    for index, (batch, group) in enumerate(zip(batches, groups, strict=True)):
        together.setdefault((group, batch.outer.dtype, batch.outer.device), []).append(index)
    underway = []
    for members in together.values():
        parts = []
        for outer, total, rows in (batches[index] for index in members):
            parts += [outer.flatten(), total, _as_vector(rows, total)]
        buffer = torch.cat(parts)
        # Dynamo knows the collective only in the form that waits.
        work = dist.all_reduce(
            buffer, group=groups[members[0]], async_op=not torch.compiler.is_compiling()
        )
        underway.append((members, [part.numel() for part in parts], buffer, work))

    def wait() -> list[Moments]:
        sums = list(batches)
        for members, sizes, buffer, work in underway:
            if work is not None:
                work.wait()
            parts = iter(buffer.split(sizes))
            for index in members:
                outer, total, rows = next(parts), next(parts), next(parts)
                sums[index] = Moments(outer.view_as(batches[index].outer), total, rows[0])
        return sums

    return wait


def _as_vector(rows: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    """The number of rows as (1,); a number goes to the device without a synchronisation."""
    return rows.to(like).reshape(1) if isinstance(rows, torch.Tensor) else like.new_full((1,), rows)


class Kept:
    """Copies of tensors, with which to undo what DistributedDataParallel broadcasts into them.

    The broadcast does not show in the version of a tensor.

    Attributes:
        keeps: Whether they are the tensors of a head that closes steps, and not of a copy of one.
    """

    def __init__(self) -> None:
        self.keeps = False
        self._copies: list[torch.Tensor] = []
        self._places: list[int] = []

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """For copies, such as moving averages of a model."""
        return Kept, ()

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the values of tensors as theirs."""
        self._copies = [x.clone() for x in tensors]
        self._places = [x.data_ptr() for x in tensors]

    def restore(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the values kept back into the same tensors; others keep theirs."""
        if not self.keeps:
            return
        if [x.data_ptr() for x in tensors] == self._places:
            torch._foreach_copy_([*tensors], self._copies)
        else:
            self.keep(tensors)


def version(x: torch.Tensor) -> object:
    """Return what changes with every write into a tensor, and from one tensor to another."""
    return x.data_ptr(), x._version
