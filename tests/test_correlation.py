import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directpred.correlation import UNIT, Moments, is_finite, merge, moments, moving_average


def dtype_of(backend, name):
    return backend.array([0.0], name).dtype


@pytest.mark.parametrize("shape", [(1, 3), (7, 3), (4, 5, 3)])
def test_moments_are_the_sums_over_rows(backend, rng, shape):
    z = rng.normal(size=shape)
    got = moments(backend.array(z), dtype_of(backend, "float64"))
    rows = z.reshape(-1, 3)
    np.testing.assert_allclose(backend.to_numpy(got.outer), UNIT * rows.T @ rows, rtol=1e-12)
    np.testing.assert_allclose(backend.to_numpy(got.total), rows.sum(axis=0), rtol=1e-12)
    assert got.rows == len(rows)


def test_strided_features(backend, rng):
    z = rng.normal(size=(3, 40))
    got = moments(backend.array(z).T[::2, :], dtype_of(backend, "float64"))
    expected = UNIT * z[:, ::2] @ z[:, ::2].T
    np.testing.assert_allclose(backend.to_numpy(got.outer), expected, rtol=1e-12)


@given(cuts=st.lists(st.integers(1, 49), unique=True, max_size=5))
def test_merging_parts_gives_the_whole(rng, cuts):
    z = rng.normal(size=(50, 4))
    parts = [moments(part, z.dtype) for part in np.split(z, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    whole = moments(z, z.dtype)
    for got, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 1100])
def test_narrow_features_are_summed_in_float32_block_by_block(backend, rng, dim):
    z = rng.normal(size=(9001, dim)).astype("float16")
    if backend.module == "array_api_strict":
        pytest.skip("the array API standard has no half precision")
    got = moments(backend.array(z, "float16"), dtype_of(backend, "float32"))
    assert got.rows == 9001
    assert got.outer.dtype == dtype_of(backend, "float32")
    wide = z.astype(np.float64)
    outer = backend.to_numpy(got.outer) / UNIT
    np.testing.assert_allclose(outer, wide.T @ wide, rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_one_bad_value_anywhere_is_seen(backend, rng, value):
    for row, column in [(0, 0), (3, 1), (6, 2)]:
        z = rng.normal(size=(7, 3))
        z[row, column] = value
        with np.errstate(all="ignore"):
            assert not bool(is_finite(moments(backend.array(z), dtype_of(backend, "float64"))))
    good = moments(backend.array(rng.normal(size=(7, 3))), dtype_of(backend, "float64"))
    assert bool(is_finite(good))


def test_no_rows_are_not_finite():
    with np.errstate(invalid="ignore"):
        assert not is_finite(Moments(np.zeros((2, 2)), np.zeros(2), np.float64(0)))


def test_moving_average_is_eq_19(backend):
    old, new = backend.array([[1.0, 2.0]]), backend.array([[10.0, 40.0]])
    got = backend.to_numpy(moving_average(old, new, 0.3, 0.07))
    np.testing.assert_allclose(got, [[0.3 * 1 + 0.7 * 1, 0.3 * 2 + 0.7 * 4]], rtol=1e-15)
    np.testing.assert_array_equal(
        backend.to_numpy(moving_average(old, new, 0.0, 0.1)), [[1.0, 4.0]]
    )
    got = backend.to_numpy(moving_average(old, new, 0.3, 0.07, 2.0))  # the share twice
    np.testing.assert_allclose(got, [[0.3 * 1 + 0.14 * 10, 0.3 * 2 + 0.14 * 40]], rtol=1e-15)
