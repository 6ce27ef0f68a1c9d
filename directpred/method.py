"""The method: a step as a pure function of arrays, Eq. 19 and then Eq. 18 where it is due."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

from directpred.array import Array, array_namespace, converted
from directpred.correlation import (
    UNIT,
    Moments,
    is_finite,
    moving_average,
    peak,
    peak_on_host,
    rounding,
)
from directpred.fused import add_flag, complement
from directpred.scalars import as_bool, as_float, as_int
from directpred.solvers import SOLVERS, SolverName, solvable_by_matmul
from directpred.spectrum import Rule
from directpred.state import State

NonFinite: TypeAlias = Literal["raise", "skip"]

NOT_FINITE = (
    "the features of the step are not finite, or their correlation overflows: scale them down"
)


class Options(NamedTuple):
    """The hyper-parameters of a predictor, as `directpred.DirectPred` describes them."""

    rule: Rule
    rho: float
    freq: int
    center: bool
    solver: SolverName
    nonfinite: NonFinite

    def validate(self) -> Options:
        """Return these options, or raise a `TypeError` or `ValueError` that names the wrong one."""
        if not callable(self.rule) or isinstance(self.rule, type):
            raise TypeError(f"rule must be a callable s -> p such as Eq18(), got {self.rule!r}")
        if (rho := as_float(self.rho)) is None:
            raise TypeError(f"rho must be a number in [0, 1), got {self.rho!r}")
        if not 0 <= rho < 1:
            raise ValueError(f"rho must be in [0, 1), got {self.rho!r}")
        if (freq := as_int(self.freq)) is None or freq < 1:
            raise ValueError(f"freq must be an integer ≥ 1, got {self.freq!r}")
        if (center := as_bool(self.center)) is None:
            raise TypeError(f"center must be True or False, got {self.center!r}")
        for name in ("solver", "nonfinite"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {value!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {[*SOLVERS]}, got {self.solver!r}")
        if self.solver == "matmul" and not solvable_by_matmul(self.rule):
            raise ValueError(f"solver 'matmul' cannot take {self.rule!r}, which needs 'eigh'")
        if self.nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {self.nonfinite!r}")
        return self._replace(rho=rho, freq=freq, center=center)


def advance(
    state: State,
    batch: Moments,
    options: Options,
    known: bool,
    counts: Array = True,
    due: Array | None = None,
) -> State:
    """Take one step: Eq. 19, then the weight where it is due.

    A batch that is not finite leaves F̂ as it is; a weight that is due is set from it all the same.

    Args:
        state: The state before the step; with `known`, its counts are numbers, else 0-d arrays.
        batch: Moments of all rows of the step, over all views, micro-batches and ranks.
        options: Validated options.
        known: Whether values may be read on the host. Elsewhere (on a GPU, under a tracer) every
            choice is made on the device, without a synchronisation.
        counts: Whether there is anything to a step: a gradient scaler may have skipped it, and no
            rank may have rows. If not, the batch does not enter, and is not counted as skipped. A
            bool, or a 0-d array of them.
        due: Whether the weight is, by default as `is_due` says. If it is False, and no array, no
            weight is computed.

    Returns:
        The state after the step. Without `known`, a batch whose weight would not be finite does not
        enter, and counts as skipped.

    Raises:
        ValueError: With `known` only: the batch is not finite and nonfinite is "raise", or the
            rule gave a weight that is not finite.
    """
    if due is None:
        due = is_due(state.closings, options.freq, state.step_count)
    step = _on_host if known else _on_device
    return step(state, batch, options, counts, due)


def is_due(closings: Array, freq: int, step_count: Array) -> Array:
    """Tell whether a closing sets the weight: at closings 0, freq, 2 freq, … whatever they held.

    In the first freq closings the weight is also due while nothing has entered F̂, so that a first
    step that is not finite does not leave the identity for long.

    Args:
        closings: Steps closed before; a number, or a 0-d array.
        freq: Closings from one setting of the weight to the next.
        step_count: Steps that have entered F̂; likewise.

    Returns:
        A bool where the host can tell, else a 0-d array.
    """
    if not isinstance(closings, int):
        return (closings % freq == 0) | ((closings < freq) & (step_count == 0))
    if closings % freq == 0 or closings >= freq:
        return closings % freq == 0
    return step_count == 0


def _on_host(state: State, batch: Moments, options: Options, counts: Array, due: Array) -> State:
    """Take a step where values can be read: decide, then compute what is needed."""
    counts, started = bool(counts), state.step_count > 0
    enters = counts and is_finite(batch)
    if counts and not enters and options.nonfinite == "raise":
        raise ValueError(NOT_FINITE)
    correlation, mean, weight, share = state.correlation, state.mean, state.weight, 0.0
    if enters:
        rho = options.rho if started else 0.0
        share = (1 - rho) / UNIT / int(batch.rows)
        correlation = moving_average(correlation, batch.outer, rho, share)
        mean = moving_average(mean, batch.total, rho, share, UNIT)
    if due and (enters or started):
        weight = set_weight(correlation, mean, share, options)
        if not peak_on_host(weight) < math.inf:
            raise ValueError(f"the rule {options.rule!r} gave a weight that is not finite")
    return State(
        correlation,
        mean,
        weight,
        state.step_count + enters,
        state.skipped + (counts and not enters),
        state.closings + 1,
    )


def _on_device(state: State, batch: Moments, options: Options, counts: Array, due: Array) -> State:
    """Take a step without reading a value: compute what may be needed, then select."""
    xp = array_namespace(state.weight)
    started = state.step_count > 0
    rho = options.rho * xp.astype(started, state.weight.dtype)
    if isinstance(rows := batch.rows, int):
        rows = max(rows, 1)
    else:
        rows = xp.astype(xp.clip(rows, min=1), state.mean.dtype, copy=False)
    share = complement(rho, 1 / UNIT) / rows
    moved = moving_average(state.correlation, batch.outer, rho, share)
    mean = moving_average(state.mean, batch.total, rho, share, UNIT)
    enters = (peak(moved) < math.inf) & counts
    weight = state.weight
    if due is not False:
        weight = set_weight(
            xp.where(enters, moved, state.correlation),
            xp.where(enters, mean, state.mean) if options.center else mean,
            share,
            options,
        )
        fits = peak(weight) < math.inf
        sets = fits & (enters | started) if due is True else fits & (enters | started) & due
        weight = xp.where(sets, weight, state.weight)
        enters = enters & (fits if due is True else fits | ~due)
    return State(
        xp.where(enters, moved, state.correlation),
        xp.where(enters, mean, state.mean),
        weight,
        add_flag(state.step_count, enters),
        add_flag(state.skipped, ~enters if counts is True else counts & ~enters),
        state.closings + 1,
    )


def set_weight(correlation: Array, mean: Array, share: Array, options: Options) -> Array:
    """Set the weight from F̂ (dim, dim), or from F̂ − m mᵀ with `center`, by rule and solver."""
    noise = rounding(mean, share, options.center)
    if options.center:
        correlation = correlation - mean[:, None] * mean[None, :]
    weight = SOLVERS[options.solver](correlation, options.rule, noise)
    return converted(weight, correlation, options.rule)
