import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import directpred as dp
from backends import BACKENDS
from directpred import lanczos, solvers

HOST = ["numpy", "array-api-strict-2025.12", "array-api-strict-2023.12", "torch-cpu"]
on_the_host = pytest.mark.parametrize("backend", HOST, indirect=True)
dtypes = pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-4), ("float64", 1e-8)])
DIM = 300  # eigenvalues up to SMALL are computed


def rotated(rng, s):
    u = np.linalg.qr(rng.normal(size=(len(s), len(s))))[0]
    a = (u * s) @ u.T
    return (a + a.T) / 2


def correlation(z):
    return z.T @ z / len(z)


def hard(rng, dim):
    j = np.arange(1, dim + 1.0)
    spectra = {
        "1/j": 1 / j,
        "1/sqrt j": j**-0.5,
        "1/j²": j**-2,
        "geometric": np.geomspace(1, 1e-12, dim),
        "slow": np.geomspace(1, 1e-4, dim),
        "flat": np.ones(dim),
        "half rank": (j <= dim // 2) * 1.0,
        "rank 3": (j <= 3) * 1.0,
        "rank 1": (j <= 1) * 1.0,
        "one above a cluster": np.where(j == 1, 1, 0.9985),
        "flat, one below": np.where(j < dim, 1, 1e-6),
        "log-uniform": 10 ** rng.uniform(-8, 0, dim),
    }
    for low in (1e-3, 1e-5, 1e-7):
        spectra[f"two levels {low}"] = np.where(j <= dim // 2, 1, low)
        spectra[f"one above {low}"] = np.where(j == 1, 1, low)
    z = rng.normal(size=(2 * dim, dim))
    one = np.where(j == dim // 3, 5.0, 1.0)
    return {name: rotated(rng, s) for name, s in spectra.items()} | {
        "features": correlation(z @ rotated(rng, j**-0.5)),
        "white": correlation(z),
        "few rows": correlation(z[: dim // 4 + 1]),
        "far mean": correlation(np.maximum(z + 1, 0)),
        "rows that sum to 0": correlation((z - z.mean(1, keepdims=True)) * j**-0.5),
        "one large entry": np.diag(one),
        "no correlation": np.diag(1 / j[::-1]),
    }


def hidden(rng, s, top, dim=DIM):
    """A matrix with the eigenvalues s and, where Lanczos starts without a part of it, `top`."""
    half = dim // 2
    a = np.zeros((dim, dim))
    u = np.linalg.qr(rng.normal(size=(half, len(s))))[0]
    a[:half, :half] = (u * s) @ u.T
    start = lanczos._start(a)
    q = np.append(np.zeros(half), rng.choice([-1.0, 1.0], size=dim - half))
    start[:half] = 0
    q -= start * (start @ q) / (start @ start)
    q /= np.linalg.norm(q)
    return a + top * np.outer(q, q), q


def largest(a):
    """The oracle: NumPy's eigenvalues in float64."""
    return np.linalg.eigvalsh(np.asarray(a, dtype="float64"))[-1]


@pytest.fixture
def proofs(monkeypatch):
    """What the proofs of a test came to."""
    seen = []
    prove = lanczos.proven_ritz_value
    monkeypatch.setattr(lanczos, "proven_ritz_value", lambda *a: seen.append(prove(*a)) or seen[-1])
    return seen


@on_the_host
@dtypes
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_hard_matrices_are_proven_at_any_scale(backend, rng, proofs, dtype, bound, scale):
    for name, a in hard(rng, DIM).items():
        given = backend.array(scale * a, dtype)
        got = lanczos.largest_eigenvalue_on_host(given)
        assert (got.shape, got.dtype) == ((), given.dtype)
        assert abs(float(got) / largest(scale * a) - 1) <= 1.2 * bound, name
        assert proofs.pop() is not None, name


def test_few_large_eigenvalues_are_proven_without_a_factor(rng, monkeypatch):
    monkeypatch.setattr(lanczos, "_has_cholesky_factor", lambda a: False)
    matrices = hard(rng, DIM)
    for name in ("1/j", "1/j²", "rank 1", "features", "far mean", "rows that sum to 0"):
        a = matrices[name] / np.abs(matrices[name]).max()
        assert lanczos.proven_ritz_value(a, 5e-4) is not None, name


@on_the_host
@dtypes
def test_what_is_not_proven_in_time_is_computed(backend, rng, proofs, dtype, bound):
    a = rotated(rng, 1 + np.cos(np.linspace(0, np.pi, DIM)))  # the smallest gaps at the top
    got = lanczos.largest_eigenvalue_on_host(backend.array(a, dtype))
    assert abs(float(got) / largest(a) - 1) <= 1e-2 * bound
    assert proofs == [None]


@on_the_host
@dtypes
def test_a_hidden_eigenvector_is_found_or_not_proven(backend, rng, dtype, bound):
    """Seen by rounding alone; without the second orthogonalisation some are proven wrongly."""
    spectra = ([1], [1, 0.5], [1, 0.1], [1, 1e-7], [1, 1, 1], 1 / np.arange(1, 60.0))
    for s in spectra:
        for top in (1.0006, 1.01, 1.2, 3.0, 30.0):
            for dim in (250, 300, 512):
                a, _ = hidden(rng, np.asarray(s), top, dim)
                a = a / np.abs(a).max()
                got = lanczos.proven_ritz_value(backend.array(a, dtype), bound)
                assert got is None or abs(got / largest(a) - 1) <= 1.2 * bound, (s, top, dim)


def test_an_eigenvector_that_is_hidden_from_the_start_is_not_proven(rng):
    for top in (1.01, 1.2):
        a, q = hidden(rng, 1 / np.arange(1, 100.0), top)
        assert abs(lanczos._start(a) @ q) < 1e-12
        assert lanczos.proven_ritz_value(a, 1e-8) is None
        assert float(lanczos.largest_eigenvalue_on_host(a)) == pytest.approx(top, rel=1e-12)


@on_the_host
@dtypes
@pytest.mark.parametrize("dim", [1, 2, 3, 64, lanczos.SMALL, lanczos.SMALL + 1])
def test_every_dim(backend, rng, dtype, bound, dim):
    for name, a in hard(rng, dim).items():
        got = lanczos.largest_eigenvalue_on_host(backend.array(a, dtype))
        assert abs(float(got) - largest(a)) <= 1.2 * bound * abs(largest(a)), name
        small = backend.array(a / (np.abs(a).max() or 1), dtype)
        got = lanczos.proven_ritz_value(small, bound)  # of any dim, though not used for small ones
        exact = largest(backend.to_numpy(small))
        assert got is None or abs(got - exact) <= 1.2 * bound * exact, name


@on_the_host
@dtypes
@pytest.mark.parametrize("dim", [3, DIM])
def test_zero_has_no_largest_eigenvalue(backend, dtype, bound, dim):
    zero = lanczos.largest_eigenvalue_on_host(backend.array(np.zeros((dim, dim)), dtype))
    assert (zero.shape, float(zero)) == ((), 0.0)


@on_the_host
@dtypes
@pytest.mark.parametrize("dim", [3, DIM])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(backend, rng, dtype, bound, dim, value):
    for at in ((0, 0), (2, 1), (dim - 1, dim - 1)):
        a = correlation(rng.normal(size=(dim, dim)))
        a[at] = a[at[::-1]] = value
        got = lanczos.largest_eigenvalue_on_host(backend.array(a, dtype))
        assert not np.isfinite(float(got))


@on_the_host
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("dim", [64, DIM])
def test_a_norm_that_overflows_is_infinite(backend, dim):
    a = backend.array(np.full((dim, dim), 2e38), "float32")
    assert float(lanczos.largest_eigenvalue_on_host(a)) == np.inf
    predictor = dp.DirectPred(dim, rule=dp.DirectCopy())
    with pytest.raises(ValueError, match="gave a weight that is not finite"):
        predictor.update(backend.array(np.full((4, dim), 4e18), "float32"))


@on_the_host
def test_rounding_errors_of_either_sign(backend, rng):
    """The centred correlation of rows that are all the same."""
    for a in (-np.eye(DIM), -rotated(rng, np.ones(DIM)), 1e-9 * rng.normal(size=(DIM, DIM))):
        a = (a + a.T) / 2
        got = float(lanczos.largest_eigenvalue_on_host(backend.array(a, "float32")))
        assert got == pytest.approx(max(largest(a), 0), rel=6e-4, abs=1e-7)


@settings(max_examples=60)
@given(data=st.data())
def test_any_spectrum(data):
    dim = data.draw(st.sampled_from([241, 300, 400]))
    rank = data.draw(st.integers(1, dim))
    exponents = data.draw(st.lists(st.floats(-12, 0), min_size=1, max_size=rank))
    dtype, bound = data.draw(st.sampled_from([("float32", 5e-4), ("float64", 1e-8)]))
    scale = 10.0 ** data.draw(st.floats(-25, 25))
    # Fewer values than the rank: they repeat, in clusters.
    s = np.resize(10.0 ** np.array([0.0, *exponents]), rank)
    a = scale * rotated(np.random.default_rng(dim), np.pad(s, (0, dim - rank)))
    for backend in (BACKENDS["numpy"], BACKENDS["torch-cpu"]):
        got = lanczos.largest_eigenvalue_on_host(backend.array(a, dtype))
        assert abs(float(got) / scale - 1) <= 1.2 * bound


def test_auto_takes_it_for_plain_values_on_the_host_only(backend, rng, monkeypatch):
    calls = []
    real = lanczos.largest_eigenvalue_on_host
    monkeypatch.setattr(solvers, "largest_eigenvalue_on_host", lambda a: calls.append(1) or real(a))
    a = correlation(rng.normal(size=(40, 20)))
    given = backend.array(a, "float32")
    solvers.auto(given, dp.Eq18())
    for rule in (dp.DirectCopy(), dp.DirectSet(1.0)):
        solvers.matmul(given, rule)
        solvers.eigh(given, rule)
        assert not calls
        weight = backend.to_numpy(solvers.auto(given, rule))
        assert len(calls) == (backend in [BACKENDS[name] for name in HOST])
        calls.clear()
        exact = a + rule.eps * largest(a) * np.eye(20)
        assert np.abs(weight - exact).max() <= 6e-4 * largest(a)
        np.testing.assert_array_equal(weight, weight.T)
    monkeypatch.setattr(solvers, "on_host", lambda x: False)
    solvers.auto(given, dp.DirectCopy())
    assert not calls


def test_auto_never_takes_it_where_torch_traces_or_differentiates(rng, monkeypatch):
    torch = pytest.importorskip("torch")
    a = torch.from_numpy(correlation(rng.normal(size=(40, 20))).astype("float32"))
    expected = solvers.matmul(a, dp.DirectCopy())

    def called(matrix):
        raise AssertionError("called")

    monkeypatch.setattr(solvers, "largest_eigenvalue_on_host", called)

    class Solve(torch.nn.Module):
        def forward(self, x):
            return solvers.auto(x, dp.DirectCopy())

    compiled = torch.compile(Solve(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a), expected)
    torch.testing.assert_close(torch.export.export(Solve(), (a,)).module()(a), expected)
    wanted = a.clone().requires_grad_()
    solvers.auto(wanted, dp.DirectCopy()).sum().backward()
    assert wanted.grad.isfinite().all()
    with pytest.raises(AssertionError, match="called"):
        solvers.auto(a, dp.DirectCopy())


def test_the_matrix_is_left_alone(rng):
    a = correlation(rng.normal(size=(400, DIM)))
    before = a.copy()
    lanczos.largest_eigenvalue_on_host(a)
    np.testing.assert_array_equal(a, before)
