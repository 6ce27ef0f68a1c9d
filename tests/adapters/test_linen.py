"""Flax Linen models, trained as Linen's users do: TrainState, batch normalisation, checkpoints."""

from functools import partial

import numpy as np
import pytest

import directpred as dp
import oracle

jax = pytest.importorskip("jax")
nn = pytest.importorskip("flax.linen")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from flax import serialization  # noqa: E402
from flax.training import train_state  # noqa: E402

from directpred.adapters import linen  # noqa: E402

DIM, ROWS, RHO = 6, 32, 0.5
KEY = jax.random.key(0)


class MLP(nn.Module):
    outputs: int
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(16)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(self.outputs)(nn.relu(x))


class Setup(nn.Module):
    """The parts are made in setup, and named by their attributes."""

    predicted: int = DIM
    norm: bool = True

    def setup(self):
        self.projector = MLP(DIM, self.norm)
        self.predictor = MLP(self.predicted, self.norm)

    def __call__(self, views, train=True):
        projections = [self.projector(view, train) for view in views]
        return projections, [self.predictor(z, train=train) for z in projections]


class Compact(nn.Module):
    """The parts are made where they are called, and named by hand."""

    predicted: int = DIM
    norm: bool = True

    @nn.compact
    def __call__(self, views, train=True):
        projector, predictor = MLP(DIM, self.norm), MLP(self.predicted, self.norm, name="predictor")
        projections = [projector(view, train) for view in views]
        return projections, [predictor(z, train=train) for z in projections]


class Nested(nn.Module):
    predicted: int = DIM
    norm: bool = True

    def setup(self):
        self.online = Setup(self.predicted, self.norm)

    def __call__(self, views, train=True):
        return self.online(views, train)


class TrainState(train_state.TrainState):
    batch_stats: dict


def views_of(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(ROWS, 10)) * np.arange(1, 11)
    return (x + 4 * rng.normal(size=(2, *x.shape))).astype("float32")


def start(model, views):
    variables = model.init(KEY, views)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(1e-2),
    )


def gradients(state, views):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (z, p), new = state.apply_fn(variables, views, mutable=["batch_stats"])
        aim = jax.lax.stop_gradient(z[::-1])
        cos = [
            optax.losses.cosine_similarity(a, b, epsilon=1e-6) for a, b in zip(p, aim, strict=True)
        ]
        return -sum(map(jnp.mean, cos)), (new["batch_stats"], z)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


@jax.jit
def train_step(state, views):
    """A user's; close_step is the line that DirectPred adds."""
    (value, (batch_stats, z)), gradient = gradients(state, views)
    state = state.apply_gradients(grads=gradient, batch_stats=batch_stats)
    state = state.replace(batch_stats=linen.close_step(state.batch_stats))
    return state, value, z


def head_of(batch_stats):
    at = batch_stats.get("online", batch_stats)
    return at["predictor"]["directpred"]


@pytest.mark.parametrize(("kind", "norm"), [(Setup, True), (Compact, True), (Nested, False)])
def test_the_weight_is_that_of_the_features_and_the_loss_falls(kind, norm):
    model = linen.replace_predictor(kind(norm=norm), rule=dp.BoostScale(eps=0.01), rho=RHO)
    state = start(model, views_of(0))
    assert "predictor" not in state.params.get("online", state.params)
    assert [*head_of(state.batch_stats)._fields] == ["state", "gathered"]
    np.testing.assert_array_equal(head_of(state.batch_stats).state.weight, np.eye(DIM))
    assert int(head_of(state.batch_stats).gathered.rows) == 0  # init gathers nothing
    batches, losses = [], []
    for step in range(20):
        before = head_of(state.batch_stats).state.weight
        state, value, z = train_step(state, views_of(step))
        batches.append([np.asarray(x, float) for x in z])
        losses.append(float(value))
        assert not np.array_equal(before, head_of(state.batch_stats).state.weight)
    head = head_of(state.batch_stats)
    expected = oracle.weight(batches, RHO, lambda s: oracle.boost_scale(s, 0.01, 0.5, False, 1e-4))
    np.testing.assert_allclose(head.state.weight, expected, atol=2e-3)
    assert int(head.state.step_count) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_evaluation_gathers_nothing_and_predicts_by_the_weight():
    model = linen.replace_predictor(Setup())
    state, _, _ = train_step(start(model, views_of(0)), views_of(0))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    z, p = model.apply(variables, views_of(1), train=False)
    weight = head_of(state.batch_stats).state.weight
    np.testing.assert_allclose(p[0], z[0] @ weight, rtol=1e-5)
    z, p = model.bind(variables).projector(views_of(1)[0], train=False), None  # the module's own
    assert z.shape == (ROWS, DIM)


def test_micro_batches_are_merged_until_the_step_is_closed():
    model = linen.replace_predictor(Setup(norm=False), rho=RHO)
    state, batches = start(model, views_of(0)), []
    for step in range(2):
        for part in range(2):
            (_, (batch_stats, z)), _ = gradients(state, views_of(2 * step + part))
            state = state.replace(batch_stats=batch_stats)
            batches += [[]] * (part == 0)
            batches[-1] = [*batches[-1], *(np.asarray(x, float) for x in z)]
        state = state.replace(batch_stats=linen.close_step(state.batch_stats))
    head = head_of(state.batch_stats)
    assert int(head.state.step_count) == 2
    expected = oracle.weight(batches, RHO, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.state.weight, expected, atol=2e-3)


def test_a_saved_state_goes_on():
    model = linen.replace_predictor(Setup())
    state, _, _ = train_step(start(model, views_of(0)), views_of(0))
    saved = serialization.to_bytes(state)
    again = serialization.from_bytes(start(model, views_of(0)), saved)
    one, two = (train_step(each, views_of(1))[0] for each in (state, again))
    jax.tree.map(np.testing.assert_array_equal, one.batch_stats, two.batch_stats)


def test_mapped_devices_give_the_weight_of_the_global_batch():
    model = linen.replace_predictor(Setup(norm=False))
    state = start(model, views_of(0))
    whole = train_step(state, views_of(0))[0]

    @partial(jax.vmap, in_axes=(None, 1), axis_name="i")
    def mapped(state, views):
        (_, (batch_stats, _)), _ = gradients(state, views)
        return linen.close_step(batch_stats, "i")

    parts = mapped(state, views_of(0).reshape(2, 2, ROWS // 2, -1))
    weights = head_of(parts).state.weight
    np.testing.assert_allclose(weights[0], head_of(whole.batch_stats).state.weight, atol=1e-4)
    np.testing.assert_array_equal(weights[0], weights[1])


def test_undo():
    model = Setup()
    assert linen.restore(linen.replace_predictor(model)) is model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("model", {}, TypeError, "got str"),
        (Setup(), {"rho": 2.0}, ValueError, "rho"),
        (Setup(), {"unknown": 1}, TypeError, "unknown"),
        (Setup(), {"name": "head"}, ValueError, "found 0 among .*predictor/Dense_0"),
        (Setup(), {"name": "Dense_0"}, ValueError, "found 2 among the modules called, predictor/D"),
        (Setup(predicted=5), {}, ValueError, r"not square: .*\(32, 6\) to \(32, 5\)"),
    ],
)
def test_what_cannot_be_replaced_is_an_error(model, options, error, message):
    with pytest.raises(error, match=message):
        linen.replace_predictor(model, **options).init(KEY, views_of(0))


def test_a_state_without_a_head_is_an_error():
    with pytest.raises(ValueError, match="expected a state with a DirectPred head"):
        linen.close_step({"norm": {"mean": jnp.zeros(3)}})


def test_a_path_tells_two_predictors_apart():
    class Two(nn.Module):
        def setup(self):
            self.a, self.b = Setup(), Setup()

        def __call__(self, views):
            return self.a(views), self.b(views)

    with pytest.raises(ValueError, match="found 2"):
        linen.replace_predictor(Two()).init(KEY, views_of(0))
    variables = linen.replace_predictor(Two(), "b/predictor").init(KEY, views_of(0))
    assert "predictor" in variables["params"]["a"]
    assert "predictor" not in variables["params"]["b"]
