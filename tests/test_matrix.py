import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from directpred import matrix


def compose(polynomials, x):
    for a, b, c in polynomials:
        x = a * x + b * x**3 + c * x**5
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


@pytest.mark.parametrize("steps", range(1, 15))
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


def test_one_quintic_equioscillates():
    (coefficients, error) = matrix._minimax_quintic(0.1)
    x = np.linspace(0.1, 1, 100001)
    deviation = compose([coefficients], x) - 1
    assert np.abs(deviation).max() == pytest.approx(error, rel=1e-6)
    inner = deviation[np.flatnonzero(np.diff(np.sign(np.diff(deviation))) != 0) + 1]
    extremes = np.array([deviation[0], *inner, deviation[-1]])
    np.testing.assert_allclose(np.abs(extremes), error, rtol=1e-6)
    assert (np.sign(extremes[:-1]) == -np.sign(extremes[1:])).all()


def test_the_documented_table_is_what_the_functions_give():
    rows = re.findall(r"^ +(\d+) +(\d+) (\d\.\de-\d\d)$", matrix.__doc__, flags=re.MULTILINE)
    assert len(rows) >= 6
    for steps, products, error in rows:
        polynomials = matrix.sign_polynomials(int(steps))
        assert int(products) == 4 * int(steps) - 3
        # The last digits of the smallest errors are rounding, which differs between machines.
        assert matrix.root_error(polynomials) == pytest.approx(float(error), rel=0.2)


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 300])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-7), ("float32", 6e-4)])
def test_largest_eigenvalue_and_square_root(backend, rng, dim, dtype, bound):
    for name, s in spectra(dim).items():
        exact = symmetric(rng, s)
        a = backend.array(exact, dtype)
        largest = matrix.largest_eigenvalue(a)
        assert largest.shape == ()
        assert float(largest) == pytest.approx(s.max(), rel=bound), name
        root = matrix.square_root(a, largest)
        assert root.dtype == a.dtype
        root = backend.to_numpy(root)
        np.testing.assert_array_equal(root, root.T)
        error = np.linalg.norm(root - symmetric_root(exact), 2) / np.sqrt(s.max())
        assert error <= bound, (name, error)


def symmetric_root(a):
    s, u = np.linalg.eigh(a)
    return (u * np.sqrt(np.maximum(s, 0))) @ u.T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_zero_has_no_largest_eigenvalue_and_its_root_is_zero(backend, dtype):
    zero = backend.array(np.zeros((4, 4)), dtype)
    largest = matrix.largest_eigenvalue(zero)
    assert float(largest) == 0
    np.testing.assert_array_equal(backend.to_numpy(matrix.square_root(zero, largest)), 0)


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
    single = (scale * a).astype(np.float32)
    largest = matrix.largest_eigenvalue(single)
    root = matrix.square_root(single, largest)
    exact = np.sqrt(scale) * symmetric_root(a)
    assert np.linalg.norm(root - exact, 2) <= 5e-4 * np.sqrt(scale)
    assert abs(float(largest) / scale - 1) <= 6e-4
