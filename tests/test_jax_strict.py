"""JAX told to promote nothing by itself: neither dtypes nor ranks, with and without float64."""

from contextlib import ExitStack

import numpy as np
import pytest

import directpred as dp
import oracle
from directpred import losses, metrics
from directpred.correlation import merge

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
dpj = pytest.importorskip("directpred.jax")

DIM = 6
RULES = [
    (dp.Eq18(), lambda s: oracle.eq18(s, 0.1)),
    (dp.Eq18(normalize=False), lambda s: oracle.eq18(s, 0.1, False)),
    (dp.DirectSet(), lambda s: oracle.directset(s, 0.5, 0.1)),
    (dp.DirectSet(0.8), lambda s: oracle.directset(s, 0.8, 0.1)),
    (dp.DirectCopy(), lambda s: oracle.directcopy(s, 0.3)),
    (dp.BoostScale(), lambda s: oracle.boost_scale(s, 0.01, 0.5, False, 1e-4)),
    (dp.BoostScale(-0.2), lambda s: oracle.boost_scale(s, -0.2, 0.5, False, 1e-4)),
    (dp.BoostScale(inside=True), lambda s: oracle.boost_scale(s, 0.01, 0.5, True, 1e-4)),
]


@pytest.fixture(params=[False, True], ids=["x32", "x64"], autouse=True)
def dtype(request):
    with ExitStack() as settings:
        settings.enter_context(jax.enable_x64(request.param))
        settings.enter_context(jax.numpy_rank_promotion("raise"))
        settings.enter_context(jax.numpy_dtype_promotion("strict"))
        yield jnp.float64 if request.param else jnp.float32


def close(got, exact, dtype):
    exact = np.asarray(exact)
    np.testing.assert_allclose(
        np.asarray(got), exact, atol=(2e-6 if dtype == jnp.float64 else 2e-3) * np.abs(exact).max()
    )


def solvers(rule):
    return ["auto", "eigh"] + ["matmul"] * (getattr(rule, "matrix_power", None) is not None)


def centred(batches, rho, rule):
    mean = oracle.mean(batches, rho)
    s, u = np.linalg.eigh(oracle.correlation(batches, rho) - np.outer(mean, mean))
    return (u * rule(s)) @ u.T


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=[repr(rule) for rule, _ in RULES])
def test_every_rule_and_solver(rng, dtype, rule, expected):
    batches = [list(1 + rng.normal(size=(2, 20, DIM))) for _ in range(3)]
    views = [[jnp.asarray(z, dtype) for z in batch] for batch in batches]
    for solver in solvers(rule):
        for center in (False, True) if solver == "auto" else (False,):
            exact = (centred if center else oracle.weight)(batches, 0.3, expected)
            options = {"rule": rule, "center": center, "solver": solver}
            predictor = dp.DirectPred(DIM, **options)
            state = dpj.init(DIM, dtype=dtype, **options)
            for batch in views:
                state, weight = jax.jit(dpj.update)(state, *batch)
                predictor.update(*batch)
            close(weight, exact, dtype)
            close(predictor.weight, exact, dtype)
            assert weight.dtype == predictor.weight.dtype == dtype
            close(dpj.apply(state, views[0][0]), batches[0][0] @ exact, dtype)
            close(predictor(views[0][0]), batches[0][0] @ exact, dtype)


@pytest.mark.parametrize("half", ["float16", "bfloat16", "float8_e4m3fn"])
def test_half_precision(rng, dtype, half):
    z = jnp.asarray(rng.normal(size=(20, DIM)), getattr(jnp, half))
    state, weight = dpj.update(dpj.init(DIM, dtype=dtype), z, z)
    predictor = dp.DirectPred(DIM)
    close(predictor.update(z, z), weight, jnp.float32)
    for prediction in (predictor(z), dpj.apply(state, z), jax.jit(dpj.apply)(state, z)):
        assert prediction.dtype == z.dtype
        wide = np.asarray(z, np.float64) @ np.asarray(weight, np.float64)
        error = np.asarray(prediction, np.float64) - wide
        assert np.abs(error).max() <= 4 * float(jnp.finfo(half).eps) * np.abs(wide).max()


def test_micro_batches_freq_and_a_saved_state(rng, dtype):
    batches = [[z] for z in rng.normal(size=(4, 20, DIM))]
    state = dpj.init(DIM, freq=3, rho=np.float64(0.3), dtype=dtype)
    for (z,) in batches:
        parts = [dpj.gather(state, jnp.asarray(part, dtype)) for part in (z[:3], z[3:])]
        state, _ = jax.jit(dpj.close)(state, merge(*parts))
    close(state.weight, oracle.weight(batches, 0.3, RULES[0][1]), dtype)
    loaded = dpj.load_state_dict(dpj.init(DIM, freq=3, dtype=dtype), dpj.state_dict(state))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    predictor = dp.DirectPred(DIM, freq=3)
    predictor.load_state_dict(dpj.state_dict(state))
    for z in (z for (z,) in batches):
        predictor.accumulate(jnp.asarray(z[:5], dtype))
        predictor.accumulate(jnp.asarray(z[5:], dtype))
        predictor.step()
        state, _ = dpj.update(state, jnp.asarray(z, dtype))
    close(predictor.weight, state.weight, dtype)
    assert predictor.step_count == int(state.step_count) == 8


def test_an_ensemble_and_named_axes(rng, dtype):
    views = jnp.asarray(rng.normal(size=(3, 20, DIM)), dtype)
    states = jax.vmap(lambda _: dpj.init(DIM, dtype=dtype))(jnp.arange(3))
    _, weights = jax.vmap(dpj.update)(states, views)
    _, shared = jax.vmap(lambda s, z: dpj.update(s, z, axis_name="i"), axis_name="i")(states, views)
    for weight, z in zip(weights, np.asarray(views), strict=True):
        close(weight, oracle.weight([[z]], 0.3, RULES[0][1]), dtype)
    close(shared[0], oracle.weight([[np.concatenate(np.asarray(views))]], 0.3, RULES[0][1]), dtype)


def test_the_twin_in_flax(rng, dtype):
    flax = pytest.importorskip("directpred.flax")
    head = flax.DirectPredHead(DIM, dtype=dtype)
    z = jnp.asarray(rng.normal(size=(20, DIM)), dtype)
    for _ in range(2):
        head(z)
        head(2 * z)
        head.step()
    exact = oracle.weight([[np.asarray(z), 2 * np.asarray(z)]] * 2, 0.3, RULES[0][1])
    close(head.weight[...], exact, dtype)
    assert int(head.step_count[...]) == 2


@pytest.mark.parametrize("half", [None, "float16", "bfloat16"])
def test_losses_and_metrics(rng, dtype, half):
    p, t = (jnp.asarray(x, half or dtype) for x in rng.normal(size=(2, 20, DIM)))
    wide = [np.asarray(x, np.float64) for x in (p, t)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in wide]
    cosine = 2 - 2 * np.mean(np.sum(unit[0] * unit[1], axis=1))
    euclidean = np.mean(np.sum((wide[0] - wide[1]) ** 2, axis=1)) / 2
    for loss in (losses.regression_loss, lambda p, t, *a: losses.iso_loss(p, p, t, *a)):
        for arguments, exact in (((), cosine), ((True,), euclidean)):
            value, gradient = jax.value_and_grad(loss)(p, t, *arguments)
            np.testing.assert_allclose(float(value), exact, rtol=1e-5)
            assert gradient.dtype == p.dtype
    close(metrics.spread(p), np.mean(np.std(unit[0], axis=0)) * DIM**0.5, jnp.float32)
    correlation = p.T @ p
    assert np.abs(np.asarray(metrics.alignment(correlation, correlation), float)).min() > 0.99
    assert 1 < float(metrics.effective_rank(correlation)) < DIM


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("solver", ["auto", "eigh"])
def test_a_batch_that_is_not_finite(rng, dtype, solver, jit):
    update = jax.jit(dpj.update) if jit else dpj.update
    state = dpj.init(DIM, center=True, solver=solver, dtype=dtype)
    state, weight = update(state, jnp.asarray(rng.normal(size=(20, DIM)), dtype))
    state, again = update(state, jnp.full((20, DIM), jnp.nan, dtype))
    np.testing.assert_array_equal(weight, again)
    assert (int(state.step_count), int(state.skipped)) == (1, 1)


@pytest.mark.parametrize("stored", [">f2", ">f4", ">f8", "longdouble"])
def test_features_of_numpy_in_another_order_of_bytes(rng, dtype, stored):
    z = rng.normal(size=(20, DIM)).astype(stored)
    state, weight = dpj.update(dpj.init(DIM, dtype=dtype), z)
    exact = oracle.weight([[z.astype(np.float64)]], 0.3, RULES[0][1])
    close(weight, exact, dtype)
    close(dpj.apply(state, z), z.astype(np.float64) @ exact, jnp.float32)
