import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import BACKENDS
from directpred import fused, matrix


def compose(polynomials, x):
    for step, coefficients in enumerate(polynomials):
        powers = (1, 3, 5, 7, 9) if step else (1, 3, 5, 9)
        x = sum(c * x**p for c, p in zip(coefficients, powers, strict=True))
    return x


def symmetric(rng, s):
    u = np.linalg.qr(rng.normal(size=(len(s), len(s))))[0]
    return (u * s) @ u.T


def spectra(dim):
    j = np.arange(dim)
    return {
        "flat": np.ones(dim),
        "power law": (j + 1.0) ** -2,
        "condition 1e12": np.logspace(-12, 0, dim),
        "rank one": (j == 0) * 1.0,
        "low rank": (j <= dim // 4) * 1.0,
        "two clusters": np.where(j < dim // 2, 1, 1e-6),
        "one above a cluster": np.where(j == 0, 1, 0.9985),
        "small": 1e-20 / (j + 1),
        "large": 1e12 / (j + 1),
    }


@pytest.mark.parametrize("steps", range(1, 11))
def test_polynomials_are_minimax_and_stay_near_one(steps):
    polynomials = matrix.sign_polynomials(steps)
    assert len(polynomials) == steps
    x = np.logspace(-12, 0, 20001)
    h = compose(polynomials, x)
    error = np.max(x * np.abs(1 - h))
    assert error == pytest.approx(matrix.root_error(polynomials), rel=0.02)
    assert (h > 0).all()
    if steps > 1:
        assert error < 0.35 * matrix.root_error(matrix.sign_polynomials(steps - 1))


@pytest.mark.parametrize("exponents", [(1, 3, 5, 9), (1, 3, 5, 7, 9)])
@pytest.mark.parametrize("low", [1e-7, 1e-2, 0.3, 0.9])
def test_one_polynomial_equioscillates(exponents, low):
    coefficients, error = matrix._minimax(low, exponents)
    x = np.concatenate([np.geomspace(low, 1, 200_001), np.linspace(low, 1, 200_001)])
    x.sort()
    deviation = sum(c * x**p for c, p in zip(coefficients, exponents, strict=True)) - 1
    assert np.abs(deviation).max() == pytest.approx(error, rel=1e-6, abs=1e-12)
    inner = deviation[np.flatnonzero(np.diff(np.sign(np.diff(deviation))) != 0) + 1]
    if error > 1e-6:  # below, rounding has turning points of its own
        extremes = np.array([deviation[0], *inner[np.abs(inner) > 0.9 * error], deviation[-1]])
        signs = np.sign(extremes)
        turns = 1 + np.count_nonzero(signs[1:] != signs[:-1])
        assert turns == len(exponents) + 1
        np.testing.assert_allclose(np.abs(extremes), error, rtol=1e-4)


@pytest.mark.parametrize(
    ("steps", "kept"), [(4, "_SINGLE"), (9, "_DOUBLE")], ids=["float32", "float64"]
)
def test_the_interval_that_is_kept_is_the_best_of_a_search(steps, kept):
    best = matrix.root_error(matrix.sign_polynomials(steps))
    assert matrix.root_error(getattr(matrix, kept)) <= 1.01 * best


def products_of_a_root(steps):
    """Counted: all that a root takes beyond the powers that it is given."""
    calls, product = [], fused._product
    parts = matrix.powers(np.eye(3), np.eye(3))
    with pytest.MonkeyPatch.context() as patch:
        polynomials = matrix.coupled_steps(matrix.sign_polynomials(steps))
        patch.setattr(matrix, "_steps", lambda a: polynomials)
        patch.setattr(fused, "_product", lambda *a: calls.append(1) or product(*a))
        matrix.square_root(parts)
    return len(calls)


def test_the_documented_table_is_what_the_functions_give():
    rows = re.findall(r"^ +(\d+) +(\d+) (\d\.\de-\d\d)$", matrix.__doc__, flags=re.MULTILINE)
    assert len(rows) >= 6
    for steps, products, error in rows:
        polynomials = matrix.sign_polynomials(int(steps))
        assert int(products) == products_of_a_root(int(steps))
        # The last digits of the smallest errors are rounding, which differs between machines.
        assert matrix.root_error(polynomials) == pytest.approx(float(error), rel=0.2)


def powers(backend, a, dtype):
    return matrix.powers(backend.array(a, dtype), backend.array(np.eye(len(a)), dtype))


def root_and_norm(backend, a, dtype):
    """Of the matrix itself: what the solver makes of the results for B = A / top."""
    parts = powers(backend, a, dtype)
    root, scale = matrix.square_root(parts)
    top = float(parts.top)
    assert root.dtype == parts.one.dtype
    root = backend.to_numpy(root).astype(np.float64)
    largest = matrix.largest_eigenvalue(parts)
    assert largest.shape == ()
    return root * np.sqrt(top / float(scale)), top * float(largest)


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 300])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-7), ("float32", 6e-4)])
def test_largest_eigenvalue_and_square_root(backend, rng, dim, dtype, bound):
    for name, s in spectra(dim).items():
        exact = symmetric(rng, s)
        root, largest = root_and_norm(backend, exact, dtype)
        assert largest == pytest.approx(s.max(), rel=bound), name
        np.testing.assert_array_equal(root, root.T)
        error = np.linalg.norm(root - symmetric_root(exact), 2) / np.sqrt(s.max())
        assert error <= bound, (name, error)


@pytest.mark.parametrize("dim", [257, 400, 1500])
def test_the_largest_eigenvalue_of_a_flat_spectrum_does_not_underflow(dim):
    """Between two scalings the trace falls furthest where all eigenvalues are alike."""
    eye = np.eye(dim, dtype=np.float32)
    largest = matrix.largest_eigenvalue(matrix.powers(3 * eye, eye))
    assert 3 * float(largest) == pytest.approx(3, rel=6e-4)


def symmetric_root(a):
    s, u = np.linalg.eigh(a)
    return (u * np.sqrt(np.maximum(s, 0))) @ u.T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_has_no_largest_eigenvalue_and_its_root_is_zero(backend, dtype):
    root, largest = root_and_norm(backend, np.zeros((4, 4)), dtype)
    assert largest == 0
    np.testing.assert_array_equal(root, 0)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-7), ("float32", 6e-4)])
def test_positive_part(backend, rng, dtype, bound):
    top = 1 + matrix.tolerance(backend.array([[1.0]], dtype))
    for s in ([1.0, 0.3, 0.0, -1e-4, -0.7], [top] * 5, [-top] * 5, np.linspace(-1, 1, 64)):
        s = np.asarray(s)
        a = symmetric(rng, s)
        got = backend.to_numpy(matrix.positive_part(backend.array(a, dtype)))
        np.testing.assert_array_equal(got, got.T)
        us, u = np.linalg.eigh(a)
        assert np.linalg.norm(got - (u * np.maximum(us, 0)) @ u.T, 2) <= bound


@settings(max_examples=60)
@given(data=st.data())
def test_any_spectrum_in_float32(data):
    dim = data.draw(st.sampled_from([2, 3, 7, 31, 100]))
    rank = data.draw(st.integers(1, dim))
    exponents = data.draw(st.lists(st.floats(-12, 0), min_size=1, max_size=rank))
    scale = 10.0 ** data.draw(st.floats(-15, 15))
    # Fewer values than the rank: they repeat, in clusters.
    s = np.resize(10.0 ** np.array([0.0, *exponents]), rank)
    a = symmetric(np.random.default_rng(dim), np.pad(s, (0, dim - rank)))
    root, largest = root_and_norm(BACKENDS["numpy"], scale * a, "float32")
    exact = np.sqrt(scale) * symmetric_root(a)
    assert np.linalg.norm(root - exact, 2) <= 6e-4 * np.sqrt(scale)
    assert abs(largest / scale - 1) <= 6e-4
