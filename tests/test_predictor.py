import copy
import pickle

import numpy as np
import pytest
from array_api_compat import array_namespace
from hypothesis import given, settings
from hypothesis import strategies as st

import directpred as dp
import oracle
from directpred.state import to_numpy

RULE, EXPECTED_RULE = dp.Eq18(eps=0.1), lambda s: oracle.eq18(s, 0.1)


def features(kind, rng, rows, dim):
    z = rng.normal(size=(rows, dim))
    if kind == "power law":
        z *= np.arange(1, dim + 1.0) ** -0.5
    if kind == "rank-deficient":
        z = z[:, : dim // 4] @ rng.normal(size=(dim // 4, dim))
    if kind == "repeated":
        z = np.linalg.qr(z)[0] * np.sqrt(rows) * np.where(np.arange(dim) < dim // 2, 1.0, 0.5)
    return z


def relative_error(weight, exact):
    return np.linalg.norm(weight - exact, 2) / np.linalg.norm(exact, 2)


def same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(to_numpy(a[name]), to_numpy(b[name]), err_msg=name)


@pytest.mark.parametrize("kind", ["random", "power law", "rank-deficient", "repeated"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_weight_equals_the_oracle_over_steps(backend, rng, kind, dtype, bound, rho):
    dim = 32
    predictor = dp.DirectPred(dim, rule=RULE, rho=rho, solver="eigh")  # also on a GPU
    batches = []
    for rows in (256, 64, 100):
        views = [features(kind, rng, n, dim).astype(dtype) for n in (rows, rows + 8)]
        batches.append(views)
        weight = predictor.update(*(backend.array(v, dtype) for v in views))
        # A step's low-rank features span other directions than those of the step before.
        exact = oracle.weight(batches, rho, EXPECTED_RULE)
        assert relative_error(backend.to_numpy(weight), exact) <= bound
        np.testing.assert_allclose(
            backend.to_numpy(predictor.correlation),
            oracle.correlation(batches, rho),
            atol=bound * np.linalg.norm(oracle.correlation(batches, rho), 2),
        )
        np.testing.assert_allclose(
            backend.to_numpy(predictor.mean), oracle.mean(batches, rho), atol=bound * 10
        )
    assert predictor.step_count == 3
    np.testing.assert_array_equal(to_numpy(weight), to_numpy(predictor.weight))


def test_it_is_the_identity_until_it_is_set(backend, rng):
    predictor = dp.DirectPred(4)
    z = backend.array(rng.normal(size=(6, 4)))
    np.testing.assert_array_equal(predictor.weight, np.eye(4))
    np.testing.assert_array_equal(backend.to_numpy(predictor(z)), backend.to_numpy(z))
    assert predictor.step_count == 0
    predictor.update(z)
    expected = backend.to_numpy(z) @ backend.to_numpy(predictor.weight)
    np.testing.assert_allclose(backend.to_numpy(predictor(z)), expected, rtol=1e-12)


def test_weight_is_set_at_updates_0_freq_2freq(backend, rng):
    predictor = dp.DirectPred(4, freq=3)
    changed = []
    for _ in range(8):
        before, correlation = to_numpy(predictor.weight), to_numpy(predictor.correlation)
        predictor.update(backend.array(rng.normal(size=(6, 4))))
        changed.append(not np.array_equal(before, to_numpy(predictor.weight)))
        assert not np.array_equal(correlation, to_numpy(predictor.correlation))
    assert changed == [True, False, False, True, False, False, True, False]


def test_center_subtracts_the_average_mean(backend, rng):
    batches = [[5 + rng.normal(size=(50, 6))] for _ in range(3)]
    predictor = dp.DirectPred(6, rule=dp.DirectCopy(eps=0.0), rho=0.5, center=True)
    for views in batches:
        weight = predictor.update(*map(backend.array, views))
    m = oracle.mean(batches, 0.5)
    exact = oracle.correlation(batches, 0.5) - np.outer(m, m)
    np.testing.assert_allclose(backend.to_numpy(weight), exact, atol=1e-12)
    assert np.linalg.norm(backend.to_numpy(predictor.correlation)) > 100


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(1, 39), unique=True, max_size=6),
    rho=st.floats(0, 0.99),
    center=st.booleans(),
)
def test_micro_batches_give_what_one_update_gives(backend, rng, cuts, rho, center):
    whole, spread = (dp.DirectPred(5, rho=rho, center=center) for _ in range(2))
    for _ in range(3):
        z = rng.normal(size=(40, 5))
        whole.update(backend.array(z))
        for part in np.split(z, sorted(cuts)):
            spread.accumulate(backend.array(part))
        weight = spread.step()
        np.testing.assert_allclose(
            backend.to_numpy(weight), backend.to_numpy(whole.weight), rtol=1e-9, atol=1e-12
        )
    assert spread.step_count == whole.step_count == 3


def test_update_takes_in_what_was_accumulated(rng):
    z = rng.normal(size=(40, 5))
    one, two = dp.DirectPred(5), dp.DirectPred(5)
    one.accumulate(z[:10])
    one.update(z[10:])
    two.update(z)
    np.testing.assert_allclose(one.weight, two.weight, rtol=1e-10)


@given(order=st.permutations(range(4)))
def test_order_and_shape_of_views_do_not_matter(rng, order):
    z = rng.normal(size=(4, 8, 5))
    one, two, three = (dp.DirectPred(5) for _ in range(3))
    one.update(z)
    two.update(*z[list(order)])
    three.update(z.reshape(32, 5))
    np.testing.assert_allclose(one.weight, two.weight, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(one.weight, three.weight, rtol=1e-10, atol=1e-12)


def test_one_row_is_enough(backend):
    predictor = dp.DirectPred(3, solver="eigh")
    weight = backend.to_numpy(predictor.update(backend.array([[2.0, 0.0, 0.0]])))
    np.testing.assert_allclose(weight, np.diag([1.1, 0.1, 0.1]), rtol=1e-12)


@pytest.mark.parametrize(
    "rule", [dp.Eq18(), dp.DirectSet(), dp.DirectCopy(), dp.BoostScale()], ids=str
)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20, 1e-30])
def test_zero_and_collapsed_features_give_a_finite_weight(backend, rule, value):
    for dtype in ("float32", "float64"):
        predictor = dp.DirectPred(4, rule=rule)
        for _ in range(3):
            weight = predictor.update(backend.array(np.full((8, 4), value), dtype))
            assert np.isfinite(backend.to_numpy(weight)).all()


def test_any_callable_is_a_rule(backend, rng):
    z = rng.normal(size=(50, 4))
    weight = dp.DirectPred(4, rule=lambda s: 1 + 0 * s).update(backend.array(z))
    np.testing.assert_allclose(backend.to_numpy(weight), np.eye(4), atol=1e-12)


@pytest.mark.parametrize(("dtype", "statistics"), [("float32", "float32"), ("float64", "float64")])
def test_statistics_and_weight_are_float32_or_better(backend, rng, dtype, statistics):
    predictor = dp.DirectPred(4)
    z = backend.array(rng.normal(size=(6, 4)), dtype)
    weight = predictor.update(z)
    for x in (weight, predictor.correlation, predictor.mean):
        assert x.dtype == backend.array([0.0], statistics).dtype
    assert predictor(z).dtype == z.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_features(backend, rng, dtype):
    if not hasattr(backend.library, dtype):
        pytest.skip(f"{backend.module} has no {dtype}")
    rows = rng.normal(size=(64, 4)).astype(np.float16).astype(np.float32)
    z = backend.array(rows, "float32")
    z = array_namespace(z).astype(z, getattr(backend.library, dtype))
    predictor = dp.DirectPred(4, solver="eigh")
    weight = predictor.update(z)
    assert weight.dtype == backend.array([0.0], "float32").dtype
    assert predictor(z).dtype == z.dtype
    bound = 1e-5 if dtype == "float16" else 1e-2
    assert relative_error(to_numpy(weight), oracle.weight([[rows]], 0.3, EXPECTED_RULE)) <= bound


BAD = [
    (lambda b: [[1.0, 2.0, 3.0]], TypeError, "must be an array, got list"),
    (lambda b: None, TypeError, "must be an array, got NoneType"),
    (lambda b: b.array([[1, 2, 3]], "int64"), TypeError, r"real floating, got .*int64"),
    (lambda b: b.array([[1, 2, 3]], "complex128"), TypeError, r"real floating, got .*complex128"),
    (lambda b: b.array([[1, 2, 3]], "bool"), TypeError, "real floating, got"),
    (lambda b: b.array([[1.0, 2.0]]), ValueError, r"shape \(n, 3\), got \(1, 2\)"),
    (lambda b: b.array([1.0, 2.0, 3.0]), ValueError, r"shape \(n, 3\), got \(3,\)"),
    (lambda b: b.array(1.0), ValueError, r"shape \(n, 3\), got \(\)"),
    (lambda b: b.array(np.ones((0, 3))), ValueError, "at least one row"),
    (lambda b: b.array(np.ones((2, 0, 3))), ValueError, "at least one row"),
    (lambda b: b.array([[1, np.nan, 3], [1, 2, 3]]), ValueError, "infinity in 1 of 2 rows"),
    (lambda b: b.array([[np.inf, 1, 3]]), ValueError, "NaN or infinity in 1 of 1 rows"),
    (lambda b: b.array([[1e200, 1, 3]]), ValueError, r"overflows: .*1e\+200"),
]


@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("call", ["update", "accumulate", "second view"])
@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_features_are_named_and_change_nothing(backend, rng, make, error, message, call, used):
    predictor = dp.DirectPred(3)
    good = backend.array(rng.normal(size=(4, 3)))
    if used:
        predictor.update(good)
        predictor.accumulate(good)
    before = copy.deepcopy(predictor.state_dict())
    views = (good, make(backend)) if call == "second view" else (make(backend),)
    with pytest.raises(error, match=message):
        (predictor.accumulate if call == "accumulate" else predictor.update)(*views)
    same_state(before, predictor.state_dict())
    predictor.update(good)


@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_arrays_of_two_libraries_are_refused(first, rng):
    torch = pytest.importorskip("torch")
    z = rng.normal(size=(4, 3))
    ours, other = (z, torch.from_numpy(z)) if first == "numpy" else (torch.from_numpy(z), z)
    predictor = dp.DirectPred(3)
    with pytest.raises(TypeError, match="expected features of"):
        predictor.update(ours, other)
    predictor.update(other)  # nothing of the failed call binds the predictor
    before = copy.deepcopy(predictor.state_dict())
    for call in (predictor.update, predictor.accumulate, predictor):
        with pytest.raises(TypeError, match=f"expected features of {type(other).__module__}"):
            call(ours)
    same_state(before, predictor.state_dict())


def test_another_device_is_refused(rng):
    xp = pytest.importorskip("array_api_strict")
    z = rng.normal(size=(4, 3))
    predictor = dp.DirectPred(3)
    predictor.update(xp.asarray(z))
    with pytest.raises(ValueError, match=r"expected features on .*CPU.*, got some on .*device1"):
        predictor.update(xp.asarray(z, device=xp.Device("device1")))


@pytest.mark.parametrize("freq", [1, 2, 4])
def test_where_the_host_must_not_read_values_the_result_is_the_same(rng, freq):
    """array-api-strict's other devices stand for a GPU: every choice is made by `where`."""
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("device1")
    options = {"freq": freq, "solver": "eigh", "nonfinite": "skip"}
    there, here = (dp.DirectPred(3, **options) for _ in range(2))
    for step in range(6):
        z = rng.normal(size=(5, 3))
        z[0, 0] = np.nan if step in (0, 3) else z[0, 0]
        with np.errstate(invalid="ignore"):
            there.update(xp.asarray(z, device=device))
            here.update(z)
        weight = np.from_dlpack(there.weight.to_device(xp.Device("CPU_DEVICE")))
        np.testing.assert_allclose(weight, here.weight, rtol=1e-12)
        assert (there.step_count, there.skipped) == (here.step_count, here.skipped)
    assert (here.step_count, here.skipped) == (4, 2)


def test_no_views_at_all():
    with pytest.raises(TypeError, match="at least one array"):
        dp.DirectPred(3).update()
    with pytest.raises(ValueError, match="at least one accumulate"):
        dp.DirectPred(3).step()


@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_skip_is_as_if_the_batch_had_never_come(backend, rng, value):
    with_bad, without = (dp.DirectPred(3, nonfinite="skip") for _ in range(2))
    for step in range(6):
        z = rng.normal(size=(5, 3))
        if step in (0, 1, 4):
            bad = z.copy()
            bad[2, 1] = value
            with_bad.update(backend.array(z), backend.array(bad))
        else:
            with_bad.update(backend.array(z))
            without.update(backend.array(z))
    assert with_bad.skipped == 3
    same_state({**without.state_dict(), "skipped": 3, "closings": 6}, with_bad.state_dict())


def scheduled(batches, freq, rho=0.3):
    """The weight after every closing, by its definition; a batch that is None does not enter."""
    weight, weights, entered = np.eye(3), [], []
    for closing, z in enumerate(batches):
        due = closing % freq == 0 or (closing < freq and not entered)
        entered += [] if z is None else [[z]]
        if due and entered:
            weight = oracle.weight(entered, rho, lambda s: oracle.eq18(s, 0.1))
        weights.append(weight)
    return weights


@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("freq", [1, 2, 3, 20])
@pytest.mark.parametrize("bad", [(), (0,), (0, 1, 2), (3, 4), tuple(range(11))], ids=str)
def test_freq_counts_closings_whatever_they_held(backend, rng, freq, bad):
    predictor = dp.DirectPred(3, freq=freq, nonfinite="skip", solver="eigh")
    batches = [None if step in bad else rng.normal(size=(5, 3)) for step in range(11)]
    for z, expected in zip(batches, scheduled(batches, freq), strict=True):
        given = backend.array(np.full((2, 3), np.nan) if z is None else z)
        weight = backend.to_numpy(predictor.update(given))
        np.testing.assert_allclose(weight, expected, atol=1e-9)
    assert (predictor.step_count, predictor.skipped) == (11 - len(bad), len(bad))
    saved = predictor.state_dict()
    assert int(to_numpy(saved["closings"])) == 11


@pytest.mark.filterwarnings("ignore:.*encountered in matmul:RuntimeWarning")
def test_skip_drops_the_whole_step_of_a_bad_micro_batch(backend, rng):
    predictor = dp.DirectPred(3, nonfinite="skip")
    good = backend.array(rng.normal(size=(5, 3)))
    predictor.update(good)
    before = copy.deepcopy(predictor.state_dict())
    predictor.accumulate(good)
    predictor.accumulate(backend.array(np.full((2, 3), np.nan)))
    predictor.step()
    same_state({**before, "skipped": 1, "closings": 2}, predictor.state_dict())


def test_overflow_of_the_sum_is_not_let_in(backend):
    predictor = dp.DirectPred(2)
    z = backend.array([[1.8e19, 0.0]], "float32")
    with np.errstate(over="ignore"):
        predictor.accumulate(z)
        many = np.diag(np.asarray([3.4028e38, 0.0], "float32"))  # 4096 such rows
        predictor.load_state_dict({**predictor.state_dict(), "accumulated_outer": many})
        before = copy.deepcopy(predictor.state_dict())
        with pytest.raises(ValueError, match="overflows"):
            predictor.update(z)
    same_state(before, predictor.state_dict())


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_rule_that_gives_infinity_is_named(backend, rng, nonfinite):
    def inverse(s):
        return 1 / s

    predictor = dp.DirectPred(3, rule=inverse, nonfinite=nonfinite)
    predictor.update(backend.array(rng.normal(size=(5, 3))))
    before = copy.deepcopy(predictor.state_dict())
    predictor.options = predictor.options._replace(rho=0.0)
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=r"inverse .* gave a weight that is not finite"),
    ):
        predictor.update(backend.array(np.zeros((5, 3))))
    same_state(before, predictor.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be ≥ 1, got 0"),
        ({"dim": 3.0}, TypeError, "dim must be an integer, got 3.0"),
        ({"dim": True}, TypeError, "dim must be an integer"),
        ({"rho": 1.0}, ValueError, "rho must be in"),
        ({"rho": -0.1}, ValueError, "rho must be in"),
        ({"rho": float("nan")}, ValueError, "rho must be in"),
        ({"freq": 0}, ValueError, "freq must be an integer ≥ 1, got 0"),
        ({"freq": True}, ValueError, "freq must be an integer ≥ 1, got True"),
        ({"center": "no"}, TypeError, "center must be True or False, got 'no'"),
        ({"freq": 1.5}, ValueError, "freq must be an integer ≥ 1, got 1.5"),
        ({"solver": "svd"}, ValueError, r"solver must be one of \['auto', 'eigh'.*got 'svd'"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be 'raise' or 'skip'"),
        ({"rule": 0.5}, TypeError, "rule must be a callable"),
        ({"rule": dp.Eq18}, TypeError, "rule must be a callable s -> p such as Eq18"),
    ],
)
def test_impossible_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        dp.DirectPred(**{"dim": 3, **options})


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_a_saved_state_continues_in_any_library(source, backend, rng, accumulated, used):
    original, restored = dp.DirectPred(4, freq=2), dp.DirectPred(4, freq=2)
    z = [rng.normal(size=(9, 4)) for _ in range(5)]
    for batch in z[:3]:
        original.update(source.array(batch))
    if accumulated:
        original.accumulate(source.array(z[3]))
    if used:
        restored.update(backend.array(z[4]))
    restored.load_state_dict(original.state_dict())
    for batch in z[3:]:
        original.update(source.array(batch))
        restored.update(backend.array(batch))
    np.testing.assert_allclose(to_numpy(restored.weight), to_numpy(original.weight), rtol=1e-10)
    assert restored.step_count == original.step_count == 5


def test_a_saved_state_is_plain_and_survives_npz(backend, rng, tmp_path):
    predictor = dp.DirectPred(4)
    predictor.update(backend.array(rng.normal(size=(9, 4))))
    state = {name: to_numpy(x) for name, x in predictor.state_dict().items()}
    np.savez(tmp_path / "state.npz", **state)
    restored = dp.DirectPred(4)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as saved:
        restored.load_state_dict(saved)
    same_state(restored.state_dict(), state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: dp.DirectPred(5).state_dict(), r"correlation must be of shape \(4, 4\)"),
        (lambda s: {**s, "version": 4}, "version 1 to 3, got 4"),
        (lambda s: {**s, "version": "new"}, "version 1 to 3, got 'new'"),
        (lambda s: {**s, "version": [1]}, r"version 1 to 3, got \[1\]"),
        (lambda s: {**s, "step_count": -0.5}, "step_count must be a number ≥ 0, got -0.5"),
        (lambda s: {**s, "skipped": float("nan")}, "skipped must hold finite numbers"),
        (
            lambda s: {k: v for k, v in s.items() if k != "version"},
            "version 1 to 3, got None",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "mean"}, r"missing \['mean'\]"),
        (lambda s: {**s, "momentum": 1}, r"unknown \['momentum'\]"),
        (lambda s: {**s, "mean": np.zeros(3)}, r"mean must be of shape \(4,\), got \(3,\)"),
        (lambda s: {**s, "correlation": np.full((4, 4), np.nan)}, "correlation must hold finite"),
        (lambda s: {**s, "weight": np.full((4, 4), "x")}, "weight must hold finite numbers"),
        (lambda s: {**s, "accumulated_rows": 3}, r"missing \['accumulated_outer'"),
        (lambda s: {**s, "step_count": np.zeros(2)}, r"step_count must be of shape \(\)"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(backend, rng, spoil, message):
    predictor = dp.DirectPred(4)
    predictor.update(backend.array(rng.normal(size=(9, 4))))
    before = copy.deepcopy(predictor.state_dict())
    state = {k: to_numpy(v) if k != "version" else v for k, v in before.items()}
    with pytest.raises(ValueError, match=message):
        predictor.load_state_dict(spoil(state))
    same_state(before, predictor.state_dict())


def test_a_loaded_state_is_a_copy(rng):
    original, restored = dp.DirectPred(4), dp.DirectPred(4)
    original.update(rng.normal(size=(9, 4)))
    state = {k: np.array(v) for k, v in original.state_dict().items()}
    restored.load_state_dict(state)
    state["weight"][:] = 7
    assert not (restored.weight == 7).any()


def test_copies_are_independent(backend, rng):
    predictor = dp.DirectPred(4)
    z = backend.array(rng.normal(size=(9, 4)))
    predictor.update(z)
    copies = [copy.deepcopy(predictor)]
    if backend.module != "array_api_strict":  # its arrays do not pickle
        copies.append(pickle.loads(pickle.dumps(predictor)))
    for other in copies:
        other.update(z)
        assert (other.step_count, predictor.step_count) == (2, 1)
        expected = backend.to_numpy(z) @ backend.to_numpy(other.weight)
        np.testing.assert_allclose(backend.to_numpy(other(z)), expected, rtol=1e-12)


def test_features_are_not_changed(backend, rng):
    z = rng.normal(size=(9, 4))
    given_array = backend.array(z)
    predictor = dp.DirectPred(4)
    predictor.update(given_array)
    predictor(given_array)
    np.testing.assert_array_equal(backend.to_numpy(given_array), z)


def test_repr_tells_the_options():
    assert repr(dp.DirectPred(3, rho=0.5)).startswith(
        "DirectPred(dim=3, rule=Eq18(eps=0.1, normalize=True), rho="
    )


def test_scalars_of_numpy_decide_no_dtype(backend, rng):
    z = backend.array(rng.normal(size=(20, 4)), "float32")
    rules = [
        dp.Eq18(np.float64(0.1)),
        dp.DirectSet(np.float64(0.5), np.float32(0.1)),
        dp.DirectCopy(np.float16(0.5)),
        dp.BoostScale(np.float64(0.1), np.float64(0.5), floor=np.float64(1e-3)),
    ]
    for rule in rules:
        predictor = dp.DirectPred(4, rule=rule, rho=np.linspace(0.1, 0.5, 2)[0])
        for _ in range(3):
            predictor.update(z)
        for x in (predictor.weight, predictor.correlation, predictor.mean):
            assert x.dtype == z.dtype, rule


@pytest.mark.parametrize("value", ["0.3", None, [0.3]])
def test_options_that_are_no_numbers_are_named(value):
    with pytest.raises(TypeError, match="rho must be a number in"):
        dp.DirectPred(4, rho=value)
    with pytest.raises(TypeError, match="eps must be ≥ 0, got"):
        dp.Eq18(eps=value)


def test_products_of_torch_are_exact_whatever_its_user_allows(rng):
    torch = pytest.importorskip("torch")
    z = torch.from_numpy(rng.normal(size=(64, 8)).astype("float32"))
    expected = dp.DirectPred(8).update(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dp.DirectPred(8).update(z), expected)
