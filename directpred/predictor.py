"""DirectPred: the predictor that is set from its features, as an object for any array library.

`directpred.torch.DirectPredHead` is the one for PyTorch, `directpred.jax` that for JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from array_api_compat import is_jax_array

from directpred.array import (
    Array,
    array_namespace,
    as_features,
    detached,
    device,
    is_double,
    is_torch,
    on_host,
    undisturbed,
    widest,
)
from directpred.correlation import Moments, cast, is_finite, merge, moments, sum_pairwise
from directpred.features import check_dim, check_features, describe_nonfinite
from directpred.method import NonFinite, Options, advance
from directpred.metrics import diagnostics
from directpred.prediction import predict
from directpred.recorded import Recorder, recorder_for
from directpred.solvers import SolverName
from directpred.spectrum import Eq18, Rule
from directpred.state import State, from_dict, initial_state, moved, to_dict

__all__ = ["DirectPred", "NonFinite", "Options", "advance", "check_dim"]


class DirectPred:
    """A linear predictor without bias whose weight is computed from its input, not trained.

    Every `update` moves the correlation of the features F̂ (Eq. 19) and, at updates 0, freq,
    2·freq, …, sets the weight W_p = U diag(rule(s)) Uᵀ from F̂ = U diag(s) Uᵀ (Eq. 18). Until then
    the weight is the identity.

    Arrays may come from any one library that follows the array API standard: the first array seen
    fixes library and device. Statistics and weight are float64 where the features are, in whatever
    order of bytes, or longer, else float32, also for the half precision of ml_dtypes in NumPy;
    before the first array they are NumPy's. What is handed out is a copy, which may be written to.

    On a GPU, with PyTorch or CuPy, updates are recorded as a CUDA graph at the third one, and
    replayed from then on, for rules that products can solve. ``DIRECTPRED_GRAPHS=0`` in the
    environment turns that off.

    In float32, features may be of any scale from 1e-17 to 1e18, over a million rows a step, as long
    as ‖W_p‖ is a normal number: with `DirectSet(2)`, whose weight is the square of the correlation,
    from 1e-9 (1e-8 with XLA). For a power of ½ and more, the weight is
    within 1e-3 of ‖W_p‖ of the exact one, or 2e-3 by matrix products, and twice that for the worst
    spectra, as of features that are all but collapsed: rounding moves an eigenvalue by up to 4e-6
    of the largest. A lower power makes more of that, (4e-6)^α: 4.5 % for ¼, 29 % for 0.1; and a
    negative eps of `BoostScale` leaves a smaller norm, 1 + eps, to the same error. At scales below,
    the squares lose digits, and with 100 rows or more it is within 1e-2 at 1e-18, 5e-2 at 1e-19 and
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
        freq: Set the weight every freq-th update, whatever the updates held.
        center: Whether the weight comes from F̂ − m mᵀ, with m the moving average of the mean. In
            float32 that loses digits where the mean outweighs the standard deviation: by 10 times,
            the weight is within 2e-2, by 100 times within 0.3, also over a million rows, or
            thousands of micro-batches (where there is no float64 to gather these in, hundreds).
        solver: "eigh" (any rule), "matmul" (matrix products only, no host synchronisation; the
            rules with a `matrix_power`), or "auto" for the faster on the device.
        nonfinite: What to do with a batch that holds NaN or infinity, or whose correlation
            overflows: "raise" a `ValueError`, or "skip" the step, count it in `skipped` and go on.

    Raises:
        TypeError: dim is no integer, rule no callable, or another option of the wrong type.
        ValueError: Another option is out of its range.
    """

    def __init__(
        self,
        dim: int,
        rule: Rule = Eq18(),  # noqa: B008 - frozen
        *,
        rho: float = 0.3,
        freq: int = 1,
        center: bool = False,
        solver: SolverName = "auto",
        nonfinite: NonFinite = "raise",
    ) -> None:
        self.dim = check_dim(dim)
        self.options = Options(rule, rho, freq, center, solver, nonfinite).validate()
        self._state = initial_state(dim)
        self._accumulated: Moments | None = None
        self._bound = False  # to the library and device of the first array seen
        self._closed = 0  # `closings`, known without a synchronisation
        self._recorder: Recorder | None = None

    @property
    def weight(self) -> Array:
        """W_p, (dim, dim), symmetric."""
        return self._handed_out(self._state.weight)

    @property
    def correlation(self) -> Array:
        """F̂ of Eq. 19, (dim, dim), uncentred also with `center`; zero before the first update."""
        return self._handed_out(self._state.correlation)

    @property
    def mean(self) -> Array:
        """Moving average of the features' mean, (dim,); zero before the first update."""
        return self._handed_out(self._state.mean)

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
            TypeError: z is not an array, sparse, masked, not real floating, or of another library.
            ValueError: z is of another width or device, or has no rows.

        Warns:
            RuntimeWarning: On the host, that the prediction is beyond float16; see
                `directpred.prediction.predict`.
        """
        (z,) = self._checked(z)
        with undisturbed(z):
            self._state, self._accumulated = self._on_library_of(z)
        self._bound = True
        return predict(z, self._state.weight)

    def update(self, *views: Array) -> Array:
        """Close a step with all rows of all views, and of what was accumulated before.

        Args:
            *views: One or more arrays of features, (..., n, dim) with any n ≥ 1 of its own, real
                floating. All their rows enter as one batch.

        Returns:
            The weight (dim, dim): new, or as it was where freq says so.

        Raises:
            TypeError: No views; one is not an array, sparse, masked, not real floating, or of
                another library; or a rule that returns no real numbers.
            ValueError: A view is of another width or device, or has no rows; features that are not
                finite with nonfinite="raise"; a rule whose weight is not finite. Whatever is
                raised, the predictor is as it was before the call.
        """
        checked = self._checked(*views)
        with undisturbed(checked[0]):
            weight = self._close(*self._gather(checked))
        self._bound = True
        return weight

    def accumulate(self, *views: Array) -> None:
        """Gather the statistics of a micro-batch for the coming `step`.

        Args:
            *views: As for `update`.

        Raises:
            TypeError, ValueError: As `update`.
        """
        checked = self._checked(*views)
        with undisturbed(checked[0]):
            self._state, gathered = self._gather(checked)
            # Thousands may follow, whose rounding would add up.
            self._accumulated = cast(gathered, widest(self._state.weight))
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
        with undisturbed(self._state.weight):
            return self._close(self._state, self._accumulated)

    def diagnostics(self) -> dict[str, float]:
        """Measure the state, as `directpred.metrics.diagnostics` says; waits for the device."""
        return diagnostics(self._state.weight, self._state.correlation, self._state.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain arrays with a version, the numbers as 0-d arrays of NumPy.

        What was accumulated for a step that is not closed yet is part of it; the options are not.
        `numpy.savez(path, **state)` and, of arrays of NumPy, `safetensors.numpy.save_file(state,
        path)` take it as it is.
        """
        numbers = {name: int(x) for name, x in zip(State._fields[3:], self._state[3:], strict=True)}
        arrays = {"correlation": self.correlation, "mean": self.mean, "weight": self.weight}
        accumulated = self._accumulated
        if accumulated is not None:
            outer, total, rows = accumulated
            accumulated = Moments(self._handed_out(outer), self._handed_out(total), rows)
        return to_dict(State(**arrays, **numbers), accumulated)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that was saved from any array library, also that of a torch head.

        The state moves to the library, device and dtype in use; before the first array is seen
        it waits for that in NumPy, and is refused then where it is beyond the dtype.

        Args:
            state: The saved state; it is copied.

        Raises:
            TypeError: Not a mapping.
            ValueError: Of another version, dim or set of entries, not finite, with a correlation
                that is not symmetric, or beyond the dtype in use. Nothing changes.
        """
        loaded, accumulated = from_dict(state, self.dim)
        if self._bound:
            with undisturbed(self._state.weight):
                loaded, accumulated = _moved(loaded, accumulated, self._state.weight)
        self._state, self._accumulated = loaded, accumulated
        self._closed = int(loaded.closings)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"{type(self).__name__}(dim={self.dim}, {options})"

    def _checked(self, *views: Array) -> list[Array]:
        """The views as arrays whose operators are those of the standard, or an error."""
        if not views:
            raise TypeError("expected at least one array of features, got none")
        for z in views:
            check_features(z, self.dim)
            other = self._state.weight if self._bound else views[0]
            if (got := array_namespace(z)) is not (expected := array_namespace(other)):
                raise TypeError(f"expected features of {_name(expected)}, got some of {_name(got)}")
            if device(z) != device(other):
                raise ValueError(f"expected features on {device(other)}, got some on {device(z)}")
        return [as_features(z) for z in views]

    def _on_library_of(self, z: Array) -> tuple[State, Moments | None]:
        """State and accumulated moments, moved from NumPy when z is the first array seen."""
        state, accumulated = self._state, self._accumulated
        if self._bound:
            return state, accumulated
        double = is_double(z) or state.weight.dtype.itemsize == 8
        return _moved(state, accumulated, z, widest(z) if double else array_namespace(z).float32)

    def _gather(self, views: list[Array]) -> tuple[State, Moments]:
        """The state in the library of the views, and their moments with those accumulated."""
        state, accumulated = self._on_library_of(views[0])

        def gather(z: Array) -> Moments:
            gathered = moments(detached(z), state.weight.dtype)
            if self.options.nonfinite == "raise" and not is_finite(gathered):
                raise ValueError(describe_nonfinite(z))
            return gathered

        batch = sum_pairwise(views, gather)
        if accumulated is not None:
            batch = merge(accumulated, cast(batch, accumulated.outer.dtype))
        return state, batch

    def _close(self, state: State, batch: Moments) -> Array:
        batch = cast(batch, state.weight.dtype)
        if on_host(state.weight):
            state = advance(state, batch, self.options, known=True)
        else:
            self._recorder = self._recorder or recorder_for(state.weight)
            try:
                state = self._recorder.close(state, batch, self.options, True, self._closed)
            except Warning:  # made an error by the user, when the step was done
                self._accumulated, self._closed = None, self._closed + 1
                raise
        self._state, self._accumulated = state, None
        self._closed += 1
        return _copied(state.weight)

    def _handed_out(self, x: Array) -> Array:
        with undisturbed(x):
            return _copied(x)


def _copied(x: Array) -> Array:
    """A copy: what is done to it leaves the predictor as it is, and what that does, it."""
    if is_torch(x):
        return x.clone()
    # Nobody can write to an array of JAX.
    return x if is_jax_array(x) else array_namespace(x).asarray(x, copy=True)


def _moved(
    state: State, accumulated: Moments | None, like: Array, dtype: Any = None
) -> tuple[State, Moments | None]:
    """State and accumulated moments as a predictor of arrays like another holds them."""
    dtype = dtype or like.dtype
    if accumulated is not None:
        accumulated = moved(accumulated, like, dtype, held=widest(like))
    return _counting(moved(state, like, dtype)), accumulated


def _counting(state: State) -> State:
    """A state whose counts are where its arrays are: numbers on the host, else 0-d arrays."""
    xp, like = array_namespace(state.weight), state.weight
    if on_host(like):
        return state
    counts = (xp.full((), n, device=device(like)) for n in state[3:])
    return State(*state[:3], *counts)


def _name(namespace: Any) -> str:
    return str(namespace.__name__).removeprefix("array_api_compat.")
