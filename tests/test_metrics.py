import math
import warnings

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


def diagnosed(z):
    """The oracle of `diagnose`: float64, and Python's numbers wherever these could overflow."""
    z = np.asarray(z, dtype=np.float64).reshape(-1, np.shape(z)[-1])
    peak = np.abs(z).max() or 1.0
    z = z / peak
    norms = np.array([math.sqrt(math.fsum(x * x for x in row)) for row in z])
    unit = z / np.where(norms > 0, norms, 1)[:, None]
    share = np.linalg.svd(z, compute_uv=False) ** 2
    share = share / (share.sum() or 1.0)
    filled = share[share > 1e-14]
    return {
        "spread": math.sqrt(z.shape[1]) * np.mean([np.std(column) for column in unit.T]),
        "effective_rank": math.exp(-np.sum(filled * np.log(filled))) if len(filled) else 0.0,
        "leading_share": share.max(),
        "norm": norms.mean() * peak,
    }


@pytest.mark.parametrize("shape", [(200, 6), (5, 40), (3, 7, 6), (1, 6), (30, 1), (6,)])
def test_diagnose_is_its_oracle(backend, rng, shape):
    z = rng.normal(size=shape) * np.arange(1, shape[-1] + 1) + 0.5
    got = metrics.diagnose(backend.array(z))
    assert {type(value) for value in got.values()} == {float}
    assert got == pytest.approx(diagnosed(z), rel=1e-8, abs=1e-7)


@pytest.mark.parametrize("scale", [1.4e-46, 1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e37])
def test_diagnose_does_not_depend_on_the_scale_of_float32(backend, rng, scale):
    z = rng.normal(size=(64, 8)) * np.arange(1, 9) + 2
    z = (z / np.abs(z).max() * 10 * scale).astype("float32")
    flushed = scale < 1e-37 and backend.module == "jax.numpy"  # XLA has no denormal numbers
    if flushed:
        z = np.where(np.abs(z) < np.finfo("float32").tiny, 0, z)
    got = metrics.diagnose(backend.array(z, "float32"))
    assert all(math.isfinite(value) for value in got.values())
    assert got == pytest.approx(diagnosed(z), rel=1e-4, abs=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e307])
def test_diagnose_does_not_depend_on_the_scale_of_float64(backend, rng, scale):
    z = rng.normal(size=(64, 8)) * scale
    got = metrics.diagnose(backend.array(z))
    assert got == pytest.approx(diagnosed(z), rel=1e-8, abs=0)


def test_diagnose_of_zeros_and_of_rows_alike(backend):
    zero = metrics.diagnose(backend.array(np.zeros((5, 4))))
    assert zero == {"spread": 0, "effective_rank": 0, "leading_share": 0, "norm": 0}
    alike = metrics.diagnose(backend.array(np.tile([3.0, 4.0], (9, 1))))
    assert alike == pytest.approx(
        {"spread": 0, "effective_rank": 1, "leading_share": 1, "norm": 5}, abs=1e-7
    )


def test_spread_is_blind_to_a_line_and_the_effective_rank_is_not(backend, rng):
    """Behind a last batch normalisation: all features are one, up to a sign."""
    line = rng.choice([-1.0, 1.0], size=(256, 1)) * (1 + 0.02 * rng.normal(size=(256, 16)))
    got = metrics.diagnose(backend.array(line))
    assert got["spread"] > 0.95
    assert got["effective_rank"] < 1.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_diagnose_of_half_precision(rng, dtype):
    torch = pytest.importorskip("torch")
    z = torch.from_numpy(300 * rng.normal(size=(64, 8))).to(getattr(torch, dtype))
    z.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numbers made of tensors that require a gradient
        got = metrics.diagnose(z)
    assert got == pytest.approx(diagnosed(z.detach().double()), rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_diagnose_of_what_is_not_finite_is_an_error(backend, value):
    z = np.ones((4, 3))
    z[1, 2] = value
    with pytest.raises(ValueError, match="outputs must be finite, got NaN or infinity in 1 places"):
        metrics.diagnose(backend.array(z))


def test_what_cannot_be_diagnosed_is_an_error(backend):
    with pytest.raises(TypeError, match="real floating"):
        metrics.diagnose(backend.asarray(backend.library, np.ones((4, 3), dtype="int32")))
    with pytest.raises(TypeError, match="must be an array, got list"):
        metrics.diagnose([[1.0]])
    for shape in [(0, 3), (3, 0), ()]:
        with pytest.raises(ValueError, match="must hold numbers"):
            metrics.diagnose(backend.array(np.zeros(shape)))


def test_diagnostics_of_a_predictor_are_those_of_its_features(backend, rng):
    z = rng.normal(size=(500, 6)) * np.arange(1, 7)
    z = 7 * z / np.linalg.norm(z, axis=1, keepdims=True)  # of one norm, where the spreads agree
    predictor = dp.DirectPred(6)
    predictor.update(backend.array(z))
    got = predictor.diagnostics()
    assert {type(value) for value in got.values()} == {float}
    s = np.linalg.eigvalsh(z.T @ z / 500)
    condition = 1.1 / (math.sqrt(s[0] / s[-1]) + 0.1)
    expected = diagnosed(z) | {"condition": condition, "alignment": 1.0}
    assert got == pytest.approx(expected, rel=1e-6)


def test_diagnostics_before_the_first_step(backend):
    predictor = dp.DirectPred(5)
    assert predictor.diagnostics() == {
        "spread": 0,
        "effective_rank": 0,
        "leading_share": 0,
        "condition": 1,
        "norm": 0,
        "alignment": 0,
    }


def test_condition_and_alignment_of_a_weight_that_is_not_symmetric(backend, rng):
    weight, u = rng.normal(size=(4, 4)), basis(rng, 4)
    correlation = (u * [0, 1e-17, 2, 5]) @ u.T
    mapped = weight.T @ u[:, 2:]
    cosines = (u[:, 2:] * mapped).sum(0) / np.linalg.norm(mapped, axis=0)
    got = metrics.diagnostics(*map(backend.array, (weight, correlation, np.zeros(4))))
    assert got["condition"] == pytest.approx(np.linalg.cond(weight), rel=1e-8)
    assert got["alignment"] == pytest.approx(cosines.mean(), abs=1e-8)
    assert got["spread"] == pytest.approx(
        2 * np.mean(np.sqrt(np.diag(correlation))) / math.sqrt(7), rel=1e-8
    )


def test_condition_of_a_singular_weight_is_finite(backend):
    for dtype, eps in (("float32", 2.0**-23), ("float64", 2.0**-52)):
        args = np.diag([3.0, 0.0]), np.diag([1.0, 1.0]), np.zeros(2)
        got = metrics.diagnostics(*(backend.array(x, dtype) for x in args))
        assert got["condition"] == 1 / eps
        args = np.zeros((2, 2)), np.diag([1.0, 1.0]), np.zeros(2)
        got = metrics.diagnostics(*(backend.array(x, dtype) for x in args))
        assert got["condition"] == got["alignment"] == 0


@pytest.mark.parametrize("scale", [1e-17, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize("dim", [1, 8])
def test_diagnostics_do_not_depend_on_the_scale(backend, rng, scale, dim):
    z = rng.normal(size=(64, dim)) + 2
    correlation, mean = z.T @ z / 64, z.mean(0)
    s, u = np.linalg.eigh(correlation)
    weight = (u * np.sqrt(s)) @ u.T
    arrays = weight * scale, correlation * scale**2, mean * scale
    got = metrics.diagnostics(*(backend.array(x, "float32") for x in arrays))
    expected = {
        "spread": math.sqrt(dim) * z.std(0).mean() / math.sqrt(np.trace(correlation)),
        "effective_rank": diagnosed(z)["effective_rank"],
        "leading_share": s[-1] / s.sum(),
        "condition": math.sqrt(s[-1] / s[0]),
        "norm": scale * math.sqrt(np.trace(correlation)),
        "alignment": 1.0,
    }
    assert got == pytest.approx(expected, rel=1e-3)


def test_diagnostics_of_what_is_not_finite_name_it(backend):
    arrays = [np.eye(2), np.eye(2), np.zeros(2)]
    for index, name in enumerate(["weight", "correlation", "mean"]):
        broken = [x.copy() for x in arrays]
        broken[index][..., 0] = np.nan
        with pytest.raises(ValueError, match=f"the {name} must be finite"):
            metrics.diagnostics(*map(backend.array, broken))


def test_diagnostics_of_a_head_whose_weight_is_trained(rng):
    torch = pytest.importorskip("torch")
    from directpred.torch import DirectPredHead

    head = DirectPredHead(6, between="train")
    head(torch.from_numpy(rng.normal(size=(64, 6))).float().requires_grad_()).sum().backward()
    head.step()
    with torch.no_grad():
        head.weight[0, 1] += 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics.diagnostics(head.weight, head.correlation, head.mean)
    weight, correlation = head.weight.detach(), head.correlation
    assert got["condition"] == pytest.approx(float(torch.linalg.cond(weight)), rel=1e-4)
    cosines = metrics.alignment(weight, correlation)
    assert got["alignment"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert got["alignment"] < 0.999
