"""Any features, options and orders of calls, beside a model in float64 that knows what is right.

Every outcome is the right weight within the model's bound, or exactly the documented error, after
which the state is what it was, bit for bit. DIRECTPRED_FUZZ=20 runs twenty times as many inputs as
CI, with new random seeds.
"""

import copy
import dataclasses
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import directpred as dp
import oracle
from backends import BACKENDS
from directpred.state import to_numpy

TIMES = int(os.environ.get("DIRECTPRED_FUZZ", "0"))
INPUTS: Counter[str] = Counter()
"""Arrays and states given to the package, by what was done with them."""

# Rules: the package's, the oracle's, and how far p moves when the correlation does by `by`: a power
# below 1 is operator monotone, so ‖A^α − B^α‖ ≤ ‖A − B‖^α; above 1 and for clips a factor suffices.


def eq18(eps, normalize):
    def moved(by, top):
        return over_largest(by, top) ** 0.5 if normalize else by**0.5 + eps * by

    return dp.Eq18(eps, normalize), lambda s: oracle.eq18(s, eps, normalize), moved


def over_largest(by, top):
    """How far eigenvalues over the largest move: anything, where that is no more than noise."""
    return 2 * by / top if top > 4 * by else np.inf


def power(by, top, alpha):
    return by**alpha if alpha <= 1 else 2 * alpha * (top + by) ** (alpha - 1) * by


def direct_set(alpha, eps):
    return (
        dp.DirectSet(alpha, eps),
        lambda s: oracle.directset(s, alpha, eps),
        lambda by, top: (1 + eps) * power(by, top, alpha),
    )


def direct_copy(eps):
    return dp.DirectCopy(eps), lambda s: oracle.directcopy(s, eps), lambda by, top: (1 + eps) * by


def boost_scale(eps, alpha, inside, floor):
    def moved(by, top):
        return 4 * power(over_largest(by, top), 1 + abs(eps), alpha)

    return (
        dp.BoostScale(eps, alpha, inside, floor),
        lambda s: oracle.boost_scale(s, eps, alpha, inside, floor),
        moved,
    )


def own(function, moved):
    return function, function, moved


def documented(rule, solver, norm):
    """The bound of the docstring of `DirectPred`, for the package's rules in float32."""
    alpha = getattr(rule, "alpha", getattr(rule, "power", 0.5))
    alpha = 1.0 if isinstance(rule, dp.DirectCopy) else alpha
    bound = max(4e-3 if solver == "matmul" else 2e-3, 4e-6 ** min(alpha, 1))
    return bound * (norm - min(getattr(rule, "eps", 0.0), 0.0))


WRONG_SHAPE = [lambda s: s[:0], lambda s: 1.0, lambda s: None, lambda s: s[:, None] * s]
small = st.floats(0, 2).map(lambda x: round(x, 3))
RULES = st.one_of(
    st.builds(eq18, small, st.booleans()),
    st.builds(direct_set, st.sampled_from([0.5, 1, 0.25, 2, 1.5]), small),
    st.builds(direct_copy, small),
    st.builds(
        boost_scale,
        st.floats(-0.5, 0.5).map(lambda x: round(x, 3)),
        st.sampled_from([0.5, 1.0, 0.8, 2.0]),
        st.booleans(),
        st.sampled_from([1e-4, 1e-2]),
    ),
    st.sampled_from(
        [
            own(lambda s: 1 + 0 * s, lambda by, top: 0),
            own(lambda s: 3 * s, lambda by, top: 3 * by),
            own(lambda s: s * float("nan"), None),
            own(lambda s: 1 / (0 * s), None),
            *(own(wrong, None) for wrong in WRONG_SHAPE),
        ]
    ),
)

# Features: of a library's dtypes, by NumPy's name.

SCALES = {
    "float16": [-7, -3, 0, 2, 4],
    "bfloat16": [-20, -3, 0, 6, 18],
    "float32": [-40, -30, -20, -15, -3, 0, 0, 3, 9, 15, 18],
    "float64": [-310, -160, -40, -20, -3, 0, 0, 3, 9, 18, 100, 150],
}
KINDS = [
    "normal",
    "power law",
    "one value",
    "same rows",
    "rank one",
    "zeros",
    "one-hot",
    "large mean",
    "signs",
]
LAYOUTS = ["C", "transposed", "negative", "broadcast", "strided", "Fortran"]
POISON = [None] * 12 + [np.nan, np.inf, -np.inf, "huge"]


def content(kind, rows, dim, rng):
    z = rng.normal(size=(rows, dim))
    return {
        "normal": z,
        "power law": z * np.arange(1, dim + 1.0) ** -2,
        "one value": np.full((rows, dim), z[0, 0]),
        "same rows": z[:1] + np.zeros((rows, 1)),
        "rank one": z[:, :1] * z[:1],
        "zeros": 0 * z,
        "one-hot": np.eye(dim)[rng.integers(dim, size=rows)],
        "large mean": 1 + z / 30,
        "signs": np.sign(z),
    }[kind]


def laid_out(z, layout):
    """The same numbers (broadcast: the first row alone) in another layout."""
    if layout == "transposed":
        return np.ascontiguousarray(z.T).T
    if layout == "negative":
        return np.ascontiguousarray(z[::-1, ::-1])[::-1, ::-1]
    if layout == "broadcast":
        return np.broadcast_to(z[:1], z.shape)
    if layout == "strided":
        return np.repeat(np.repeat(z, 2, axis=0), 3, axis=1)[::2, ::3]
    return np.asarray(z, order="F" if layout == "Fortran" else "C")


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@st.composite
def features(draw, dim, dtypes):
    """(name of the dtype, NumPy array): good ones, or with a NaN, an infinity or a huge value."""
    dtype = draw(st.sampled_from(dtypes))
    rows = draw(st.sampled_from([*range(1, 10)] * 20 + [100_000]))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    z = content(draw(st.sampled_from(KINDS)), rows, dim, rng)
    z = z * 10.0 ** draw(st.sampled_from(SCALES[dtype]))
    poison = draw(st.sampled_from(POISON))
    if poison is not None:
        huge = {"float16": np.inf, "bfloat16": 1e30, "float32": 1e30, "float64": 1e200}[dtype]
        z[rng.integers(rows), rng.integers(dim)] = huge if poison == "huge" else poison
    with np.errstate(over="ignore", under="ignore"):
        z = z.astype("float32" if dtype == "bfloat16" else dtype)
    z = laid_out(z, draw(st.sampled_from(LAYOUTS)))
    if draw(st.integers(0, 4)) == 0:
        z = z[None] if rows % 2 else z.reshape(2, rows // 2, dim)
    return dtype, z


BAD = {
    "width": lambda xp, dim: (xp.ones((2, dim + 1)), ValueError, rf"shape \(n, {dim}\), got \(2, "),
    "1-D": lambda xp, dim: (xp.ones((dim,)), ValueError, rf"shape \(n, {dim}\), got \({dim},\)"),
    "0-d": lambda xp, dim: (xp.asarray(1.0), ValueError, r"got \(\)"),
    "no rows": lambda xp, dim: (xp.ones((0, dim)), ValueError, "at least one row"),
    "empty axis": lambda xp, dim: (xp.ones((3, 0, dim)), ValueError, "at least one row"),
    "ints": lambda xp, dim: (xp.ones((2, dim), dtype=xp.int32), TypeError, "real floating, got"),
    "bools": lambda xp, dim: (xp.ones((2, dim), dtype=xp.bool), TypeError, "real floating, got"),
    "complex": lambda xp, dim: (
        xp.ones((2, dim), dtype=xp.complex64),
        TypeError,
        "real floating, got .*complex64",
    ),
    "list": lambda xp, dim: ([[1.0] * dim], TypeError, "must be an array, got list"),
    "none": lambda xp, dim: (None, TypeError, "must be an array, got NoneType"),
}
SPOILED = {
    "version": (lambda s: s | {"version": 9}, "version 1 to 3, got 9"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "mean"}, r"missing \['mean'\]"),
    "unknown": (lambda s: s | {"bias": np.zeros(3)}, r"unknown \['bias'\]"),
    "shape": (lambda s: s | {"mean": np.zeros(77)}, r"mean must be of shape .*got \(77,\)"),
    "NaN": (lambda s: s | {"weight": s["weight"] * np.nan}, "weight must hold finite numbers"),
    "count": (lambda s: s | {"step_count": -1}, "step_count must be a number ≥ 0"),
}


def fits(rows, info):
    """Whether the correlation of the rows is finite in that dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (rows**2).mean(axis=0).max() < info.max  # False for a NaN


class Model:
    """What a predictor should hold, in float64, and how far off one in another dtype may be."""

    def __init__(self, dim, rule, exact_rule, moved, rho, freq, center, solver, double=False):
        self.rule = rule if dataclasses.is_dataclass(rule) else None  # of the package
        self.exact_rule, self.moved, self.solver = exact_rule, moved, solver
        self.rho, self.freq, self.center = rho, freq, center
        self.correlation, self.mean = np.zeros((dim, dim)), np.zeros(dim)
        self.off, self.mean_off = 0.0, 0.0
        self.weight, self.weight_off = np.eye(dim), 0.0
        self.steps = self.skipped = self.closings = 0
        self.rows = []
        self.rows_info = None  # of the sums, where that is not `info`
        self.near_overflow = False
        self.info = np.finfo("float64" if double else "float32")

    def close(self, enters):
        """Take the rows in if they enter; what should come of it: "" or the pattern of an error."""
        dim, eps = len(self.mean), float(self.info.eps)
        denormal = 4 * dim**0.5 * eps * float(self.info.smallest_normal)
        if enters:
            correlation, off, mean, mean_off, denormal = self.moved_by_rows()
        else:
            correlation, off, mean, mean_off = self.correlation, self.off, self.mean, self.mean_off
        weight, weight_off = self.weight, self.weight_off
        due = self.closings % self.freq == 0 or (self.closings < self.freq and not self.steps)
        if due and (enters or self.steps):
            centred, by = correlation, off
            if self.center:
                centred = correlation - np.outer(mean, mean)
                norm = np.linalg.norm(mean) + mean_off
                by = off + 2 * norm * mean_off + 4 * dim**0.5 * eps * norm**2
            s, u = np.linalg.eigh(centred)
            s = np.maximum(s, 0)
            by += 8 * eps * s[-1]
            with np.errstate(all="ignore"):
                p = self.exact_rule(s)
            if getattr(p, "shape", None) != s.shape:
                return "must return an array of shape"
            largest = np.max([s[-1] + by, *np.abs(p)])  # not max(), which may pass over a NaN
            if not largest < 16 * self.info.max:
                return "gave a weight that is not finite"
            self.near_overflow = largest > self.info.max / 16
            weight = (u * p) @ u.T
            norm = np.abs(p).max()
            solving = {"matmul": 1e-3 if eps > 1e-10 else 2e-7}.get(self.solver, 0.0)
            weight_off = 4 * self.moved(by, s[-1]) + (solving + 32 * eps) * norm + denormal**0.5
            scale = 1e-33 < s[-1] < 1e36 and norm > 1e-36  # of features from 1e-17 to 1e18
            if self.rule and scale and eps > 1e-10 and not self.center:
                weight_off = min(weight_off, documented(self.rule, self.solver, norm))
        self.correlation, self.off, self.mean, self.mean_off = correlation, off, mean, mean_off
        self.weight, self.weight_off = weight, weight_off
        self.steps, self.skipped = self.steps + enters, self.skipped + (not enters)
        self.closings, self.rows, self.rows_info = self.closings + 1, [], None
        return ""

    def moved_by_rows(self):
        """Eq. 19, and how far off it may be."""
        z, rho = np.concatenate(self.rows), self.rho if self.steps else 0.0
        dim, eps = z.shape[1], float(self.info.eps)
        summed = self.rows_info or self.info
        rows_eps = float(summed.eps)
        # Where squares are denormal, each that is added rounds by half a unit.
        units = 4 + 8192 / len(z) + min(len(z), 4096) / 16
        denormal = dim**0.5 * rows_eps * float(summed.smallest_normal) * units
        batch = z.T @ z / len(z)
        correlation = rho * self.correlation + (1 - rho) * batch
        mean = rho * self.mean + (1 - rho) * z.mean(axis=0)
        # Of the sum and of the moving average; |z| bounds what cancels in a mean.
        running = 16 if len(z) < 100 else 64  # a product of floats adds up some hundred in a row
        off = rho * self.off + running * rows_eps * np.trace(batch)
        off += 4 * eps * np.trace(correlation)
        off += denormal
        size = (1 - rho) * np.abs(z).mean(axis=0) + np.abs(mean)
        mean_off = rho * self.mean_off + 8 * rows_eps * np.linalg.norm(size) + denormal
        return correlation, off, mean, mean_off, denormal


class Machine(RuleBasedStateMachine):
    backend = BACKENDS["numpy"]
    dtypes = ("float16", "float32", "float64")

    @initialize(data=st.data())
    def start(self, data):
        self.mode = self.backend.mode(self.backend.library)
        self.mode.__enter__()
        self.dim = data.draw(st.sampled_from([1, 2, 3, 6]), label="dim")
        rule, exact_rule, moved = data.draw(RULES, label="rule")
        solvers = ["auto", "eigh"] + ["matmul"] * (getattr(rule, "matrix_power", None) is not None)
        self.options = {
            "rule": rule,
            "rho": data.draw(st.sampled_from([0.3, 0.0, 0.9, 0.99]), label="rho"),
            "freq": data.draw(st.sampled_from([1, 1, 2, 3]), label="freq"),
            "center": data.draw(st.booleans(), label="center"),
            "solver": data.draw(st.sampled_from(solvers), label="solver"),
            "nonfinite": data.draw(st.sampled_from(["raise", "skip"]), label="nonfinite"),
        }
        note(str(self.options))
        event(type(rule).__name__)
        options = {k: v for k, v in self.options.items() if k not in ("rule", "nonfinite")}
        self.model = Model(self.dim, rule, exact_rule, moved, **options)
        if options["solver"] == "auto" and getattr(rule, "matrix_power", None) == 1:
            self.model.solver = "matmul"
        self.predictor = dp.DirectPred(self.dim, **self.options)
        self.bound = False

    def teardown(self):
        if hasattr(self, "mode"):
            self.mode.__exit__(None, None, None)

    def array(self, given):
        dtype, z = given
        xp = self.backend.library
        if self.backend.module == "torch":
            if any(stride < 0 for stride in z.strides):
                z = z.copy()
            z = z if z.flags.writeable else z.copy()
            return self.backend.asarray(xp, z).to(getattr(xp, dtype))
        return self.backend.asarray(xp, z)

    def state(self):
        return {k: to_numpy(v) for k, v in self.predictor.state_dict().items()}

    def views(self, data):
        drawn = features(self.dim, self.dtypes)
        given = data.draw(st.lists(drawn, min_size=1, max_size=4), label="views")
        arrays = [self.array(z) for z in given]
        # What the package is given, which in bfloat16 is not what was drawn.
        exact = [
            to_numpy(x.float() if z[0] == "bfloat16" else x).astype(np.float64)
            for z, x in zip(given, arrays, strict=True)
        ]
        return given, arrays, [x.reshape(-1, self.dim) for x in exact]

    def bind(self, dtype):
        """The first array seen fixes the dtype of the statistics."""
        if not self.bound and dtype == "float64":
            if self.model.rows:  # a loaded open step, that was summed in float32
                self.model.rows_info = self.model.info
                if not fits(np.concatenate(self.model.rows), self.model.info):
                    self.model.rows = [*self.model.rows, np.full((1, self.dim), np.inf)]
            self.model.info = np.finfo("float64")
        self.bound = True

    def gathered(self, given, exact):
        """What gathering should come to: "" or the pattern of an error; the rows that fit."""
        info = self.model.info
        if not self.bound and given[0][0] == "float64":
            info = np.finfo("float64")
        for z in exact:
            if self.options["nonfinite"] == "raise" and not np.isfinite(z).all():
                bad = len(z) - np.isfinite(z).all(axis=1).sum()
                return f"NaN or infinity in {bad} of {len(z)} rows"
            if self.options["nonfinite"] == "raise" and not fits(z, info):
                return "the correlation of the features overflows: their largest"
        return ""

    def attempt(self, call, expected, error=ValueError):
        """Call, and where an error is expected see that it changes nothing."""
        if not expected:
            return call()
        event(expected)
        before = self.state()
        with pytest.raises(error, match=expected):
            call()
        return same(before, self.state())

    def check(self):
        """The predictor against the model."""
        model = self.model
        state = self.state()
        counts = [int(state[name]) for name in ("step_count", "skipped", "closings")]
        assert counts == [model.steps, model.skipped, model.closings]
        for name in ("correlation", "weight"):
            assert np.isfinite(state[name]).all(), name
        weight = state["weight"]
        np.testing.assert_array_equal(weight, weight.T)
        if self.bound:
            assert weight.dtype == model.info.dtype
        for got, exact, off in (
            (state["correlation"], model.correlation, model.off),
            (state["mean"][None], model.mean[None], model.mean_off),
            (weight, model.weight, model.weight_off),
        ):
            error = np.linalg.norm(got.astype(np.float64) - exact, 2)
            assert error <= off, (error, off, got, exact)

    def closed(self, call):
        """Close the step by the call, which holds what the model holds."""
        after = copy.copy(self.model)
        enters = bool(fits(np.concatenate(after.rows), after.info))
        assert enters or self.options["nonfinite"] == "skip"
        before = self.state()
        expected = after.close(enters)
        if after.near_overflow:  # it may
            try:
                call()
            except ValueError as error:
                expected = str(error)
                same(before, self.state())
                if "gave a weight that is not finite" not in expected:
                    raise
        else:
            self.attempt(call, expected)
        if expected:
            return False
        if not enters:
            same_but_for(before, self.state(), "skipped", "closings", "weight")
        self.model = after
        return True

    @rule(data=st.data())
    def update(self, data):
        given, arrays, exact = self.views(data)
        INPUTS["update"] += len(arrays)
        if expected := self.gathered(given, exact):
            return self.attempt(lambda: self.predictor.update(*arrays), expected)
        before, held, info = self.bound, self.model.rows, self.model.info
        self.bind(given[0][0])
        self.model.rows = self.model.rows + exact
        if not self.closed(lambda: self.predictor.update(*arrays)):
            self.bound, self.model.rows, self.model.info = before, held, info
        return self.check()

    @rule(data=st.data())
    def accumulate(self, data):
        given, arrays, exact = self.views(data)
        INPUTS["accumulate"] += len(arrays)
        expected = self.gathered(given, exact)
        self.attempt(lambda: self.predictor.accumulate(*arrays), expected)
        if not expected:
            self.bind(given[0][0])
            self.model.rows = self.model.rows + exact
        self.check()

    @rule()
    def step(self):
        if self.model.rows:
            self.closed(self.predictor.step)
        else:
            self.attempt(self.predictor.step, r"step\(\) needs at least one accumulate")
        self.check()

    @rule(data=st.data())
    def predict(self, data):
        dtype, z = data.draw(features(self.dim, self.dtypes), label="z")
        INPUTS["predict"] += 1
        array = self.array((dtype, z))
        got = self.predictor(array)
        self.bind(dtype)
        assert (got.shape, got.dtype) == (array.shape, array.dtype)
        self.check()
        if dtype == "bfloat16" or not np.isfinite(z).all():
            return
        weight = to_numpy(self.predictor.weight).astype(np.float64)
        info = np.finfo(dtype)
        size = np.abs(z.astype(np.float64)) @ np.abs(weight)
        if np.abs(weight).max() < info.max / 4 and size.max() < info.max / 4:
            # A weight that is narrowed loses what is below the smallest normal number.
            lost = float(info.smallest_normal) * (1 + np.abs(z.astype(np.float64)).sum(-1).max())
            error = np.abs(to_numpy(got) - z.astype(np.float64) @ weight)
            assert (error <= 8 * float(info.eps) * size + lost).all()

    @rule(own=st.booleans(), used=st.booleans())
    def save_and_load(self, own, used):
        """Into a new predictor, or into one in use whose statistics are of the same dtype."""
        INPUTS["state"] += 1
        saved = self.state()
        fresh = dp.DirectPred(self.dim, **self.options)
        if used and self.bound:
            dtype = self.model.info.dtype
            fresh(self.array((dtype.name, np.ones((2, self.dim), dtype))))
        fresh.load_state_dict(self.predictor.state_dict() if own else saved)
        self.predictor, self.bound = fresh, used and self.bound
        same(saved, self.state())

    @rule(how=st.sampled_from(sorted(SPOILED)))
    def load_a_wrong_state(self, how):
        INPUTS["wrong state"] += 1
        spoil, pattern = SPOILED[how]
        spoiled = spoil(self.state())
        self.attempt(lambda: self.predictor.load_state_dict(spoiled), pattern)

    @rule(how=st.sampled_from(sorted(BAD)), call=st.sampled_from(["update", "accumulate", None]))
    def give_bad_features(self, how, call):
        INPUTS["bad features"] += 1
        z, error, pattern = BAD[how](self.backend.library, self.dim)
        predictor = self.predictor
        self.attempt(lambda: (getattr(predictor, call) if call else predictor)(z), pattern, error)

    @precondition(lambda self: self.bound)
    @rule()
    def give_features_of_another_library(self):
        INPUTS["another library"] += 1
        other = BACKENDS["torch-cpu" if self.backend.module == "numpy" else "numpy"]
        z = other.array(np.ones((2, self.dim)))
        self.attempt(lambda: self.predictor.update(z), "expected features of", TypeError)


def same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        np.testing.assert_array_equal(x, b[name], err_msg=name)


def same_but_for(a, b, *names):
    for name, x in b.items():
        if name not in names:
            np.testing.assert_array_equal(a[name], x, err_msg=name)


class TorchMachine(Machine):
    backend = BACKENDS["torch-cpu"]
    dtypes = ("float16", "bfloat16", "float32", "float64")


class StrictMachine(Machine):
    backend = BACKENDS["array-api-strict-2025.12"]
    dtypes = ("float32", "float64")


@pytest.mark.parametrize(
    ("machine", "runs"), [(Machine, 210), (TorchMachine, 30), (StrictMachine, 30)]
)
def test_any_order_of_any_calls(machine, runs):
    pytest.importorskip(machine.backend.module)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs * max(1, TIMES),
            stateful_step_count=40,
            derandomize=not TIMES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_inputs_above_were_many():
    if not INPUTS:
        pytest.skip("nothing was fuzzed")
    print(dict(INPUTS))
    assert sum(INPUTS.values()) >= 10_000
