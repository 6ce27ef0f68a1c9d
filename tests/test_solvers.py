import numpy as np
import pytest
from test_spectrum import RULES

import directpred as dp
from directpred.solvers import SOLVERS


def random_basis(rng, dim):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def spectra(rng, dim):
    return {
        "random": rng.uniform(0.1, 1, dim),
        "power law": np.arange(1, dim + 1.0) ** -1,
        "rank-deficient": np.where(np.arange(dim) < dim // 4 + 1, rng.uniform(0.1, 1, dim), 0),
        "repeated": np.where(np.arange(dim) < dim // 2, 1.0, 0.25),
        "identity": np.ones(dim),
        "rank one": np.eye(dim)[0],
        "tiny": 1e-12 * rng.uniform(0.1, 1, dim),
        "large": 1e6 * rng.uniform(0.1, 1, dim),
    }


@pytest.mark.parametrize("dim", [1, 2, 64, 256])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("rule", "expected"), RULES[:2] + RULES[5:8], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_weight_equals_the_oracle(backend, solver, dim, dtype, bound, rule, expected, rng):
    for name, s in spectra(rng, dim).items():
        u = random_basis(rng, dim)
        correlation = (u * s) @ u.T
        exact = (u * expected(s)) @ u.T
        weight = SOLVERS[solver](backend.array(correlation, dtype), rule)
        assert weight.dtype == backend.array([0.0], dtype).dtype
        weight = backend.to_numpy(weight)
        error = np.linalg.norm(weight - exact, 2) / np.linalg.norm(exact, 2)
        assert error <= bound, (name, error)
        np.testing.assert_array_equal(weight, weight.T)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_correlation_of_zero_gives_a_finite_weight(backend, solver, rule):
    weight = SOLVERS[solver](backend.array(np.zeros((5, 5)), "float32"), rule)
    assert np.isfinite(backend.to_numpy(weight)).all()


def test_rules_see_ascending_eigenvalues_without_noise(backend, rng):
    seen = []

    def rule(s):
        seen.append(backend.to_numpy(s))
        return s

    z = rng.normal(size=(3, 16)).astype(np.float32)
    SOLVERS["eigh"](backend.array(z.T @ z, "float32"), rule)
    (s,) = seen
    assert (np.diff(s) >= 0).all()
    assert (s[:13] == 0).all()
    assert (s[13:] > 0).all()


@pytest.mark.parametrize("rule", [lambda s: s[:2], lambda s: 1.0, lambda s: None])
def test_a_rule_of_another_shape_is_named(backend, rule):
    with pytest.raises(ValueError, match=r"must return an array of shape \(3,\), got"):
        SOLVERS["eigh"](backend.array(np.eye(3)), rule)


def test_scale_of_the_features_matters_to_eq18_and_not_to_directset():
    s = np.array([0.5, 1.0])
    for rule, invariant in [(dp.Eq18(), False), (dp.DirectSet(), True)]:
        shape = [rule(c * s) / rule(c * s)[-1] for c in (1, 100)]
        assert np.allclose(*shape) is invariant
