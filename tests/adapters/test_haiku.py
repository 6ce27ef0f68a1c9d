import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import directpred as dp
import oracle

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

from directpred.adapters import haiku  # noqa: E402

DIM, RHO = 6, 0.5
KEY = jax.random.key(0)


class MLP(hk.Module):
    """As a predictor is written in haiku, with batch normalisation."""

    def __init__(self, width, name, axis_name=None):
        super().__init__(name=name)
        self.width, self.axis_name = width, axis_name

    def __call__(self, x, is_training=True):
        x = hk.Linear(16)(x)
        norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=self.axis_name)
        return hk.Linear(self.width)(jax.nn.relu(norm(x, is_training=is_training)))


def byol(views, is_training, axis_name=None, predicted=DIM, keyword=False):
    """For every view the projection and the prediction."""
    projector = MLP(DIM, "projector", axis_name)
    predictor = MLP(predicted, "predictor", axis_name)
    projections = [projector(view, is_training) for view in views]
    if keyword:
        return [(z, predictor(x=z, is_training=is_training)) for z in projections]
    return [(z, predictor(z, is_training)) for z in projections]


def transformed(f=byol):
    return hk.without_apply_rng(hk.transform_with_state(f))


def head_of(state):
    return state["predictor"]["directpred"]


def views_of(step, rows=32):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 10)) * np.arange(1, 11)
    return (x + 4 * rng.normal(size=(2, *x.shape))).astype("float32")


OPTIMIZER = optax.adam(1e-2)


def start(model, views, **arguments):
    params, state = jax.jit(partial(model.init, is_training=True, **arguments))(KEY, views)
    return params, params, state, state, OPTIMIZER.init(params)


def train_step(model, carry, views, axis_name=None, **arguments):
    """A user's step; the line of close_step is the one that DirectPred adds."""
    params, target, state, target_state, moments = carry
    apply = partial(model.apply, views=views, is_training=True, **arguments)

    def loss_fn(params):
        online, new_state = apply(params, state)
        aim, new_target_state = apply(target, target_state)
        pairs = (online[0][1], aim[1][0]), (online[1][1], aim[0][0])
        loss = -sum(
            jnp.mean(optax.losses.cosine_similarity(p, jax.lax.stop_gradient(t), epsilon=1e-6))
            for p, t in pairs
        )
        return loss, (new_state, new_target_state, online)

    (loss, (state, target_state, online)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    updates, moments = OPTIMIZER.update(grads, moments)
    params = optax.apply_updates(params, updates)
    state = haiku.close_step(state, axis_name)
    target = optax.incremental_update(params, target, 0.05)
    return (params, target, state, target_state, moments), loss, online


def exact_weight(steps, rho=RHO):
    return oracle.weight(steps, rho, lambda s: oracle.eq18(s, 0.1))


def assert_near(got, exact, bound=1e-5):
    assert np.linalg.norm(got - exact, 2) <= bound * np.linalg.norm(exact, 2)


def names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_training():
    plain = start(transformed(), views_of(0))
    model = haiku.replace_predictor(transformed(), rho=RHO)
    carry = start(model, views_of(0))
    assert any("predictor" in name for name in names((plain[0], plain[-1])))
    assert not any("predictor" in name for name in names((carry[0], carry[-1])))
    assert [name for name in carry[2] if name.startswith("predictor")] == ["predictor"]
    step_fn = jax.jit(partial(train_step, model))
    steps, losses, weight = [], [], np.eye(DIM)
    for step in range(30):
        carry, loss, online = step_fn(carry, views_of(step))
        for z, p in online:  # by the weight of the step before
            np.testing.assert_allclose(p, z @ weight, rtol=1e-4, atol=1e-4)
        steps.append([np.asarray(z) for z, _ in online])
        head = head_of(carry[2])
        weight = head.state.weight
        if step % 10 < 2:
            assert_near(weight, exact_weight(steps))
        assert int(head.state.step_count) == step + 1
        assert not head.gathered.outer.any()
        assert int(head.gathered.rows) == 0
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert dp.metrics.effective_rank(head.state.correlation) > 1.5  # and not by collapse


def test_other_parameters_and_outputs_are_those_of_the_model_alone():
    """The projector is initialised and runs as without the adapter."""
    plain, model = transformed(), haiku.replace_predictor(transformed())
    before, after = (start(m, views_of(0)) for m in (plain, model))
    x = views_of(1)
    (expected, _), (got, _) = (
        m.apply(c[0], c[2], x, False) for m, c in ((plain, before), (model, after))
    )
    for (z, _), (same, p) in zip(expected, got, strict=True):
        assert z.shape == p.shape
        assert jax.tree.structure(before[0]["projector/linear"]) == jax.tree.structure(
            after[0]["projector/linear"]
        )
        np.testing.assert_array_equal(p, same)  # the weight is the identity


def test_with_the_rng_of_apply():
    def forward(views, is_training):
        views = views * jax.random.uniform(hk.next_rng_key())
        return byol(views, is_training)

    model = haiku.replace_predictor(hk.transform_with_state(forward), rho=RHO)
    params, state = jax.jit(model.init, static_argnums=2)(KEY, views_of(0), True)
    online, state = jax.jit(model.apply, static_argnums=4)(params, state, KEY, views_of(0), True)
    state = haiku.close_step(state)
    assert_near(head_of(state).state.weight, exact_weight([[z for z, _ in online]]))


@pytest.mark.parametrize("keyword", [False, True])
def test_only_training_gathers(keyword):
    model = haiku.replace_predictor(transformed(partial(byol, keyword=keyword)))
    params, _, state, *_ = start(model, views_of(0))
    for is_training, rows in [(False, 0), (True, 64)]:
        _, after = model.apply(params, state, views_of(0), is_training)
        assert int(head_of(after).gathered.rows) == rows


def test_a_predictor_without_an_argument_for_training_always_gathers():
    default = haiku.replace_predictor(transformed(lambda z: MLP(DIM, "predictor")(z)))
    z = jnp.ones((4, DIM))
    _, after = default.apply(*default.init(KEY, z), z)
    assert int(head_of(after).gathered.rows) == 4
    mode_less = haiku.replace_predictor(transformed(lambda z: hk.Linear(DIM, name="predictor")(z)))
    _, after = mode_less.apply(*mode_less.init(KEY, z), z)
    assert int(head_of(after).gathered.rows) == 4


def test_micro_batches_make_one_step():
    model = haiku.replace_predictor(transformed(), rho=RHO)
    params, _, state, *_ = start(model, views_of(0))
    steps = []
    for step in range(3):
        steps.append([])
        for part in range(2):
            online, state = model.apply(params, state, views_of(10 * step + part), True)
            steps[-1] += [z for z, _ in online]
        state = haiku.close_step(state)
    assert_near(head_of(state).state.weight, exact_weight(steps))


def test_closing_with_nothing_gathered_is_no_step():
    model = haiku.replace_predictor(transformed())
    params, _, state, *_ = start(model, views_of(0))
    state = haiku.close_step(model.apply(params, state, views_of(0), True)[1])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(haiku.close_step(state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_flows_through_the_weight_to_the_features():
    model = haiku.replace_predictor(transformed(lambda z: hk.Linear(DIM, name="predictor")(z)))
    z, g = jax.random.normal(KEY, (2, 20, DIM))
    params, state = model.init(KEY, z)
    state = haiku.close_step(model.apply(params, state, z)[1])

    def loss(z):
        p, after = model.apply(params, state, z)
        return jnp.sum(g * p) + jnp.sum(head_of(haiku.close_step(after)).state.weight)

    weight = head_of(state).state.weight
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z), g @ weight.T, rtol=1e-4, atol=1e-5)


def through_pickle(carry, template, folder):
    (folder / "state.pkl").write_bytes(pickle.dumps(jax.device_get(carry)))
    return pickle.loads((folder / "state.pkl").read_bytes())


def through_npz(carry, template, folder):
    leaves = jax.tree.leaves(carry)
    np.savez(folder / "state.npz", **{str(i): x for i, x in enumerate(leaves)})
    with np.load(folder / "state.npz") as saved:
        restored = [saved[str(i)] for i in range(len(leaves))]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


@pytest.mark.parametrize("through", [through_pickle, through_npz])
def test_a_saved_run_goes_on_identically(tmp_path, through):
    model = haiku.replace_predictor(transformed(), rule=dp.DirectCopy(), freq=2)
    step_fn = jax.jit(partial(train_step, model))
    carry = start(model, views_of(0))
    for step in range(6):
        if step == 3:
            resumed = through(carry, start(model, views_of(0)), tmp_path)
        carry, _, _ = step_fn(carry, views_of(step))
    for step in range(3, 6):
        resumed, _, _ = step_fn(resumed, views_of(step))
    assert jax.tree.structure(resumed) == jax.tree.structure(carry)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(carry), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(head_of(carry[2]).state.step_count) == 6


def two(z):
    with hk.name_scope("online"):
        p = hk.Linear(DIM, name="predictor")(z)
    with hk.name_scope("other"):
        return p, hk.Linear(DIM, name="predictor")(z)


@pytest.mark.parametrize(
    ("forward", "name", "message"),
    [
        (byol, "prediction", r"one module named 'prediction', found 0 .*projector/linear.* name="),
        (two, "predictor", "found 2 among .* online/predictor, other/predictor: pass name="),
        (partial(byol, predicted=4), "predictor", r"not square.*\(32, 6\) to \(32, 4\)"),
    ],
)
def test_a_predictor_that_cannot_be_replaced_is_named(forward, name, message):
    model = haiku.replace_predictor(transformed(forward), name)
    arguments = (views_of(0)[0, :, :DIM],) if forward is two else (views_of(0), True)
    with pytest.raises(ValueError, match=message):
        model.init(KEY, *arguments)


def test_a_full_path_names_one_of_two():
    model = haiku.replace_predictor(transformed(two), "other/predictor")
    model = haiku.replace_predictor(model, "online/predictor", rho=0.9)
    z = views_of(0)[0, :, :DIM]
    params, state = model.init(KEY, z)
    assert not params
    closed = haiku.close_step(model.apply(params, state, z)[1])
    heads = [closed[f"{part}/predictor"]["directpred"].state for part in ("online", "other")]
    assert [int(head.step_count) for head in heads] == [1, 1]
    assert [head.options.rho for head in heads] == [0.9, 0.3]


def test_wrong_options_and_states_are_named():
    with pytest.raises(ValueError, match="rho must be in"):
        haiku.replace_predictor(transformed(), rho=2.0)
    with pytest.raises(ValueError, match=r"with a DirectPred head, got one of .*projector"):
        haiku.close_step(start(transformed(), views_of(0))[2])


def check_on_two_devices():
    """Two devices with half of the rows each equal one with all; the oracle has all too."""
    assert jax.device_count() == 2
    model = haiku.replace_predictor(transformed(), rho=RHO)
    first = views_of(0)

    def split(views):
        return np.stack([views[:, :16], views[:, 16:]])

    mapped = jax.pmap(partial(train_step, model, axis_name="i"), "i")
    carry = start(model, first)
    spread = jax.tree.map(lambda x: jnp.stack([x, x]), carry)
    steps = []
    for step in range(4):
        spread, _, online = mapped(spread, split(views_of(step)))
        steps.append([z.reshape(-1, DIM) for z, _ in online])
        head = head_of(spread[2]).state
        np.testing.assert_array_equal(head.weight[0], head.weight[1])
        assert_near(head.weight[0], exact_weight(steps))
    assert head.step_count.tolist() == [4, 4]
    z = first[0, :, :DIM]
    linear = haiku.replace_predictor(transformed(lambda z: hk.Linear(DIM, name="predictor")(z)))
    params, state = linear.init(KEY, z)
    whole = haiku.close_step(linear.apply(params, state, z)[1])
    parts = jax.pmap(lambda z: haiku.close_step(linear.apply(params, state, z)[1], "i"), "i")(
        z.reshape(2, -1, DIM)
    )
    assert_near(head_of(parts).state.weight[1], head_of(whole).state.weight)
    print("equal")


def test_devices_share_the_weight():
    env = {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(oracle.__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "equal\n", done.stderr


if __name__ == "__main__":
    check_on_two_devices()
