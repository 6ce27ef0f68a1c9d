"""The weight from features of any scale against the float64 oracle.

Bounds are of ‖W_p − oracle‖ / ‖oracle‖ in spectral norm. In float32, for features with a spectrum
like that of real ones, of full or low rank: 1e-3 by eigh and 2e-3 by
matmul from 1e-17 to 1e18, and twice that for the worst spectra;
from there down the squares lose digits, and a root makes of an error δ in F̂ one of √δ: 1e-2 at
1e-18, 5e-2 at 1e-19, 0.2 at 1e-20 (of a hundred rows and more; the fewer, the worse). In float64,
1e-7 wherever squares fit. XLA flushes denormal numbers: there the bounds hold from 1e-15, and
features below 1e-19 count as zero.
"""

import copy
from itertools import product

import numpy as np
import pytest
from array_api_compat import array_namespace

import directpred as dp
import oracle
from directpred.state import to_numpy

DIM = 24
RULES = [
    (dp.Eq18(), lambda s: oracle.eq18(s, 0.1)),
    (dp.DirectSet(), lambda s: oracle.directset(s, 0.5, 0.1)),
    (dp.DirectCopy(), lambda s: oracle.directcopy(s, 0.3)),
    (dp.BoostScale(), lambda s: oracle.boost_scale(s, 0.01, 0.5, False, 1e-4)),
]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def exact_weight(z, rule):
    """`oracle.weight` for many rows, whose singular vectors would not fit."""
    wide = z.astype(np.float64)
    s, u = np.linalg.eigh(wide.T @ wide / len(wide))
    return (u * rule(np.maximum(s, 0))) @ u.T


def features(rng, rows=100, dim=DIM, rank=None):
    z = rng.normal(size=(rows, dim)) * np.arange(1, dim + 1.0) ** -0.5
    return z if rank is None else z[:, :rank] @ rng.normal(size=(rank, dim))


def relative_error(weight, exact):
    return np.linalg.norm(to_numpy(weight) - exact, 2) / np.linalg.norm(exact, 2)


def bound(scale, dtype, solver):
    if dtype == "float64":
        return 1e-7
    for least, error in ((1e-17, 2e-3 if solver == "matmul" else 1e-3), (1e-18, 1e-2)):
        if scale >= least:
            return error
    return 5e-2 if scale >= 1e-19 else 0.2


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize(("rule", "expected"), RULES, ids=["Eq18", "Set", "Copy", "Boost"])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        ("float32", [1e-20, 1e-19, 1e-18, 1e-17, 1e-9, 1, 1e9, 1e18]),
        ("float64", [1e-150, 1e152]),
    ],
)
def test_weight_equals_the_oracle_at_any_scale(backend, rng, dtype, scales, rule, expected, solver):
    for rank, scale in product([None, 5], scales):
        if scale < 1e-15 and dtype == "float32" and backend.module == "jax.numpy":
            continue
        predictor = dp.DirectPred(DIM, rule=rule, solver=solver)
        batches = [[(scale * features(rng, rank=rank)).astype(dtype)] for _ in range(2)]
        for (z,) in batches:
            weight = predictor.update(backend.array(z, dtype))
        error = relative_error(weight, oracle.weight(batches, 0.3, expected))
        assert error <= bound(scale, dtype, solver), (rank, scale, error)


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_features_that_are_too_small_count_as_zero(backend, rng, solver, rule):
    for scale in (1e-45, 1e-30, 1e-22, 1e-20, 1e-19):
        predictor = dp.DirectPred(DIM, rule=rule, solver=solver)
        for rows in (1, 100):
            z = (scale * features(rng, rows)).astype("float32")
            weight = to_numpy(predictor.update(backend.array(z, "float32")))
            assert np.isfinite(weight).all(), (scale, rows)


def test_rounding_does_not_make_a_direction(backend, rng):
    """Four rows span four; eigenvalues that only rounding has made are 0 to eigh.

    By themselves their roots would be an error of 3e-3 and more.
    """
    rule, root = dp.Eq18(0.0), lambda s: oracle.eq18(s, 0.0)
    z = rng.normal(size=(4, 64)).astype("float32")
    if backend.module != "jax.numpy":  # which flushes these squares to 0
        small = np.float32(1e-19) * z
        weight = dp.DirectPred(64, rule=rule, solver="eigh").update(backend.array(small, "float32"))
        assert relative_error(weight, exact_weight(small, root)) <= 2e-4
    apart = 10 * rng.normal(size=64).astype("float32") + z
    predictor = dp.DirectPred(64, rule=rule, solver="eigh", center=True)
    weight = predictor.update(backend.array(apart, "float32"))
    wide = apart.astype(np.float64)
    assert relative_error(weight, exact_weight(wide - wide.mean(0), root)) <= 2e-4


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize(("distance", "error"), [(0, 2e-3), (1, 4e-3), (10, 2e-2), (100, 0.3)])
@pytest.mark.parametrize("rows", [5, 64, 512])
def test_a_far_mean_costs_the_precision_that_is_documented(
    backend, rng, rows, distance, error, solver
):
    z = (distance * rng.normal(size=64) + rng.normal(size=(rows, 64))).astype("float32")
    predictor = dp.DirectPred(64, rule=dp.Eq18(0.0), solver=solver, center=True)
    weight = predictor.update(backend.array(z, "float32"))
    wide = z.astype(np.float64)
    exact = exact_weight(wide - wide.mean(0), lambda s: oracle.eq18(s, 0.0))
    assert relative_error(weight, exact) <= error


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_large_features_of_many_rows_do_not_overflow(backend, rng, solver):
    """Σ z zᵀ would, beyond 340 rows of 1e18; over micro-batches too."""
    rule, expected = RULES[1]
    predictor = dp.DirectPred(DIM, rule=rule, solver=solver)
    z = (1e18 * features(rng, 5000)).astype("float32")
    for _ in range(40):
        predictor.accumulate(backend.array(z, "float32"))
    exact = exact_weight(z, expected)
    assert relative_error(predictor.step(), exact) <= bound(1, "float32", solver)


def test_a_million_rows_do_not_overflow():
    z = np.broadcast_to(np.float32([1e18, 0]), (1_000_000, 2))
    weight = dp.DirectPred(2, rule=dp.DirectSet()).update(z)
    np.testing.assert_allclose(weight, np.diag([1.1e18, 0.1e18]), rtol=1e-4, atol=1e14)


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 1e18)])
def test_half_precision_features_never_overflow(backend, rng, dtype, largest):
    if not hasattr(backend.library, dtype):
        pytest.skip(f"{backend.module} has no {dtype}")
    signs = backend.array(largest * np.sign(features(rng, 10_000, 8)), "float32")
    z = array_namespace(signs).astype(signs, getattr(backend.library, dtype))
    wide = to_numpy(array_namespace(z).astype(z, signs.dtype))
    weight = dp.DirectPred(8, rule=dp.DirectSet()).update(z)
    exact = exact_weight(wide, lambda s: oracle.directset(s, 0.5, 0.1))
    assert relative_error(weight, exact) <= 1e-3


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_a_correlation_beyond_float32_never_enters(backend, rng, scale, nonfinite):
    predictor = dp.DirectPred(DIM, nonfinite=nonfinite)
    predictor.update(backend.array(features(rng), "float32"))
    before = copy.deepcopy(predictor.state_dict())
    z = backend.array(np.sign(features(rng)) * scale, "float32")
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="the correlation of the features overflows"):
            predictor.update(z)
    else:
        predictor.update(z)
        before |= {"skipped": 1, "closings": 2}
    for name, x in predictor.state_dict().items():
        np.testing.assert_array_equal(to_numpy(x), to_numpy(before[name]), err_msg=name)


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_the_centred_correlation_of_collapsed_features_is_finite(backend, rng, solver):
    """F̂ − m mᵀ is then a difference of rounding errors, of either sign; off by √ε ‖m‖ at most."""
    for mean, spread in product([0.1, 1.0, 30.0, 1e4], [0.0, 1e-3, 1.0]):
        z = mean * rng.uniform(0.5, 1.5, DIM) + spread * rng.normal(size=(100, DIM))
        predictor = dp.DirectPred(DIM, rule=dp.DirectSet(), center=True, solver=solver)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(3):
                weight = to_numpy(predictor.update(backend.array(z, "float32")))
        s, u = np.linalg.eigh(np.cov(z.T, bias=True))
        exact = (u * (np.sqrt(np.maximum(s, 0)) + 0.1 * np.sqrt(s[-1]))) @ u.T
        error = np.linalg.norm(weight - exact, 2)
        off = 2e-3 * np.linalg.norm(exact, 2) + 4e-3 * mean * DIM**0.5
        assert error <= off, (mean, spread, error)


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_the_centred_correlation_of_large_rows_that_are_all_the_same(backend, rule, solver):
    """Its diagonal may be 0 or less, and what is beside it 1e22."""
    z = np.tile(np.float32([3.4558421e14, 8.2161812e14, 3.3043707e14]), (9, 1))
    predictor = dp.DirectPred(3, rule=rule, rho=0.0, center=True, solver=solver)
    assert np.isfinite(to_numpy(predictor.update(backend.array(z, "float32")))).all()


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_where_values_are_unknown_a_weight_that_overflows_is_skipped(rng, solver):
    """The correlation of these rows fits float32, its norm does not."""
    xp = pytest.importorskip("array_api_strict")
    there = xp.Device("device1")
    options = {"rule": dp.Eq18(normalize=False), "solver": solver}
    predictor = dp.DirectPred(64, nonfinite="skip", **options)
    predictor.update(xp.asarray(features(rng, 80, 64).astype("float32"), device=there))
    before = copy.deepcopy(predictor.state_dict())
    z = np.full((4, 64), 4e18, "float32")
    with np.errstate(over="ignore", invalid="ignore"):
        predictor.update(xp.asarray(z, device=there))
        with pytest.raises(ValueError, match="gave a weight that is not finite"):
            dp.DirectPred(64, **options).update(z)
    assert (predictor.step_count, predictor.skipped) == (1, 1)
    for name in ("correlation", "mean", "weight"):
        assert bool(xp.all(getattr(predictor, name) == before[name])), name


@pytest.mark.parametrize("dim", [3, 200, 600])
@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 0.8, 1.0, 1.5, 2.0])
def test_the_error_of_any_power_is_what_4e_6_of_an_eigenvalue_makes(rng, alpha, dim):
    """At spectra with much just above, at and below what counts as 0, and of collapsed features."""
    documented = max(2e-3, 4e-6 ** min(alpha, 1.0))
    directions = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    for small in (0.0, 5e-7, 9e-7, 9.6e-7, 1.2e-6):
        for many in (1, dim // 2, dim - 1):
            s = np.r_[np.full(many, small), np.linspace(0.5, 1, dim - many)]
            z = (directions * np.sqrt(dim * s)).T.astype("float32")
            predictor = dp.DirectPred(dim, rule=dp.DirectSet(alpha, 0.0), solver="eigh")
            exact = exact_weight(z, lambda s: oracle.directset(s, alpha, 0.0))
            assert relative_error(predictor.update(z), exact) <= documented, (small, many)
        if dim > 200:
            return
    for rows in (500, 4000):
        z = np.tile(rng.normal(size=dim), (rows, 1)).astype("float32")
        predictor = dp.DirectPred(dim, rule=dp.DirectSet(alpha, 0.0), solver="eigh")
        exact = exact_weight(z, lambda s: oracle.directset(s, alpha, 0.0))
        assert relative_error(predictor.update(z), exact) <= documented, rows


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
def test_a_square_of_the_correlation_that_float32_holds(backend, rng, scale):
    if backend.module == "jax.numpy":  # which flushes what is below 1e-38 to 0
        scale = max(scale, 1e-8)
    z = (scale * features(rng)).astype("float32")
    weight = dp.DirectPred(DIM, rule=dp.DirectSet(2.0)).update(backend.array(z, "float32"))
    exact = exact_weight(z, lambda s: oracle.directset(s, 2.0, 0.1))
    assert relative_error(weight, exact) <= 1.5e-3


def centred(z):
    return exact_weight(z - z.astype(np.float64).mean(0), lambda s: oracle.eq18(s, 0.0))


def far(rng, ratio, rows, dim=8):
    """Features whose mean is so many times their standard deviation."""
    return (0.7 + rng.normal(size=(rows, dim)) * 0.7 / ratio).astype("float32")


@pytest.mark.parametrize(("ratio", "error"), [(10, 2e-2), (100, 0.3)])
@pytest.mark.parametrize("rows", [10_000, 1_000_000])
def test_a_far_mean_of_many_rows(backend, rng, rows, ratio, error):
    """NumPy adds row after row: over a million the sum is half a percent off."""
    z = far(rng, ratio, rows)
    predictor = dp.DirectPred(8, rule=dp.Eq18(0.0), center=True)
    weight = to_numpy(predictor.update(backend.array(z, "float32")))
    exact = centred(z)
    assert relative_error(weight, exact) <= error
    mean = z.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(to_numpy(predictor.mean), mean, rtol=1e-6)


@pytest.mark.parametrize("rows", [10_000, 1_000_000])
def test_a_feature_that_is_constant_gets_no_variance(backend, rng, rows):
    """Of it, a running sum over the rows would make more than the others have."""
    z = (0.1 * rng.normal(size=(rows, 8))).astype("float32")
    z[:, 3] = 0.7
    weight = dp.DirectPred(8, rule=dp.Eq18(0.0), center=True).update(backend.array(z, "float32"))
    assert relative_error(weight, centred(z)) <= 2e-2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_far_mean_of_many_rows_that_are_cast_block_by_block(backend, rng, dtype):
    if not hasattr(backend.library, dtype):
        pytest.skip(f"{backend.module} has no {dtype}")
    z = backend.array(far(rng, 10, 300_000), "float32")
    narrow = array_namespace(z).astype(z, getattr(backend.library, dtype))
    wide = to_numpy(array_namespace(z).astype(narrow, z.dtype))
    weight = dp.DirectPred(8, rule=dp.Eq18(0.0), center=True).update(narrow)
    assert relative_error(weight, centred(wide)) <= 2e-2


@pytest.mark.parametrize("how", ["accumulate", "views"])
def test_a_far_mean_of_thousands_of_micro_batches(backend, rng, how):
    """A running sum over ten thousand in float32 would lose four digits."""
    if backend.module == "array_api_strict":
        pytest.skip("as NumPy, in minutes")
    z = far(rng, 100, 40_000)
    predictor = dp.DirectPred(8, rule=dp.Eq18(0.0), center=True)
    parts = [backend.array(part, "float32") for part in np.split(z, 10_000)]
    if how == "views":
        weight = predictor.update(*parts)
    else:
        for part in parts:
            predictor.accumulate(part)
        assert predictor.state_dict()["accumulated_rows"] == 40_000
        weight = predictor.step()
    assert relative_error(weight, centred(z)) <= 0.3
    assert weight.dtype == parts[0].dtype
