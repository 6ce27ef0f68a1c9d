"""Runs google-deepmind/deepmind-research's byol, from the checkout that the variable points at.

The folder must contain ``byol``. On two devices, in a process of its own, since JAX counts its
devices once.
"""

import os
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import oracle

jax = pytest.importorskip("jax")
pytest.importorskip("haiku")
import jax.numpy as jnp  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from directpred.adapters import deepmind_byol  # noqa: E402

VARIABLE = "DIRECTPRED_DEEPMIND_BYOL"
DIM, DEVICES, ROWS, RHO = 8, 2, 8, 0.5
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def sources():
    """Import the experiment, with stand-ins for what it needs and is not tested here."""
    acme, tree = types.ModuleType("acme.jax.utils"), types.ModuleType("tree")
    acme.prefetch = iter
    # dm-tree: the one function of it that the optimizer calls.
    tree.map_structure_with_path = lambda f, params: jax.tree_util.tree_map_with_path(
        lambda path, x: f(tuple(key.key for key in path), x), params
    )
    # The input pipeline (tensorflow, acme) is not run: `load` stands for it.
    missing = ("tensorflow", "tensorflow.compat", "tensorflow.compat.v2", "tensorflow_datasets")
    stand_ins = dict.fromkeys(missing, mock.MagicMock())
    stand_ins |= {"acme": mock.MagicMock(), "acme.jax": mock.MagicMock(utils=acme), "tree": tree}
    # Names in the JAX of 2020, the year of the source.
    jax.tree_map = jax.tree.map
    jax.host_id, jax.host_count = jax.process_index, jax.process_count
    jax.device_put_sharded = lambda shards, devices: jnp.stack(shards)
    sys.path.insert(0, os.environ[VARIABLE])
    sys.modules |= stand_ins
    from byol import byol_experiment
    from byol.configs import byol as config
    from byol.utils import augmentations, dataset

    dataset.load = load
    for name in missing:  # other packages look for it to use it
        del sys.modules[name]
    return byol_experiment.ByolExperiment, config, augmentations


def load(split, *, preprocess_mode, batch_dims, **kwargs):
    """In place of ImageNet: noisy digits in colour, always the same sequence of batches."""
    digits, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    for _ in range(2 if preprocess_mode.name == "EVAL" else 1000):
        chosen = rng.integers(len(digits), size=batch_dims)
        images = digits[chosen].reshape(*batch_dims, 8, 8, 1).repeat(2, -2).repeat(2, -3) / 16
        noisy = images + 0.1 * rng.normal(size=(2, *images.shape[:-1], 3))
        view1, view2 = np.clip(noisy, 0, 1).astype("float32")
        yield {"images": view1, "view1": view1, "view2": view2, "labels": labels[chosen]}


def experiment(folder):
    """As the source's own test of its training loop makes it small."""
    configured = config.get_config(num_epochs=40, batch_size=DEVICES * ROWS)
    configured["network_config"] |= {
        "encoder_class": "TinyResNet",
        "projector_hidden_size": 16,
        "projector_output_size": DIM,
        "predictor_hidden_size": 16,
    }
    configured["lr_schedule_config"] = {"base_learning_rate": 30.0, "warmup_steps": 4}
    configured["checkpointing_config"]["checkpoint_dir"] = str(folder)
    configured["evaluation_config"]["batch_size"] = ROWS
    return ByolExperiment(**configured | {"num_classes": 10, "base_target_ema": 0.9})


def arguments(step):
    """As its main loop calls a step."""
    rng = jax.random.split(jax.random.PRNGKey(step), num=DEVICES)
    return {"global_step": np.broadcast_to(step, [DEVICES]), "rng": rng}


def names(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def raises(error, message, f, *args, **kwargs):
    with pytest.raises(error, match=message):
        f(*args, **kwargs)


@check
def training(folder):
    running = experiment(folder)
    replaced = deepmind_byol.replace_predictor(running, rho=RHO)
    raises(ValueError, "no state yet", lambda: replaced.state)
    forward = jax.pmap(
        lambda state, rng, inputs: running.forward.apply(
            state.online_params,
            state.online_state,
            augmentations.postprocess(inputs, rng),
            is_training=True,
        )[0],
        axis_name="i",
    )
    inputs = load(None, preprocess_mode=mock.MagicMock(), batch_dims=[DEVICES, ROWS])
    running._initialize_train()
    next(inputs)  # the initialisation took one
    steps, losses, weight = [], [], np.eye(DIM)
    for step in range(40):
        if step < 5:
            out = forward(running._byol_state, arguments(step)["rng"], next(inputs))
            views = [np.asarray(out[f"projection_view{k}"]).reshape(-1, DIM) for k in (1, 2)]
            steps.append(views)
            for k, z in enumerate(views, start=1):
                p = np.asarray(out[f"prediction_view{k}"]).reshape(-1, DIM)
                np.testing.assert_allclose(p, z @ weight, rtol=1e-4, atol=1e-4)
        losses.append(running.step(**arguments(step))["repr_loss"])
        weight = replaced.state.weight
        if step < 5:
            exact = oracle.weight(steps, RHO, lambda s: oracle.eq18(s, 0.1))
            assert np.linalg.norm(weight - exact, 2) <= 1e-5 * np.linalg.norm(exact, 2)
    state = running._byol_state
    head = state.online_state["predictor"]["directpred"]
    np.testing.assert_array_equal(head.state.weight[0], head.state.weight[1])
    assert int(replaced.state.step_count) == 40
    assert not head.gathered.rows.any()
    assert not state.target_state["predictor"]["directpred"].gathered.rows.any()
    trained = (state.online_params, state.target_params, state.opt_state)
    assert not any("predictor" in name for name in names(trained))
    assert any("projector" in name for name in names(state.opt_state))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3, losses
    scalars = running.evaluate(global_step=np.zeros(DEVICES))
    assert 0 <= scalars["top1_accuracy"] <= 1
    raises(ValueError, "initialised with the head", deepmind_byol.restore, running)


@check
def checkpoint(folder):
    running = experiment(folder)
    replaced = deepmind_byol.replace_predictor(running, rho=RHO)
    for step in range(4):
        running.step(**arguments(step))
        if step == 1:
            running.save_checkpoint(step, jax.random.PRNGKey(0))
    resumed = experiment(folder)
    again = deepmind_byol.replace_predictor(resumed, rho=RHO)
    assert resumed.load_checkpoint()[0] == 1
    resumed._train_input = running._build_train_input()
    for _ in range(3):  # one for the initialisation, two for the steps before
        next(resumed._train_input)
    for step in range(2, 4):
        resumed.step(**arguments(step))
    assert int(again.state.step_count) == 4
    same(resumed._byol_state, running._byol_state)
    assert replaced.state.options == again.state.options


@check
def an_initialised_experiment_and_back(folder):
    running = experiment(folder)
    running._initialize_train()
    # As after some training: the momentum and the statistics are not those at the start.
    running._byol_state = jax.tree.map(lambda x: x + 1, running._byol_state)
    original, before = dict(vars(running)), running._byol_state
    replaced = deepmind_byol.replace_predictor(running, rho=RHO)
    after = running._byol_state
    removed = names(before) - names(after)
    assert removed
    assert all("predictor" in name for name in removed)
    assert not any("predictor/" in name for name in names(after))
    np.testing.assert_array_equal(replaced.state.weight, np.eye(DIM))
    running.step(**arguments(0))
    assert int(replaced.state.step_count) == 1
    projector = running._byol_state.online_params["projector/linear"]["w"]
    assert deepmind_byol.restore(running) is None
    assert names(running._byol_state) == names(before)
    for part in ("online_params", "target_params", "online_state", "target_state"):
        for key, entry in getattr(running._byol_state, part).items():
            if key.startswith("predictor"):
                same(entry, getattr(before, part)[key])
    np.testing.assert_array_equal(
        running._byol_state.online_params["projector/linear"]["w"], projector
    )
    for name in ("forward", "update_pmap", "eval_batch_jit"):
        assert getattr(running, name) is original[name]
    out, _ = jax.eval_shape(
        running.update_pmap, running._byol_state, **arguments(1), inputs=next(running._train_input)
    )
    assert names(out) == names(before)
    raises(ValueError, "is not replaced", deepmind_byol.restore, running)


@check
def errors(folder):
    running = experiment(folder)
    replace = deepmind_byol.replace_predictor
    raises(TypeError, "expected a ByolExperiment, got dict", replace, {})
    raises(TypeError, "leave optimizer out", replace, running, object())
    raises(ValueError, "rho must be in", replace, running, rho=1.0)
    assert "_directpred" not in vars(running)
    replace(running)
    raises(ValueError, "replaced already", replace, running)
    deepmind_byol.restore(running)
    replace(running)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} does not point at a checkout of google-deepmind's byol")
    # Compiling takes most of the time, and the checks compile much the same.
    flags = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    folder = tmp_path_factory.mktemp("deepmind_byol")
    return subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ
        | {
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": str(Path(oracle.__file__).parent),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_on_two_devices(outcomes, name):
    assert f"passed {name} in" in outcomes.stdout, outcomes.stdout + outcomes.stderr


if __name__ == "__main__":
    assert jax.local_device_count() == DEVICES
    ByolExperiment, config, augmentations = sources()
    for function in CHECKS:
        start = time.perf_counter()
        try:
            function(Path(sys.argv[1]) / function.__name__)
        except Exception:
            traceback.print_exc()
        else:
            print(f"passed {function.__name__} in {time.perf_counter() - start:.0f} s")
