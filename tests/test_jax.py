import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import directpred as dp
import oracle

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

import directpred.jax as dpj  # noqa: E402
from directpred.correlation import merge  # noqa: E402

DIM = 5
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def batches(rng, steps=4, dtype="float32"):
    """Two views a step, of uneven numbers of rows."""
    return [
        [rng.normal(size=(rows, DIM)).astype(dtype) for rows in (20 + step, 9)]
        for step in range(steps)
    ]


def relative_error(got, exact):
    return np.linalg.norm(got - exact, 2) / np.linalg.norm(exact, 2)


def same_state(a, b):
    assert a.options == b.options
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def trained(rng, **options):
    state = dpj.init(DIM, **options)
    for views in batches(rng):
        state, _ = dpj.update(state, *views)
    return state


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    "options",
    [{}, {"rule": dp.BoostScale(), "freq": 2}, {"center": True, "rho": 0.9, "solver": "matmul"}],
    ids=["default", "freq", "center"],
)
def test_it_gives_what_directpred_gives(rng, x64, transform, dtype, bound, options):
    predictor, update = dp.DirectPred(DIM, **options), transform(dpj.update)
    state = dpj.init(DIM, **options, dtype=dtype)
    for step, views in enumerate(batches(rng, dtype=dtype), start=1):
        expected = predictor.update(*views)
        state, weight = update(state, *views)
        # In float32 the eigendecompositions of two libraries differ by more than the statistics.
        np.testing.assert_allclose(weight, expected, atol=bound)
        np.testing.assert_allclose(state.correlation, predictor.correlation, atol=bound / 5)
        np.testing.assert_allclose(state.mean, predictor.mean, atol=bound / 5)
        np.testing.assert_array_equal(weight, state.weight)
        assert {x.dtype for x in (weight, state.correlation, state.mean)} == {jnp.dtype(dtype)}
        assert (int(state.step_count), int(state.skipped)) == (step, 0)


def test_weight_equals_the_oracle(rng, x64):
    steps = batches(rng, dtype="float64")
    state = dpj.init(DIM, rho=0.5, dtype="float64")
    for step, views in enumerate(steps, start=1):
        state, weight = dpj.update(state, *views)
        exact = oracle.weight(steps[:step], 0.5, lambda s: oracle.eq18(s, 0.1))
        assert relative_error(weight, exact) <= 1e-10


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_micro_batches_that_are_merged_equal_one_update(rng, transform):
    gather, close = transform(dpj.gather), transform(dpj.close)
    state = whole = dpj.init(DIM, rho=0.5, center=True)
    for views in batches(rng):
        first, second = gather(state, *views), gather(state, views[0][:3])
        assert all(isinstance(x, jax.Array) for x in first)
        assert (int(first.rows), int(second.rows)) == (sum(map(len, views)), 3)
        state, weight = close(state, merge(first, second))
        whole, expected = dpj.update(whole, *views, views[0][:3])
        np.testing.assert_allclose(weight, expected, atol=5e-6)
        np.testing.assert_allclose(state.mean, whole.mean, atol=1e-6)
    assert int(state.step_count) == 4


def test_a_step_scans_over_its_micro_batches(rng):
    state, z = dpj.init(DIM), rng.normal(size=(3, 8, DIM)).astype("float32")
    zero = jax.tree.map(jnp.zeros_like, dpj.gather(state, z[0]))
    batch, _ = jax.lax.scan(lambda sums, z: (merge(sums, dpj.gather(state, z)), None), zero, z)
    np.testing.assert_allclose(dpj.close(state, batch)[1], dpj.update(state, z)[1], atol=5e-6)


@pytest.mark.parametrize("freq", [1, 2])
def test_closing_without_rows_is_no_step(rng, freq):
    state = trained(rng, freq=freq)
    zero = jax.tree.map(jnp.zeros_like, dpj.gather(state, np.ones((2, DIM), "float32")))
    same_state(jax.jit(dpj.close)(state, zero)[0], state)


def test_moments_of_another_width_are_named(rng):
    batch = dpj.gather(dpj.init(1), np.ones((2, 1), "float32"))  # would broadcast
    with pytest.raises(ValueError, match=r"of shape \(5, 5\), got \(1, 1\)"):
        dpj.close(trained(rng), batch)


def test_gathered_moments_are_constants(rng):
    z = jnp.asarray(rng.normal(size=(6, DIM)), "float32")

    def through(z):
        batch = dpj.gather(dpj.init(DIM), z)
        return (
            jnp.sum(batch.outer)
            + jnp.sum(batch.total)
            + jnp.sum(dpj.close(dpj.init(DIM), batch)[1])
        )

    assert not jax.grad(through)(z).any()


def test_apply_is_a_product_with_the_weight_in_the_dtype_of_z(rng):
    state, z = trained(rng), rng.normal(size=(3, 7, DIM)).astype("float32")
    np.testing.assert_array_equal(dpj.apply(dpj.init(DIM), z), z)
    np.testing.assert_allclose(
        jax.jit(dpj.apply)(state, z), z @ np.asarray(state.weight), atol=1e-5
    )
    for dtype in (jnp.bfloat16, jnp.float16):
        assert dpj.apply(state, jnp.asarray(z, dtype)).dtype == dtype


def test_statistics_of_bfloat16_features_are_float32(rng):
    z = jnp.asarray(rng.normal(size=(5000, DIM)), jnp.bfloat16)
    narrow, weight = jax.jit(dpj.update)(dpj.init(DIM), z)
    assert {x.dtype for x in (weight, narrow.correlation, narrow.mean)} == {jnp.dtype("float32")}
    exact = oracle.weight([[np.asarray(z, "float64")]], 0.3, lambda s: oracle.eq18(s, 0.1))
    assert relative_error(weight, exact) <= 1e-5


def test_gradient_flows_through_z_alone(rng):
    state = trained(rng)
    z, g = jnp.asarray(rng.normal(size=(2, 6, DIM)), "float32")

    def loss(state, z):
        return jnp.sum(g * dpj.apply(state, z))

    by_state, by_z = jax.grad(loss, argnums=(0, 1), allow_int=True)(state, z)
    np.testing.assert_allclose(by_z, g @ state.weight.T, rtol=1e-5)
    for x in (by_state.weight, by_state.correlation, by_state.mean):
        assert not x.any()

    def through_update(z):
        state, weight = dpj.update(dpj.init(DIM), z)
        return jnp.sum(weight) + jnp.sum(state.correlation) + jnp.sum(dpj.apply(state, z) * g)

    # With repeated eigenvalues the derivative of an eigendecomposition would be NaN.
    z = jnp.eye(6, DIM)
    weight = dpj.update(dpj.init(DIM), z)[1]
    np.testing.assert_allclose(jax.jit(jax.grad(through_update))(z), g @ weight.T, rtol=1e-5)


def test_an_ensemble_under_vmap_equals_its_members(rng):
    members = [dpj.init(DIM, freq=2) for _ in range(3)]
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), *members)
    update, apply = jax.jit(jax.vmap(dpj.update)), jax.vmap(dpj.apply)
    for step in range(4):
        z1, z2 = rng.normal(size=(2, 3, 8, DIM)).astype("float32")
        z1[1, 0, 0] = np.nan if step == 2 else z1[1, 0, 0]
        ensemble, weights = update(ensemble, z1, z2)
        members = [dpj.update(m, z1[k], z2[k])[0] for k, m in enumerate(members)]
        for k, member in enumerate(members):
            np.testing.assert_allclose(weights[k], member.weight, atol=5e-6)
            np.testing.assert_allclose(apply(ensemble, z2)[k], dpj.apply(member, z2[k]), atol=5e-5)
    np.testing.assert_array_equal(ensemble.step_count, [4, 3, 4])
    np.testing.assert_array_equal(ensemble.skipped, [0, 1, 0])


def test_steps_scan(rng):
    z = rng.normal(size=(6, 8, DIM)).astype("float32")
    scanned, weights = jax.lax.scan(dpj.update, dpj.init(DIM), z)
    state = dpj.init(DIM)
    for step in range(6):
        state, weight = dpj.update(state, z[step])
        np.testing.assert_allclose(weights[step], weight, atol=5e-6)
    assert scanned.step_count == state.step_count == 6


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("freq", [1, 2])
def test_a_batch_that_is_not_finite_is_skipped(rng, value, freq):
    update = jax.jit(dpj.update)
    with_bad = without = dpj.init(DIM, freq=freq)
    for step, (z1, z2) in enumerate(batches(rng, steps=6)):
        if step in (0, 1, 4):
            bad = z2.copy()
            bad[2, 1] = value
            with_bad, _ = update(with_bad, z1, bad)
        else:
            with_bad, _ = update(with_bad, z1, z2)
            without, _ = update(without, z1, z2)
    assert (int(with_bad.step_count), int(with_bad.skipped)) == (3, 3)
    assert int(with_bad.closings) == 6
    if freq == 1:  # else a weight is due at other steps
        np.testing.assert_array_equal(with_bad.weight, without.weight)
    np.testing.assert_array_equal(with_bad.correlation, without.correlation)
    np.testing.assert_array_equal(with_bad.mean, without.mean)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20])
@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_zero_and_collapsed_features_give_a_finite_weight(value, solver):
    _, weight = dpj.update(dpj.init(DIM, solver=solver), jnp.full((8, DIM), value))
    assert jnp.isfinite(weight).all()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (np.ones((2, 3)), ValueError, r"shape \(n, 5\), got \(2, 3\)"),
        (np.ones(5), ValueError, r"shape \(n, 5\), got \(5,\)"),
        (np.ones((0, 5)), ValueError, "at least one row"),
        (np.ones((2, 5), "int32"), TypeError, "real floating, got int32"),
        (np.ones((2, 5), "complex64"), TypeError, "real floating, got complex64"),
    ],
)
def test_bad_features_are_named_also_when_traced(transform, z, error, message):
    for call in (dpj.update, dpj.gather, dpj.apply):
        with pytest.raises(error, match=message):
            transform(call)(dpj.init(DIM), z)


def test_what_is_no_array_of_jax_or_numpy_is_named():
    torch = pytest.importorskip("torch")
    for z, message in [([[1.0] * DIM], "array, got list"), (torch.ones(2, DIM), "got Tensor")]:
        with pytest.raises(TypeError, match=message):
            dpj.update(dpj.init(DIM), z)
    with pytest.raises(TypeError, match="at least one array"):
        dpj.update(dpj.init(DIM))


class Unhashable(dict):
    def __call__(self, s):
        return s


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be ≥ 1"),
        ({"dim": 3.0}, TypeError, "dim must be an integer"),
        ({"rho": 1.0}, ValueError, "rho must be in"),
        ({"solver": "svd"}, ValueError, "solver must be one of"),
        ({"rule": Unhashable()}, TypeError, "rule must be hashable"),
        ({"dtype": "float64"}, ValueError, "must be float32 .*jax_enable_x64.*, got float64"),
        ({"dtype": jnp.bfloat16}, ValueError, "must be float32 .*, got bfloat16"),
    ],
)
def test_impossible_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        dpj.init(**{"dim": 3, **options})


def test_the_state_goes_to_directpred_and_the_torch_head_and_back(rng):
    torch = pytest.importorskip("torch")
    from directpred.torch import DirectPredHead

    state = trained(rng)
    predictor, head = dp.DirectPred(DIM), DirectPredHead(DIM)
    predictor.load_state_dict(dpj.state_dict(state))
    entries = {name: torch.tensor(np.asarray(x)) for name, x in dpj.state_dict(state).items()}
    head.load_state_dict(entries)
    same_state(dpj.load_state_dict(dpj.init(DIM), predictor.state_dict()), state)
    same_state(dpj.load_state_dict(dpj.init(DIM), head.state_dict()), state)
    z = rng.normal(size=(9, DIM)).astype("float32")
    _, weight = dpj.update(state, z)
    head.gather(torch.from_numpy(z))
    head.step()
    np.testing.assert_allclose(weight, predictor.update(z), atol=5e-6)
    np.testing.assert_allclose(weight, head.weight, atol=5e-6)


def test_a_wrong_state_is_named(rng):
    entries, state = dpj.state_dict(trained(rng)), dpj.init(DIM)
    with pytest.raises(ValueError, match=r"correlation must be of shape \(3, 3\)"):
        dpj.load_state_dict(dpj.init(3), entries)
    with pytest.raises(ValueError, match="version 1 to 3, got 4"):
        dpj.load_state_dict(state, {**entries, "version": 4})
    open_step = dp.DirectPred(DIM)
    open_step.accumulate(np.ones((2, DIM)))
    with pytest.raises(ValueError, match="holds an open step"):
        dpj.load_state_dict(state, open_step.state_dict())


def test_without_float64_a_state_in_float64_becomes_float32(rng):
    """In JAX as it comes; asking for float64 would warn."""
    double = dp.DirectPred(DIM)
    double.update(rng.normal(size=(9, DIM)))
    state = dpj.load_state_dict(dpj.init(DIM), double.state_dict())
    eager = dp.DirectPred(DIM, nonfinite="skip")
    eager.load_state_dict(double.state_dict())
    z = rng.normal(size=(9, DIM)).astype("float32")
    _, weight = dpj.update(state, z)
    np.testing.assert_allclose(weight, double.update(z), atol=5e-6)
    got = eager.update(jnp.asarray(z))
    assert weight.dtype == got.dtype == jnp.float32
    np.testing.assert_allclose(got, weight, atol=5e-6)
    with pytest.raises(ValueError, match="infinity in 1 of 1 rows"):
        dp.DirectPred(DIM).update(jnp.full((1, DIM), jnp.nan))


def test_orbax_round_trip(rng, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = trained(rng, rule=dp.DirectCopy())
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"predictor": state})
        checkpointer.wait_until_finished()
        template = {"predictor": dpj.init(DIM, rule=dp.DirectCopy())}
        same_state(checkpointer.restore(tmp_path / "state", template)["predictor"], state)


def test_flax_round_trip(rng):
    serialization = pytest.importorskip("flax.serialization")
    state, template = trained(rng), dpj.init(DIM)
    saved = serialization.to_bytes({"predictor": state})
    same_state(serialization.from_bytes({"predictor": template}, saved)["predictor"], state)
    entries = serialization.to_state_dict(state)
    same_state(serialization.from_state_dict(template, entries), state)
    with pytest.raises(ValueError, match="expected a DirectPred state of shapes"):
        serialization.from_state_dict(dpj.init(3), entries)


def test_import_touches_no_flax():
    code = "import sys, directpred.jax as j; j.init(3); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert not {"flax", "torch", "haiku"} & set(done.stdout.split())


def test_byol_in_flax_and_optax():
    """Online and target encoder, one jitted step; the predictor is no part of the parameters."""
    linen, optax = pytest.importorskip("flax.linen"), pytest.importorskip("optax")
    encoder = linen.Sequential([linen.Dense(32), linen.relu, linen.Dense(DIM)])
    optimizer = optax.sgd(0.1, momentum=0.9)
    data = jax.random.normal(jax.random.key(1), (64, 16))

    def cosine_loss(p, z):
        return -jnp.mean(optax.losses.cosine_similarity(p, jax.lax.stop_gradient(z), epsilon=1e-6))

    @jax.jit
    def train_step(params, target, moments, predictor, key):
        noise = 1.0 * jax.random.normal(key, (2, *data.shape))

        def loss_and_features(params):
            z1, z2 = encoder.apply(params, data + noise[0]), encoder.apply(params, data + noise[1])
            t1, t2 = encoder.apply(target, data + noise[0]), encoder.apply(target, data + noise[1])
            p1, p2 = dpj.apply(predictor, z1), dpj.apply(predictor, z2)
            return cosine_loss(p1, t2) + cosine_loss(p2, t1), (z1, z2)

        (loss, z), grads = jax.value_and_grad(loss_and_features, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments)
        params = optax.apply_updates(params, updates)
        predictor, _ = dpj.update(predictor, *z)
        target = optax.incremental_update(params, target, 0.01)
        return (params, target, moments, predictor), loss, z

    params = encoder.init(jax.random.key(0), data)
    carry = params, params, optimizer.init(params), dpj.init(DIM)
    losses, seen = [], []
    for step in range(60):
        carry, loss, z = train_step(*carry, jax.random.key(step))
        losses.append(float(loss))
        seen.append(z)
    exact = oracle.weight(seen, 0.3, lambda s: oracle.eq18(s, 0.1))
    assert relative_error(carry[-1].weight, exact) <= 1e-5
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert dp.metrics.effective_rank(carry[-1].correlation) > 1.5  # and not by collapse


def check_on_four_devices():
    """Steps whose rows are spread over devices equal those of one device on all rows."""
    devices = jax.devices("cpu")
    assert len(devices) == 4
    line = jax.sharding.Mesh(np.array(devices), ("i",))
    square = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("i", "j"))
    over = PartitionSpec

    def sharded(mesh, names):
        rows = over(names)
        specs = {"in_specs": (over(), rows, rows), "out_specs": over()}
        update = partial(dpj.update, axis_name=names)
        return jax.jit(jax.shard_map(update, mesh=mesh, **specs))

    def split(update):
        return lambda state, *views: update(state, *(z.reshape(4, -1, DIM) for z in views))

    mapped = jax.pmap(
        partial(dpj.update, axis_name="i"), "i", in_axes=(None, 0, 0), out_axes=(None, None)
    )

    def placed(update):
        sharding = jax.sharding.NamedSharding(line, over("i"))
        return lambda state, *views: update(state, *jax.device_put(views, sharding))

    for update in (
        sharded(line, "i"),
        sharded(square, ("i", "j")),
        split(mapped),
        placed(jax.jit(dpj.update)),
        placed(dpj.update),
    ):
        rng = np.random.default_rng(0)
        alone = spread = dpj.init(DIM, center=True, solver="eigh", dtype="float64")
        for step in range(4):
            z1, z2 = (
                rng.normal(size=(24, DIM)) * np.arange(1, 25)[:, None],
                rng.normal(size=(8, DIM)),
            )
            z1[-1, 0] = np.nan if step == 2 else z1[-1, 0]
            alone, _ = dpj.update(alone, z1, z2)
            spread, weight = update(spread, z1, z2)
            np.testing.assert_allclose(weight, alone.weight, rtol=1e-10)
            np.testing.assert_allclose(spread.mean, alone.mean, rtol=1e-10)
        assert (int(spread.step_count), int(spread.skipped)) == (3, 1)
        predictor = dp.DirectPred(DIM)
        predictor.load_state_dict(dpj.state_dict(spread))
        np.testing.assert_allclose(predictor.weight, alone.weight, rtol=1e-10)
    print("equal")


def test_devices_reduce_over_the_named_axes():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", __file__],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "equal\n", done.stderr


if __name__ == "__main__":
    check_on_four_devices()
