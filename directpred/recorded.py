"""Closings that a device records once and replays, so that a step costs one launch.

Outside of a recording is what the host decides: gathering, since rows vary, the collective over
ranks, and whether a weight is due. Inside is everything between the sums of a step and the new
state: about a hundred small kernels, whose launches would cost more than their work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from array_api_compat import is_cupy_array

from directpred.array import Array, array_namespace, assign, changed, device, fill, is_torch
from directpred.correlation import Moments, is_finite
from directpred.method import NOT_FINITE, Options, advance, is_due
from directpred.solvers import solvable_by_matmul
from directpred.state import State

Record: TypeAlias = Callable[[Callable[[], None], Array], Callable[[], None]]

WARM = 2
"""Closings that run as they are before one is recorded, so that libraries are loaded."""


class Recorder:
    """Closes the steps of one state on a device, from the third on by replaying a recording.

    A recording holds for the addresses, dtypes, shapes and options that it was made with; with
    others the closings run as they are, and are recorded anew. There are two: with a solve, and
    without for closings at which no weight is due.

    Args:
        record: From a function of arrays at fixed addresses to one that replays its work without
            running it in Python; raises `RuntimeError` where that cannot be done. None: never.
        in_place: Whether the state is written in place, which a recording needs.
    """

    def __init__(self, record: Record | None, in_place: bool = True) -> None:
        self.in_place = in_place
        self._record = record
        self._failed = ""  # why
        self._start(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: a copy of the state is elsewhere, and records its own."""
        return Recorder, (self._record, self.in_place)

    def _start(self, key: object) -> None:
        self._key = key
        self._seen = 0
        self._inputs: Inputs | None = None
        self._replays: dict[bool, Callable[[], None]] = {}

    def close(
        self, state: State, batch: Moments, options: Options, counts: Array, closings: int
    ) -> State:
        """Close a step, as `advance` does on a device.

        Args:
            state: All of it arrays; those are written over where `in_place` is set.
            batch: The moments of the step.
            options: Validated options.
            counts: As for `advance`.
            closings: Steps closed before, as the host counts them: what is not due is not computed.

        Returns:
            The state after the step.

        Raises:
            ValueError: With nonfinite="raise", which waits for the device: the batch or the weight
                is not finite. The state is as it was.

        Warns:
            UserWarning: The closing could not be recorded. The step is done by then.
        """
        raises = options.nonfinite == "raise"
        if raises and bool(counts) and not is_finite(batch):
            raise ValueError(NOT_FINITE)
        xp = array_namespace(state.weight)
        before = State(*(xp.asarray(x, copy=True) for x in state)) if raises else state
        failed = self._failed
        after = self._close(state, batch, options, counts, closings)
        if raises and int(after.skipped) > int(before.skipped):
            if self.in_place:
                written(state, before)
            raise ValueError(f"the rule {options.rule!r} gave a weight that is not finite")
        if self._failed != failed:
            message = f"steps are closed without a recording, which is slower: {self._failed}"
            warnings.warn(message, stacklevel=2)
        return after

    def _close(
        self, state: State, batch: Moments, options: Options, counts: Array, closings: int
    ) -> State:
        inside = _capturing(state.weight)  # of the user's graph the device decides what is due
        due = is_due(state.closings if inside else closings, options.freq, state.step_count)
        if not inside and self._records(options):
            if self._key != (key := (options, _settings(options.rule), *map(_address, state))):
                self._start(key)
            if self._seen >= WARM and self._replay(state, batch, options, counts, due):
                changed(state)
                return state
            self._seen += 1
        after = advance(state, batch, options, known=False, counts=counts, due=due)
        return written(state, after) if self.in_place else after

    def _replay(
        self, state: State, batch: Moments, options: Options, counts: Array, due: Array
    ) -> bool:
        """Replay the closing, after it was recorded where there is none; False where that fails."""
        assert self._record is not None
        solves = due is not False
        inputs = self._inputs = self._inputs or Inputs(state)
        inputs.fill(batch, counts, due is True)

        def run() -> None:
            due: Array = solves
            if solves and options.freq > 1:
                due = inputs.due | (state.step_count == 0)
            known, counts = False, inputs.counts
            written(state, advance(state, inputs.batch, options, known, counts, due))

        if solves not in self._replays:
            try:
                self._replays[solves] = self._record(run, state.weight)
            except RuntimeError as error:
                self._failed = str(error)
                return False
        self._replays[solves]()
        return True

    def _records(self, options: Options) -> bool:
        """Tell whether to record: an eigendecomposition waits for the host, which cannot be."""
        off = (
            self._record is None or self._failed != "" or os.environ.get("DIRECTPRED_GRAPHS") == "0"
        )
        return not off and options.solver != "eigh" and solvable_by_matmul(options.rule)


class Inputs:
    """What enters a recorded closing, at fixed addresses."""

    def __init__(self, state: State) -> None:
        xp, there = array_namespace(state.weight), device(state.weight)
        rows = xp.ones((), dtype=state.mean.dtype, device=there)
        self.batch = Moments(xp.zeros_like(state.correlation), xp.zeros_like(state.mean), rows)
        self.counts = xp.ones((), dtype=xp.bool, device=there)
        self.due = xp.ones((), dtype=xp.bool, device=there)
        self._last: tuple[Any, Any] = (True, True)

    def fill(self, batch: Moments, counts: Array, due: bool) -> None:
        """Write what enters; a flag that the host sets only when it changes."""
        assign(self.batch[:2], batch[:2])
        fill(self.batch.rows, batch.rows)
        for flag, value, last in zip(
            (self.counts, self.due), (counts, due), self._last, strict=True
        ):
            if not (isinstance(value, bool) and value is last):
                fill(flag, value)
        self._last = counts, due


def written(state: State, after: State) -> State:
    """Write a new state over an old one, in place; return the old one."""
    assign(state[:3], after[:3])
    assign(state[3:], after[3:])
    return state


def recorder_for(x: Array) -> Recorder:
    """Make the recorder for arrays like x."""
    if is_torch(x):
        from directpred.torch.graph import record

        return Recorder(record if x.is_cuda else None)
    if is_cupy_array(x):
        from directpred.cupy_graph import LARGEST
        from directpred.cupy_graph import record as record_cupy

        return Recorder(record_cupy if x.shape[0] <= LARGEST else None)
    return Recorder(None, in_place=False)


def _capturing(x: Array) -> bool:
    """Tell whether the user records a graph of PyTorch, which the closing shall then be part of."""
    if not (is_torch(x) and x.is_cuda):
        return False
    from directpred.torch.graph import capturing

    return capturing(x)


def _settings(rule: Any) -> object:
    """The numbers that a rule of the user's own may change between steps."""
    settings = getattr(rule, "__dict__", {}).items()
    return tuple((name, x) for name, x in settings if isinstance(x, int | float | str))


def _address(x: Array) -> object:
    """Where an array is, and of what kind."""
    where = x.data_ptr() if is_torch(x) else x.data.ptr
    return where, x.dtype, device(x), tuple(x.shape)
