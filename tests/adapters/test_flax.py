import copy
import gc
import weakref
from functools import partial

import numpy as np
import pytest

import directpred as dp
import oracle

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

import directpred.jax as dpj  # noqa: E402
from directpred.adapters import flax  # noqa: E402
from directpred.flax import DirectPredHead  # noqa: E402

DIM, RHO = 6, 0.5
# Of flax, in its own functions and those of stable-pretraining.
pytestmark = pytest.mark.filterwarnings("ignore:`flax.nnx.State` will be deprecated")


class Predictor(nnx.Module):
    """Its attributes in alphabetical order are not its layers in the order they run."""

    def __init__(self, rngs, width=DIM):
        self.up = nnx.Linear(DIM, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.down = nnx.Linear(16, width, rngs=rngs)

    def __call__(self, z):
        return self.down(jax.nn.relu(self.norm(self.up(z))))


class BYOL(nnx.Module):
    def __init__(self, rngs, predicted=DIM):
        self.encoder = nnx.Sequential(
            nnx.Linear(10, 32, rngs=rngs), jax.nn.relu, nnx.Linear(32, DIM, rngs=rngs)
        )
        self.predictor = Predictor(rngs, predicted)

    def __call__(self, x):
        return self.predictor(self.encoder(x))


def views_of(step, rows=32):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 10)) * np.arange(1, 11)
    return (x + 4 * rng.normal(size=(2, *x.shape))).astype("float32")


def cosine(p, t):
    t = jax.lax.stop_gradient(t)
    return jnp.mean(optax.losses.cosine_similarity(p, t, epsilon=1e-6))


@nnx.jit
def learned_step(model, target, optimizer, views):
    def loss_fn(model):
        (p1, p2), (t1, t2) = map(model, views), map(target, views)
        return -cosine(p1, t2) - cosine(p2, t1)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def train_step(model, target, optimizer, views):
    loss = learned_step(model, target, optimizer, views)
    model.predictor.close()  # the line that DirectPred adds
    return loss


def built(seed=0):
    model, target = BYOL(nnx.Rngs(seed)), BYOL(nnx.Rngs(seed + 1)).encoder
    return model, target, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


def exact_weight(steps, rho=RHO):
    return oracle.weight(steps, rho, lambda s: oracle.eq18(s, 0.1))


def assert_near(got, exact, bound=1e-5):
    assert np.linalg.norm(got - exact, 2) <= bound * np.linalg.norm(exact, 2)


def arrays(*objects):
    """Path to array, of all variables."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(objects))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_training():
    model, target, optimizer = built()
    head = flax.replace_predictor(model, optimizer, rho=RHO)
    assert model.predictor is head
    steps, losses, weight = [], [], np.eye(DIM)
    for step in range(30):
        views = views_of(step)
        z = [np.asarray(model.encoder(view)) for view in views]
        if step % 10 == 1:
            model.eval()
            np.testing.assert_allclose(model(views[0]), z[0] @ weight, rtol=1e-4, atol=1e-5)
            model.train()
        losses.append(float(train_step(model, target, optimizer, views)))
        steps.append(z)
        weight = np.asarray(head.weight[...])
        if step % 10 < 2:
            assert_near(weight, exact_weight(steps))
    assert int(head.step_count[...]) == 30
    assert int(head.gathered_rows[...]) == 0
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert dp.metrics.effective_rank(head.correlation[...]) > 1.5  # and not by collapse
    assert not any("predictor" in name for name in arrays(nnx.state(model, nnx.Param), optimizer))


def test_a_built_optimizer_goes_on_and_gets_its_state_back():
    model, target, optimizer = built()
    for step in range(3):
        learned_step(model, target, optimizer, views_of(step))
    before, learned = arrays(model, optimizer), model.predictor
    flax.replace_predictor(model, optimizer)
    after = arrays(model, optimizer)
    gone = before.keys() - after.keys()
    assert {name for name in gone if "opt_state" in name}
    assert all("predictor" in name for name in gone)
    same(
        {k: before[k] for k in before.keys() & after.keys()},
        {k: after[k] for k in before.keys() & after.keys()},
    )
    train_step(model, target, optimizer, views_of(3))
    assert int(optimizer.step[...]) == 4
    trained = arrays(nnx.state(model, nnx.Param), optimizer)
    model.eval()
    assert flax.restore(model) is model.predictor is learned
    assert learned.norm.use_running_average
    model.train()
    restored = arrays(model, optimizer)
    same({k: before[k] for k in gone}, {k: restored[k] for k in gone})
    now = arrays(nnx.state(model, nnx.Param), optimizer)
    same(trained, {k: now[k] for k in trained})
    assert restored.keys() == before.keys()
    learned_step(model, target, optimizer, views_of(4))
    assert int(optimizer.step[...]) == 5


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.1, 0, 9))),
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
        optax.masked(optax.adam(0.1), lambda params: jax.tree.map(lambda _: True, params)),
    ],
    ids=["sgd", "chain", "multi-steps", "masked"],
)
def test_any_optax_state_is_pruned(tx):
    model, target, _ = built()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    learned_step(model, target, optimizer, views_of(0))
    flax.replace_predictor(model, optimizer)
    fresh = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert arrays(optimizer).keys() == arrays(fresh).keys()
    train_step(model, target, optimizer, views_of(1))


def test_modes():
    model, _, _ = built()
    model.eval()
    head = flax.replace_predictor(model)
    assert head.use_running_average
    z = jnp.ones((4, DIM))
    head(z)
    assert int(head.gathered_rows[...]) == 0
    model.train()
    head(z)
    head(z[:2])
    assert int(head.gathered_rows[...]) == 6


def test_the_mode_is_the_models_where_the_predictor_has_none():
    for mode in (True, False):
        norm = nnx.BatchNorm(DIM, use_running_average=mode, rngs=nnx.Rngs(0))
        model = nnx.Dict(norm=norm, predictor=nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)))
        assert flax.replace_predictor(model).use_running_average is mode
    bare = nnx.Dict(predictor=nnx.Linear(DIM, DIM, rngs=nnx.Rngs(0)))
    assert flax.replace_predictor(bare).use_running_average is False


def test_a_step_without_rows_changes_nothing_and_nan_is_skipped():
    head = DirectPredHead(DIM)
    head(jnp.asarray(views_of(0)[0, :, :DIM]))
    head.close()
    before = arrays(head)
    head.close()
    same(arrays(head), before)
    weight = np.asarray(head.weight[...])
    head(jnp.full((2, DIM), jnp.nan))
    head.close()
    assert (int(head.step_count[...]), int(head.skipped[...])) == (1, 1)
    np.testing.assert_array_equal(head.weight[...], weight)


def test_the_gradient_flows_through_z_alone():
    head, (z, g) = DirectPredHead(DIM), views_of(0)[:, :, :DIM]
    head(z)
    head.close()
    by_z = nnx.grad(lambda head, z: jnp.sum(g * head(z)), argnums=1)(head, jnp.asarray(z))
    np.testing.assert_allclose(by_z, g @ head.weight[...].T, rtol=1e-4, atol=1e-4)


def test_mapped_axes_share_the_weight():
    graph, state = nnx.split(DirectPredHead(DIM, rho=RHO))

    @partial(jax.vmap, in_axes=(None, 0), axis_name="i")
    def close(state, z):
        head = nnx.merge(graph, state)
        head(z)
        head.close("i")
        return head.weight[...]

    z = views_of(0)[:, :, :DIM]
    for weight in close(state, z):
        assert_near(weight, exact_weight([z]))


def test_the_state_is_that_of_directpred_jax():
    head = DirectPredHead(DIM, rho=RHO)
    z = views_of(0)[0, :, :DIM]
    head(z)
    head.close()
    predictor = dp.DirectPred(DIM)
    predictor.load_state_dict(dpj.state_dict(head.state))
    np.testing.assert_array_equal(predictor.weight, head.weight[...])
    assert head.state.options.rho == RHO


def through_orbax(saved, template, folder):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", nnx.to_pure_dict(nnx.state(saved)))
        checkpointer.wait_until_finished()
        state = nnx.state(template)
        pure = checkpointer.restore(folder / "state", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(template, state)


def through_spj(saved, template, folder):
    spj = pytest.importorskip("stable_pretraining.jax")
    names = ("model", "target", "optimizer")
    spj.checkpoint.save(folder / "run.msgpack", **dict(zip(names, saved, strict=True)))
    spj.checkpoint.load(folder / "run.msgpack", **dict(zip(names, template, strict=True)))


def through_copy(saved, template, folder):
    for into, out_of in zip(template, copy.deepcopy(saved), strict=True):
        nnx.update(into, nnx.state(out_of))


@pytest.mark.parametrize("through", [through_orbax, through_spj, through_copy])
def test_a_saved_run_goes_on_identically(tmp_path, through):
    def replaced(seed):
        parts = built(seed)
        flax.replace_predictor(parts[0], parts[2], freq=2)
        return parts

    running, resumed = replaced(0), replaced(5)
    for step in range(5):
        if step == 2:
            through(running, resumed, tmp_path)
        if step >= 2:
            train_step(*resumed, views_of(step))
        train_step(*running, views_of(step))
    same(arrays(*resumed), arrays(*running))
    assert int(resumed[0].predictor.step_count[...]) == 5


class Two(nnx.Module):
    def __init__(self, rngs):
        self.online, self.target = BYOL(rngs), BYOL(rngs)
        self.other = nnx.Linear(2, 2, rngs=rngs)


class Noisy(Predictor):
    def __call__(self, z, noise):
        return super().__call__(z + noise)


def with_predictor(predictor):
    model = BYOL(nnx.Rngs(0))
    model.predictor = predictor
    return model


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (BYOL, "head", r"one submodule 'head' in BYOL .* found 0; looked at encoder, predictor: "),
        (Two, "predictor", r"found 2; looked at online.predictor, target.predictor: pass name="),
        (partial(BYOL, predicted=4), "predictor", r"not square: .*\(2, 6\) to \(2, 4\)"),
        (lambda r: with_predictor(nnx.Sequential(jax.nn.relu)), "predictor", "no nnx.Linear"),
        (lambda r: with_predictor(Noisy(r)), "predictor", "with features alone: .*noise"),
        (lambda r: with_predictor(DirectPredHead(3)), "predictor", "a DirectPredHead already"),
    ],
)
def test_a_predictor_that_cannot_be_replaced_is_named(model, name, message):
    model = model(nnx.Rngs(0))
    before = arrays(model)
    with pytest.raises(ValueError, match=message):
        flax.replace_predictor(model, name=name)
    same(arrays(model), before)


def test_a_path_names_one_of_two():
    model = Two(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    head = flax.replace_predictor(model, optimizer, name="online.predictor")
    assert model.online.predictor is head
    assert isinstance(model.target.predictor, Predictor)
    left = {name for name in arrays(optimizer) if "predictor" in name}
    assert left
    assert all("target" in name for name in left)


def test_wrong_arguments_change_nothing():
    model, _, optimizer = built()
    foreign = nnx.Optimizer(Two(nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    before = arrays(model, optimizer, foreign)
    with pytest.raises(
        ValueError, match=r"optimizer is not that of BYOL: .*encoder.*pass the model"
    ):
        flax.replace_predictor(model, foreign)
    with pytest.raises(ValueError, match="rho must be in"):
        flax.replace_predictor(model, optimizer, rho=1.0)
    with pytest.raises(TypeError, match=r"expected an nnx.Module, got dict"):
        flax.replace_predictor({})
    with pytest.raises(ValueError, match=r"expected one head that replaced .* in BYOL, found 0"):
        flax.restore(model)
    same(arrays(model, optimizer, foreign), before)
    assert isinstance(model.predictor, Predictor)


def test_what_was_replaced_is_freed_with_the_model():
    model, _, optimizer = built()
    learned = weakref.ref(model.predictor)
    flax.replace_predictor(model, optimizer)
    gc.collect()
    assert learned() is not None
    del model, optimizer
    gc.collect()
    assert learned() is None


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(10, 16, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.layer(x))


def stable_pretraining(method):
    """Its own module, trainer and callbacks; batches as its forward function takes them."""
    spj = pytest.importorskip("stable_pretraining.jax")

    class CloseStep(spj.Callback):  # as in the docstring of the adapter
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.predictor.close()

    class Record(spj.Callback):
        """What the projector gives for the batch that comes next, and the losses."""

        def __init__(self):
            self.steps, self.losses = [], []

        def record(self, module, batch):
            backbone, projector = (
                getattr(part, "student", part) for part in (module.backbone, module.projector)
            )
            self.steps.append(
                [np.asarray(projector(backbone(view["image"]))) for view in batch["views"]]
            )

        def on_train_epoch_start(self, trainer, module):
            self.record(module, batches[0])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.losses.append(float(outputs["loss"]))
            if batch_idx + 1 < len(batches):
                self.record(module, batches[batch_idx + 1])

    batches = [{"views": [{"image": v} for v in views_of(step)]} for step in range(6)]
    model = getattr(spj, method)(
        backbone=Encoder(nnx.Rngs(0)),
        embed_dim=16,
        rngs=nnx.Rngs(1),
        projector_dims=(16, DIM),
        optim={"type": "adamw", "learning_rate": 1e-2},
    )
    record = Record()

    def fit(epochs, resume_from=None, save=None):
        callbacks = [spj.TeacherStudentCallback(), CloseStep(), record]
        if save:
            callbacks.append(spj.checkpoint.Checkpoint(save))
        trainer = spj.Trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(model, batches, resume_from=resume_from)
        return trainer

    return model, record, fit


@pytest.mark.parametrize("method", ["BYOL", "SimSiam"])
def test_stable_pretraining(method):
    model, record, fit = stable_pretraining(method)
    head = flax.replace_predictor(model, rho=RHO)
    trainer = fit(4)
    assert len(record.steps) == int(head.step_count[...]) == 24
    assert_near(head.weight[...], exact_weight(record.steps))
    for first, later in zip(record.steps[0], record.steps[18], strict=True):  # of the same batch
        assert np.linalg.norm(later - first) > 0.1 * np.linalg.norm(first)  # it has trained
    assert not any("predictor" in name for name in arrays(trainer.optimizer))
    assert flax.restore(head) is model.predictor


def test_stable_pretraining_resumes_identically(tmp_path):
    def replaced():
        model, _, fit = stable_pretraining("BYOL")
        flax.replace_predictor(model)
        return model, fit

    (whole, fit_whole), (_, fit_first), (second, fit_second) = (replaced() for _ in range(3))
    path = str(tmp_path / "run.msgpack")
    fit_first(1, save=path)
    fit_second(1, resume_from=path)
    fit_whole(1, save=path)
    fit_whole(1, resume_from=path)
    same(arrays(second), arrays(whole))
    assert int(second.predictor.step_count[...]) == 12
