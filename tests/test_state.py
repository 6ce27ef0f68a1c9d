"""Saved states: through files, between libraries and dtypes, from older versions."""

import numpy as np
import pytest

import directpred as dp
from backends import BACKENDS
from directpred import state as core
from directpred.correlation import UNIT, Moments
from directpred.state import to_numpy

DIM = 5


def npz(state, path):
    np.savez(path / "state.npz", **state)
    with np.load(path / "state.npz", allow_pickle=False) as saved:
        return dict(saved)


def safetensors(state, path):
    file = pytest.importorskip("safetensors.numpy")
    file.save_file({k: to_numpy(v) for k, v in state.items()}, path / "state.safetensors")
    return file.load_file(path / "state.safetensors")


def batches(rng, backend, dtype, steps=6):
    """Three views a step; at the scale of 1e18 their sum is beyond float32."""
    return [[backend.array(1e18 * z, dtype) for z in rng.normal(size=(3, 200, DIM))]] * steps


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        x, y = to_numpy(a[name]), to_numpy(b[name])
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("through", [npz, safetensors])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("open_step", [False, True])
def test_a_predictor_goes_on_bit_for_bit_after_a_file(
    backend, rng, tmp_path, through, dtype, open_step
):
    options = {"rho": 0.9, "freq": 2, "center": True, "nonfinite": "skip"}
    whole, stopped = (dp.DirectPred(DIM, **options) for _ in range(2))
    for step, views in enumerate(batches(rng, backend, dtype)):
        if step == 3:
            if open_step:
                stopped.accumulate(*views[:2])
                views_left = views[2:]
            entries = through(stopped.state_dict(), tmp_path)
            same(entries, stopped.state_dict())
            stopped = dp.DirectPred(DIM, **options)
            stopped.load_state_dict(entries)
            if open_step:
                whole.accumulate(*views[:2])
                whole.update(*views_left)
                stopped.update(*views_left)
                continue
        whole.update(*views)
        stopped.update(*views)
    same(stopped.state_dict(), whole.state_dict())
    assert whole.step_count == 6


def test_every_entry_is_an_array(backend, rng):
    """As npz and safetensors want it; the counts are of NumPy."""
    predictor = dp.DirectPred(DIM)
    predictor.update(*batches(rng, backend, "float32")[0])
    predictor.accumulate(*batches(rng, backend, "float32")[0])
    for name, x in predictor.state_dict().items():
        assert hasattr(x, "dtype"), name
    assert predictor.state_dict()["accumulated_rows"] == 600


@pytest.mark.parametrize("to", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_state_loads_into_another_dtype_and_library(backend, rng, dtype, to):
    numpy = BACKENDS["numpy"]
    original, other = dp.DirectPred(DIM), dp.DirectPred(DIM)
    z = rng.normal(size=(4, 30, DIM))
    original.update(numpy.array(z[0], dtype))
    original.accumulate(numpy.array(z[1], dtype))
    other.update(backend.array(z[2], to))
    other.load_state_dict(original.state_dict())
    for x in (other.weight, other.correlation, other.mean):
        assert x.dtype == backend.array([0.0], to).dtype
    original.update(numpy.array(z[3], dtype))
    other.update(backend.array(z[3], to))
    rtol = 1e-10 if dtype == to == "float64" else 3e-6
    for name in ("weight", "correlation", "mean"):
        expected = getattr(original, name)
        np.testing.assert_allclose(
            to_numpy(getattr(other, name)), expected, atol=rtol * np.abs(expected).max()
        )


def wide_state(rng, open_step=False):
    """Finite in float64, and beyond float32."""
    wide, z = dp.DirectPred(DIM), rng.normal(size=(30, DIM))
    wide.update(z if open_step else 1e30 * z)
    if open_step:
        wide.accumulate(1e30 * z)
    return wide.state_dict()


TOO_WIDE = r"(correlation|outer) must fit .*float32, got up to \d.*e\+"


@pytest.mark.parametrize("open_step", [False, True])
def test_a_state_that_does_not_fit_the_dtype_in_use_is_named(backend, rng, open_step):
    narrow = dp.DirectPred(DIM)
    narrow.update(backend.array(rng.normal(size=(30, DIM)), "float32"))
    before = narrow.state_dict()
    with pytest.raises(ValueError, match=TOO_WIDE):
        narrow.load_state_dict(wide_state(rng, open_step))
    same(before, narrow.state_dict())


@pytest.mark.parametrize("open_step", [False, True])
def test_a_head_does_not_take_a_state_beyond_its_dtype(rng, open_step):
    torch = pytest.importorskip("torch")
    head = pytest.importorskip("directpred.torch").DirectPredHead(DIM)
    head.gather(torch.randn(9, DIM))
    before = {name: x.clone() for name, x in head.state_dict().items()}
    entries = {name: torch.as_tensor(x) for name, x in wide_state(rng, open_step).items()}
    with pytest.raises(RuntimeError, match=f"DirectPredHead: {TOO_WIDE}"):
        head.load_state_dict(entries)
    same(before, head.state_dict())
    head.double().load_state_dict(entries)
    same(entries, {name: x for name, x in head.state_dict().items() if name in entries})


def test_jax_does_not_take_a_state_beyond_its_dtype(rng):
    """Nor does an eager predictor that waits for its first array, which has no float64 there."""
    jnp = pytest.importorskip("jax.numpy")
    dpj = pytest.importorskip("directpred.jax")
    entries = wide_state(rng)
    with pytest.raises(ValueError, match=TOO_WIDE):
        dpj.load_state_dict(dpj.init(DIM), entries)
    waiting = dp.DirectPred(DIM)
    waiting.load_state_dict(entries)
    for call in (waiting, waiting.update, waiting.accumulate):
        with pytest.raises(ValueError, match=TOO_WIDE):
            call(jnp.ones((2, DIM)))
    same(entries, waiting.state_dict())


@pytest.mark.parametrize("numbers", [int, np.asarray])
def test_a_state_of_version_1_still_loads(backend, rng, numbers):
    """As release 0.1 wrote it: Σ z zᵀ is a plain sum, and the counts are Python's."""
    z = rng.normal(size=(3, 20, DIM))
    entries = {
        "version": numbers(1),
        "correlation": z[0].T @ z[0] / 20,
        "mean": z[0].mean(axis=0),
        "weight": np.eye(DIM),
        "step_count": numbers(1),
        "skipped": numbers(0),
        "accumulated_outer": z[1].T @ z[1],
        "accumulated_total": z[1].sum(axis=0),
        "accumulated_rows": numbers(20),
    }
    old, new = dp.DirectPred(DIM), dp.DirectPred(DIM)
    old.load_state_dict(entries)
    new.update(backend.array(z[0]))
    new.accumulate(backend.array(z[1]))
    expected = to_numpy(new.update(backend.array(z[2])))
    np.testing.assert_allclose(to_numpy(old.update(backend.array(z[2]))), expected, rtol=1e-9)
    assert old.step_count == 2
    closed = {k: v for k, v in entries.items() if "accumulated" not in k}
    old.load_state_dict(closed)
    np.testing.assert_array_equal(old.weight, np.eye(DIM))


def test_the_unit_of_the_sums_is_that_of_version_2(rng):
    entries = {k: v for k, v in dp.DirectPred(DIM).state_dict().items() if k != "closings"} | {
        "accumulated_outer": np.eye(DIM),
        "accumulated_total": np.zeros(DIM),
        "accumulated_rows": 3,
    }
    for version, unit in ((1, UNIT), (2, 1.0)):
        _, accumulated = core.from_dict(entries | {"version": version}, DIM)
        assert isinstance(accumulated, Moments)
        np.testing.assert_array_equal(accumulated.outer, unit * np.eye(DIM))


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_from_before_version_3_has_closed_what_it_counts(version):
    entries = {k: v for k, v in dp.DirectPred(DIM).state_dict().items() if k != "closings"}
    entries |= {"version": version, "step_count": 7, "skipped": 2}
    predictor = dp.DirectPred(DIM)
    predictor.load_state_dict(entries)
    assert predictor.state_dict()["closings"] == 9
    with pytest.raises(ValueError, match=r"missing \['closings'\]"):
        predictor.load_state_dict(entries | {"version": 3})


def test_a_loaded_open_step_that_is_closed_binds_to_no_library(backend, rng):
    z = backend.array(rng.normal(size=(30, DIM)))
    original, restored = dp.DirectPred(DIM), dp.DirectPred(DIM)
    original.accumulate(z)
    restored.load_state_dict(original.state_dict())
    restored.step()
    original.step()
    expected = to_numpy(original.update(z))
    np.testing.assert_allclose(to_numpy(restored.update(z)), expected, rtol=1e-9, atol=1e-12)
