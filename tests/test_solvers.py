import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spectrum import RULES, named

import directpred as dp
import oracle
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


@pytest.mark.parametrize("dim", [1, 2, 128])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("rule", "expected"), RULES[:3] + RULES[6:9], ids=named)
def test_eigh_equals_the_oracle(backend, dim, dtype, bound, rule, expected, rng):
    for name, s in spectra(rng, dim).items():
        u = random_basis(rng, dim)
        correlation = (u * s) @ u.T
        exact = (u * expected(s)) @ u.T
        check(backend, SOLVERS["eigh"], correlation, rule, exact, dtype, bound, name)


def check(backend, solve, correlation, rule, exact, dtype, bound, name):
    weight = solve(backend.array(correlation, dtype), rule)
    assert weight.dtype == backend.array([0.0], dtype).dtype
    weight = backend.to_numpy(weight)
    error = spectral_norm(weight - exact) / spectral_norm(exact)
    assert error <= bound, (name, error)
    np.testing.assert_array_equal(weight, weight.T)


def spectral_norm(symmetric):
    return np.abs(np.linalg.eigvalsh(symmetric)).max()


BY_MATMUL = [
    (dp.Eq18(), lambda s: oracle.eq18(s, 0.1)),
    (dp.Eq18(eps=0.0), lambda s: oracle.eq18(s, 0.0)),
    (dp.Eq18(normalize=False), lambda s: oracle.eq18(s, 0.1, normalize=False)),
    (dp.Eq18(0.0, normalize=False), lambda s: oracle.eq18(s, 0.0, normalize=False)),
    (dp.DirectSet(), lambda s: oracle.directset(s, 0.5, 0.1)),
    (dp.DirectSet(alpha=1, eps=0.2), lambda s: oracle.directset(s, 1, 0.2)),
    (dp.DirectCopy(), lambda s: oracle.directcopy(s, 0.3)),
    *(
        (dp.BoostScale(eps=eps), lambda s, eps=eps: oracle.boost_scale(s, eps, 0.5, False, 1e-4))
        for eps in (0.01, 0.0, -0.2, -0.3)
    ),
]


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 2e-7), ("float32", 1e-3)])
@pytest.mark.parametrize(("rule", "expected"), BY_MATMUL, ids=named)
def test_matmul_is_within_its_bound_for_any_spectrum(backend, dtype, bound, rule, expected, rng):
    for dim in (1, 2, 50):
        more = {
            "condition 1e12": np.logspace(-12, 0, dim),
            "one above a cluster": np.where(np.arange(dim) == 0, 1, 0.9985),
        }
        for name, s in (spectra(rng, dim) | more).items():
            u = random_basis(rng, dim)
            exact = (u * expected(s)) @ u.T
            correlation = (u * s) @ u.T
            check(backend, SOLVERS["matmul"], correlation, rule, exact, dtype, bound, name)


@pytest.mark.parametrize(("rule", "expected"), BY_MATMUL, ids=named)
@settings(max_examples=8)
@given(data=st.data())
def test_matmul_in_float32_for_drawn_spectra(rule, expected, data):
    dim = data.draw(st.integers(2, 1024), label="dim")
    rank = data.draw(st.integers(1, dim), label="rank")
    exponents = data.draw(st.lists(st.floats(-12, 0), min_size=1, max_size=20), label="exponents")
    s = np.zeros(dim)
    s[:rank] = np.resize(10.0 ** np.array([0.0, *exponents]), rank)
    u = random_basis(np.random.default_rng(dim), dim)
    exact = (u * expected(s)) @ u.T
    weight = SOLVERS["matmul"](((u * s) @ u.T).astype(np.float32), rule)
    assert spectral_norm(weight - exact) <= 1e-3 * spectral_norm(exact)


@pytest.mark.parametrize(("rule", "expected"), [BY_MATMUL[0], BY_MATMUL[8]], ids=named)
def test_matmul_in_float32_at_dim_1024(rule, expected, rng):
    u = random_basis(rng, 1024)
    drawn = spectra(rng, 1024)
    for name in ("rank-deficient", "repeated", "power law"):
        s = drawn[name]
        exact = (u * expected(s)) @ u.T
        weight = SOLVERS["matmul"](((u * s) @ u.T).astype(np.float32), rule)
        error = spectral_norm(weight - exact) / spectral_norm(exact)
        assert error <= 1e-3, (name, error)


@pytest.mark.parametrize(
    "rule",
    [
        dp.BoostScale(power=0.7),
        dp.BoostScale(eps=-0.4),
        dp.BoostScale(floor=1.5),
        dp.BoostScale(inside=True),
        dp.DirectSet(0.3),
        np.sqrt,
    ],
)
def test_matmul_refuses_rules_that_need_eigenvectors(rule):
    with pytest.raises(ValueError, match=r"'matmul' cannot take .*, which needs 'eigh'"):
        dp.DirectPred(4, rule=rule, solver="matmul")
    dp.DirectPred(4, rule=rule, solver="auto").update(np.eye(4))


@pytest.mark.parametrize(
    ("rule", "decomposes"),
    [(dp.DirectCopy(), False), (dp.DirectSet(1), False), (dp.Eq18(), True), (np.sqrt, True)],
    ids=str,
)
def test_auto_on_a_cpu_decomposes_only_for_a_root(monkeypatch, rule, decomposes, rng):
    calls = []
    monkeypatch.setattr(
        "numpy.linalg.eigh", lambda *a, eigh=np.linalg.eigh, **k: calls.append(1) or eigh(*a, **k)
    )
    for name in ("eig", "svd", "eigvalsh"):
        monkeypatch.setattr(f"numpy.linalg.{name}", None)
    dp.DirectPred(8, rule=rule).update(rng.normal(size=(20, 8)))
    assert bool(calls) is decomposes


@pytest.mark.parametrize("rule", [rule for rule, _ in BY_MATMUL], ids=str)
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


def test_scale_of_the_features_matters_to_the_printed_equation_alone():
    s = np.array([0.5, 1.0])
    for rule, invariant in [
        (dp.Eq18(), True),
        (dp.Eq18(normalize=False), False),
        (dp.DirectSet(), True),
        (dp.BoostScale(), True),
    ]:
        shape = [rule(c * s) / rule(c * s)[-1] for c in (1, 100)]
        assert np.allclose(*shape) is invariant


def test_float32_of_numpy_is_decomposed_in_float32_where_scipy_is_installed(monkeypatch, rng):
    linalg = pytest.importorskip("scipy.linalg")
    drivers = []
    decompose = linalg.eigh
    monkeypatch.setattr(
        linalg, "eigh", lambda *a, **k: drivers.append(k["driver"]) or decompose(*a, **k)
    )
    a = {}
    for dtype in ("float32", "float64"):
        z = rng.normal(size=(40, 288)).astype(dtype)
        a[dtype] = z.T @ z
        before = a[dtype].copy()
        SOLVERS["eigh"](a[dtype], dp.Eq18())
        np.testing.assert_array_equal(a[dtype], before)
    SOLVERS["eigh"](a["float32"][:200, :200], dp.Eq18())
    assert drivers == ["evd"]
    weight = SOLVERS["eigh"](a["float32"], dp.DirectSet())
    monkeypatch.setattr("directpred.array._scipy_linalg", lambda: None)
    without = SOLVERS["eigh"](a["float32"], dp.DirectSet())
    assert len(drivers) == 2
    assert weight.dtype == without.dtype == np.float32
    assert spectral_norm(weight - without) <= 1e-5 * spectral_norm(without)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("scipy", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_eigh_of_what_is_not_finite_comes_back(monkeypatch, rng, value, scipy):
    """LAPACK is not told to look for it; callers check the features and the weight."""
    if not scipy:
        monkeypatch.setattr("directpred.array._scipy_linalg", lambda: None)
    for at in ((0, 0), (2, 1), (287, 287), (287, 3), slice(None)):
        a = np.cov(rng.normal(size=(288, 600))).astype("float32")
        a[at] = value
        a[at if isinstance(at, slice) else at[::-1]] = value
        try:
            weight = SOLVERS["eigh"](a, dp.Eq18())
        except np.linalg.LinAlgError:
            continue
        assert weight.shape == a.shape
