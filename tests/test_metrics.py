import numpy as np
import pytest

import directpred as dp
from directpred import metrics


def basis(rng, dim):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def test_alignment_of_a_directpred_weight_is_one(backend, rng):
    predictor = dp.DirectPred(8)
    predictor.update(backend.array(rng.normal(size=(64, 8))))
    got = metrics.alignment(predictor.weight, predictor.correlation)
    np.testing.assert_allclose(backend.to_numpy(got), np.ones(8), atol=1e-12)


def test_alignment_is_the_cosine_of_each_eigenvector_and_its_image(backend, rng):
    u, s = basis(rng, 4), np.array([1.0, 2.0, 3.0, 4.0])
    turn = np.array([[0.0, 1.0, 0, 0], [-1.0, 0, 0, 0], [0, 0, -2.0, 0], [0, 0, 0.0, 0]])
    turn[3, 3], turn[2, 3] = 1.0, 1.0
    weight = u @ turn @ u.T
    got = metrics.alignment(backend.array(weight), backend.array((u * s) @ u.T))
    # Rows act: u_jᵀ W has the coordinates turn[j].
    expected = [0.0, 0.0, -2 / np.hypot(2, 1), 1.0]
    np.testing.assert_allclose(backend.to_numpy(got), expected, atol=1e-12)


def test_alignment_of_a_random_weight_is_small_and_of_zero_is_zero(backend, rng):
    z = rng.normal(size=(400, 64)) * np.arange(1, 65)
    correlation = backend.array(z.T @ z)
    random = metrics.alignment(backend.array(rng.normal(size=(64, 64))), correlation)
    assert np.abs(backend.to_numpy(random)).mean() < 0.3
    zero = metrics.alignment(backend.array(np.zeros((64, 64))), correlation)
    np.testing.assert_array_equal(backend.to_numpy(zero), np.zeros(64))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_counts_equal_eigenvalues(backend, rng, rank):
    u = basis(rng, 6)[:, :rank]
    got = metrics.effective_rank(backend.array(5.0 * u @ u.T))
    np.testing.assert_allclose(float(got), rank, rtol=1e-10)


def test_effective_rank_between_and_of_nothing(backend):
    half = metrics.effective_rank(backend.array(np.diag([3.0, 1.0])))
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    np.testing.assert_allclose(float(half), expected, rtol=1e-12)
    assert float(metrics.effective_rank(backend.array(np.zeros((3, 3))))) == 0


def test_spread_is_one_for_isotropic_and_zero_for_collapsed(backend, rng):
    isotropic = backend.array(rng.normal(size=(20000, 16)))
    np.testing.assert_allclose(float(metrics.spread(isotropic)), 1.0, atol=0.02)
    collapsed = np.abs(rng.normal(size=(100, 1))) * rng.normal(size=(1, 16))
    assert float(metrics.spread(backend.array(collapsed))) < 1e-6
    assert float(metrics.spread(backend.array(np.zeros((5, 16))))) == 0
    z = rng.normal(size=(30, 5))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    expected = np.mean(np.std(unit, axis=0)) * np.sqrt(5)
    np.testing.assert_allclose(float(metrics.spread(backend.array(z))), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_metrics_in_float32_do_not_depend_on_the_scale(backend, rng, scale):
    z, weight = rng.normal(size=(50, 6)) * np.arange(1, 7), rng.normal(size=(6, 6))
    correlation = z.T @ z / 500

    def all_three(scale):
        arrays = (
            backend.array(scale * x, "float32") for x in (z / 20, weight / 4, correlation / 4)
        )
        z_, weight_, correlation_ = arrays
        return [
            float(metrics.spread(z_)),
            float(metrics.effective_rank(correlation_)),
            *backend.to_numpy(metrics.alignment(weight_, correlation_)),
        ]

    np.testing.assert_allclose(all_three(scale), all_three(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_metrics_of_half_precision(rng, dtype):
    torch = pytest.importorskip("torch")
    z = torch.tensor(300 * rng.normal(size=(50, 6))).to(getattr(torch, dtype))
    c = z.double().T @ z.double() / 1e6
    narrow = c.to(z.dtype)
    assert float(metrics.spread(z)) == pytest.approx(float(metrics.spread(z.double())), rel=1e-5)
    wide = narrow.double()
    assert float(metrics.effective_rank(narrow)) == pytest.approx(
        float(metrics.effective_rank(wide)), rel=1e-4
    )
    np.testing.assert_allclose(metrics.alignment(narrow, narrow), np.ones(6), atol=1e-5)
