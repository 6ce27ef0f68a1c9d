"""DirectPred: the predictor that is set from its features instead of being trained.

`advance` is one step of the method as a pure function of arrays; `DirectPred` is the stateful
object around it for any array library, `directpred.torch.DirectPredHead` the one for PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from array_api_compat import array_namespace, device

from directpred.array import Array, on_host
from directpred.correlation import (
    UNIT,
    Moments,
    check_features,
    describe_nonfinite,
    is_finite,
    merge,
    moments,
    moving_average,
)
from directpred.solvers import SOLVERS, solvable_by_matmul
from directpred.spectrum import Eq18, Rule
from directpred.state import State, from_dict, initial_state, moved, to_dict

NonFinite: TypeAlias = Literal["raise", "skip"]


class Options(NamedTuple):
    """The hyper-parameters of a predictor, as `DirectPred` describes them."""

    rule: Rule
    rho: float
    freq: int
    center: bool
    solver: str
    nonfinite: NonFinite

    def validate(self) -> Options:
        """Return these options, or raise a `TypeError` or `ValueError` that names the wrong one."""
        if not callable(self.rule) or isinstance(self.rule, type):
            raise TypeError(f"rule must be a callable s -> p such as Eq18(), got {self.rule!r}")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be in [0, 1), got {self.rho!r}")
        if not isinstance(self.freq, int) or isinstance(self.freq, bool) or self.freq < 1:
            raise ValueError(f"freq must be an integer ≥ 1, got {self.freq!r}")
        if not isinstance(self.center, bool):
            raise TypeError(f"center must be True or False, got {self.center!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {[*SOLVERS]}, got {self.solver!r}")
        if self.solver == "matmul" and not solvable_by_matmul(self.rule):
            raise ValueError(f"solver 'matmul' cannot take {self.rule!r}, which needs 'eigh'")
        if self.nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {self.nonfinite!r}")
        return self


def advance(state: State, batch: Moments, options: Options, known: bool) -> State:
    """Take one step: Eq. 19, and the weight where it is due.

    Where values are not known on the host (on a GPU, under a tracer), every choice is made on the
    device: no synchronisation, at the price of a solve at every step also with freq > 1.

    Args:
        state: The state before the step; with `known`, its counts are Python numbers.
        batch: Moments of all rows of the step, over all views, micro-batches and ranks.
        options: Validated options.
        known: Whether values may be read on the host.

    Returns:
        The state after the step; where the batch is not finite, or, without `known`, the weight
        would not be, the same but for `skipped`.

    Raises:
        ValueError: With `known` only: the batch is not finite and nonfinite is "raise", or the
            rule gave a weight that is not finite.
    """
    xp = array_namespace(state.weight)
    finite = is_finite(batch)
    if known:
        finite = bool(finite)
        if options.nonfinite == "raise" and not finite:
            raise ValueError("the correlation of the step overflows; scale the features down")
    solve = SOLVERS[options.solver]
    started = state.step_count > 0
    rho = options.rho * _number(started, state.weight.dtype)

    def averaged(average: Array, batch_sum: Array, rows: Array) -> Array:
        return _select(finite, lambda: moving_average(average, batch_sum, rows, rho), average)

    correlation = averaged(state.correlation, batch.outer, batch.rows * UNIT)
    mean = averaged(state.mean, batch.total, batch.rows)

    def solved() -> Array:
        # Half a unit in the last place in every entry, at random, is less than √dim in the norm:
        # of denormal numbers, and of the numbers whose difference is the centred correlation.
        info = xp.finfo(correlation.dtype)
        spread = mean.shape[0] ** 0.5 * float(info.eps)
        noise = spread * float(info.smallest_normal) * (1 + 1 / (batch.rows * UNIT))
        if not options.center:
            return solve(correlation, options.rule, noise)
        centred = correlation - mean[:, None] * mean[None, :]
        return solve(centred, options.rule, noise + 2 * spread * xp.max(mean * mean))

    due = state.step_count % options.freq == 0
    weight = _select(finite & due, solved, state.weight)
    fits = xp.all(xp.isfinite(xp.linalg.diagonal(weight)))
    if known and not fits:
        raise ValueError(f"the rule {options.rule!r} gave a weight that is not finite")
    if not known:
        finite = finite & fits
        correlation = xp.where(fits, correlation, state.correlation)
        mean = xp.where(fits, mean, state.mean)
        weight = xp.where(fits, weight, state.weight)
    return State(
        correlation,
        mean,
        weight,
        state.step_count + _number(finite),
        state.skipped + (1 - _number(finite)),
    )


def _select(condition: Array, new: Callable[[], Array], old: Array) -> Array:
    """`new()` where the condition holds, else `old`; a Python bool decides before computing."""
    if isinstance(condition, bool):
        return new() if condition else old
    return array_namespace(old).where(condition, new(), old)


def _number(condition: Array, dtype: Any = None) -> Array:
    """0 or 1: a Python int for a Python bool, a 0-d array (int32, or the dtype) for an array."""
    if isinstance(condition, bool):
        return int(condition)
    xp = array_namespace(condition)
    return xp.astype(condition, xp.int32 if dtype is None else dtype)


class DirectPred:
    """A linear predictor without bias whose weight is computed from its input, not trained.

    Every `update` moves the correlation of the features F̂ (Eq. 19) and, at updates 0, freq,
    2·freq, …, sets the weight W_p = U diag(rule(s)) Uᵀ from F̂ = U diag(s) Uᵀ (Eq. 18). Until then
    the weight is the identity.

    Arrays may come from any one library that follows the array API standard: the first array seen
    fixes library and device. Statistics and weight are float64 where the features are, else
    float32; before the first array they are NumPy's.

    In float32, features may be of any scale from 1e-17 to 1e18, over a million rows a step: the
    weight is within 1e-3 of ‖W_p‖ of the exact one, or 2e-3 by matrix products. Below, the
    squares lose digits, and with 100 rows or more it is within 1e-2 at 1e-18, 5e-2 at 1e-19 and
    0.2 at 1e-20; smaller features count as zero. Platforms that flush denormal numbers (XLA) are
    as exact from 1e-15, and count as zero what is below 1e-19. Larger features fit as long as
    their correlation and its norm do, and raise or are skipped as `nonfinite` says beyond that.

    Example:
        >>> import numpy as np
        >>> import directpred as dp
        >>> z1, z2 = np.random.default_rng(0).normal(size=(2, 512, 64))
        >>> predictor = dp.DirectPred(dim=64)
        >>> weight = predictor.update(z1, z2)
        >>> predictor(z1).shape
        (512, 64)

    Args:
        dim: Width of the features.
        rule: Spectral rule, one of `directpred.spectrum` or any callable s -> p.
        rho: Weight of the old correlation in the moving average, in [0, 1).
        freq: Set the weight every freq-th update.
        center: Whether the weight comes from F̂ − m mᵀ, with m the moving average of the mean. In
            float32 that loses digits where the mean outweighs the standard deviation: by 10 times,
            the weight is within 2e-2, by 100 times within 0.3.
        solver: "eigh" (any rule), "matmul" (matrix products only, no host synchronisation; the
            rules with a `matrix_power`), or "auto" for the faster on the device.
        nonfinite: What to do with a batch that holds NaN or infinity, or whose correlation
            overflows: "raise" a `ValueError`, or "skip" the step, count it in `skipped` and go on.

    Raises:
        TypeError: dim is no integer, or rule no callable.
        ValueError: Another option is out of its range.
    """

    def __init__(
        self,
        dim: int,
        rule: Rule = Eq18(),  # noqa: B008 - frozen
        rho: float = 0.3,
        freq: int = 1,
        center: bool = False,
        solver: str = "auto",
        nonfinite: NonFinite = "raise",
    ) -> None:
        self.dim = check_dim(dim)
        self.options = Options(rule, rho, freq, center, solver, nonfinite).validate()
        self._state = initial_state(dim)
        self._accumulated: Moments | None = None
        self._bound = False  # to the library and device of the first array seen

    @property
    def weight(self) -> Array:
        """W_p, (dim, dim), symmetric."""
        return self._state.weight

    @property
    def correlation(self) -> Array:
        """F̂ of Eq. 19, (dim, dim), uncentred also with `center`; zero before the first update."""
        return self._state.correlation

    @property
    def mean(self) -> Array:
        """Moving average of the features' mean, (dim,); zero before the first update."""
        return self._state.mean

    @property
    def step_count(self) -> int:
        """Number of updates that entered F̂. Reading it waits for the device."""
        return int(self._state.step_count)

    @property
    def skipped(self) -> int:
        """Number of updates left out because they were not finite. Reading it waits likewise."""
        return int(self._state.skipped)

    def __call__(self, z: Array) -> Array:
        """Predict: z @ weight.

        Args:
            z: Features, (..., n, dim), real floating.

        Returns:
            The prediction, in the shape and dtype of z.

        Raises:
            TypeError: z is not an array, not real floating, or of another library.
            ValueError: z is of another width or device, or has no rows.
        """
        self._check(z)
        self._state, self._accumulated = self._on_library_of(z)
        self._bound = True
        return z @ array_namespace(z).astype(self._state.weight, z.dtype, copy=False)

    def update(self, *views: Array) -> Array:
        """Close a step with all rows of all views, and of what was accumulated before.

        Args:
            *views: One or more arrays of features, (..., n, dim) with any n ≥ 1 of its own, real
                floating. All their rows enter as one batch.

        Returns:
            The weight (dim, dim): new, or as it was where freq says so.

        Raises:
            TypeError: No views; one is not an array, not real floating, or of another library.
            ValueError: A view is of another width or device, or has no rows; features that are not
                finite with nonfinite="raise"; a rule whose weight is not finite. Whatever is
                raised, the predictor is as it was before the call.
        """
        weight = self._close(*self._gather(views))
        self._bound = True
        return weight

    def accumulate(self, *views: Array) -> None:
        """Gather the statistics of a micro-batch for the coming `step`.

        Args:
            *views: As for `update`.

        Raises:
            TypeError, ValueError: As `update`.
        """
        self._state, self._accumulated = self._gather(views)
        self._bound = True

    def step(self) -> Array:
        """Close a step with all that was accumulated since the last one.

        Returns:
            The weight, as `update`.

        Raises:
            ValueError: Nothing was accumulated; or as `update`.
        """
        if self._accumulated is None:
            raise ValueError("step() needs at least one accumulate(z) since the last step")
        return self._close(self._state, self._accumulated)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain arrays with a version, the numbers as 0-d arrays of NumPy.

        What was accumulated for a step that is not closed yet is part of it; the options are not.
        `numpy.savez(path, **state)` and, of arrays of NumPy, `safetensors.numpy.save_file(state,
        path)` take it as it is.
        """
        state = self._state._replace(step_count=self.step_count, skipped=self.skipped)
        return to_dict(state, self._accumulated)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that was saved from any array library, also that of a torch head.

        The state moves to the library, device and dtype in use; before the first array is seen
        it waits for that in NumPy, and is refused then where it is beyond the dtype.

        Args:
            state: The saved state; it is copied.

        Raises:
            ValueError: Of another version, dim or set of entries, not finite, or beyond the dtype
                in use. Nothing changes.
        """
        loaded, accumulated = from_dict(state, self.dim)
        if self._bound:
            weight = self._state.weight
            loaded = moved(loaded, weight, weight.dtype)
            accumulated = accumulated and moved(accumulated, weight, weight.dtype)
        self._state, self._accumulated = loaded, accumulated

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"{type(self).__name__}(dim={self.dim}, {options})"

    def _check(self, *views: Array) -> None:
        if not views:
            raise TypeError("expected at least one array of features, got none")
        for z in views:
            check_features(z, self.dim)
            other = self._state.weight if self._bound else views[0]
            if (got := array_namespace(z)) is not (expected := array_namespace(other)):
                raise TypeError(f"expected features of {_name(expected)}, got some of {_name(got)}")
            if device(z) != device(other):
                raise ValueError(f"expected features on {device(other)}, got some on {device(z)}")

    def _on_library_of(self, z: Array) -> tuple[State, Moments | None]:
        """State and accumulated moments, moved from NumPy when z is the first array seen."""
        state, accumulated = self._state, self._accumulated
        if self._bound:
            return state, accumulated
        xp = array_namespace(z)
        double = z.dtype == xp.float64 or state.weight.dtype.itemsize == 8
        # Some devices, and JAX as it comes, have no float64.
        available = xp.__array_namespace_info__().dtypes(device=device(z), kind="real floating")
        dtype = xp.float64 if double and "float64" in available else xp.float32
        return moved(state, z, dtype), accumulated and moved(accumulated, z, dtype)

    def _gather(self, views: tuple[Array, ...]) -> tuple[State, Moments]:
        """The state in the library of the views, and their moments with those accumulated."""
        self._check(*views)
        state, batch = self._on_library_of(views[0])
        for z in views:
            gathered = moments(z, state.weight.dtype)
            if self.options.nonfinite == "raise" and not is_finite(gathered):
                raise ValueError(describe_nonfinite(z))
            batch = gathered if batch is None else merge(batch, gathered)
        assert batch is not None
        return state, batch

    def _close(self, state: State, batch: Moments) -> Array:
        known = self.options.nonfinite == "raise" or on_host(state.weight)
        state = advance(state, batch, self.options, known)
        self._state, self._accumulated = state, None
        return state.weight


def check_dim(dim: int) -> int:
    """Return dim, or raise where it is no positive integer."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if dim < 1:
        raise ValueError(f"dim must be ≥ 1, got {dim}")
    return dim


def _name(namespace: Any) -> str:
    return str(namespace.__name__).removeprefix("array_api_compat.")
