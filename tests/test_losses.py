import numpy as np
import pytest

import directpred as dp
from directpred.losses import iso_loss, regression_loss

torch = pytest.importorskip("torch")


def oracle(p, t, euclidean):
    if euclidean:
        return np.mean([0.5 * np.sum((a - b) ** 2) for a, b in zip(p, t, strict=True)])
    unit = [(a / np.linalg.norm(a), b / np.linalg.norm(b)) for a, b in zip(p, t, strict=True)]
    return np.mean([np.sum((a - b) ** 2) for a, b in unit])


def finite_difference(f, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


def grad_of(backend_name, f, x):
    """Value and gradient of a function of one array, in float64."""
    if backend_name == "torch":
        x = torch.tensor(x, requires_grad=True)
        value = f(x)
        value.backward()
        return value.item(), x.grad.numpy()
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(f)(jax.numpy.asarray(x))
        return float(value), np.asarray(gradient)


def as_library(name, x):
    if name == "torch":
        return torch.tensor(x)
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        return jax.numpy.asarray(x)


@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_regression_loss_and_its_gradient(rng, library, euclidean):
    p, t = rng.normal(size=(2, 5, 4))
    value, gradient = grad_of(
        library, lambda x: regression_loss(x, as_library(library, t), euclidean), p
    )
    assert value == pytest.approx(oracle(p, t, euclidean), rel=1e-12)
    expected = finite_difference(lambda x: oracle(x, t, euclidean), p)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_iso_loss_hands_on_the_gradient_past_the_predictor(rng, library, euclidean):
    z, t = rng.normal(size=(2, 5, 4))
    w = np.diag([3.0, 1.0, 0.5, 0.1])
    weight, target = as_library(library, w), as_library(library, t)
    value, gradient = grad_of(library, lambda x: iso_loss(x, x @ weight, target, euclidean), z)
    assert value == pytest.approx(oracle(z @ w, t, euclidean), rel=1e-12)
    expected = finite_difference(lambda p: oracle(p, t, euclidean), z @ w)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    through = grad_of(library, lambda x: regression_loss(x @ weight, target, euclidean), z)[1]
    np.testing.assert_allclose(through, expected @ w.T, atol=1e-8)
    assert not np.allclose(gradient, through)


def test_iso_gradient_is_that_of_the_published_surrogate(rng):
    """zᵀt/(‖p‖‖t‖) − ½ (pᵀt / (‖p‖³‖t‖)) zᵀ W z, the factors without gradient, times −2."""
    z, t = rng.normal(size=(2, 6, 4))
    predictor = dp.DirectPred(4)
    w = predictor.update(z)
    p = z @ w
    norm, size = np.linalg.norm(p, axis=1), np.linalg.norm(t, axis=1)

    def surrogate(x):
        quadratic = np.sum((x @ w) * x, axis=1)
        factor = np.sum(p * t, axis=1) / (norm**3 * size)
        return np.mean(-2 * (np.sum(x * t, axis=1) / (norm * size) - 0.5 * factor * quadratic))

    weight = torch.tensor(w)
    gradient = grad_of("torch", lambda x: iso_loss(x, x @ weight, torch.tensor(t)), z)[1]
    np.testing.assert_allclose(gradient, finite_difference(surrogate, z), atol=1e-8)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_rows_of_zeros_have_a_finite_loss_and_gradient(library):
    z = np.zeros((2, 3))
    target = as_library(library, np.ones((2, 3)))
    value, gradient = grad_of(library, lambda x: iso_loss(x, x, target), z)
    assert value == 2
    assert np.isfinite(gradient).all()


def test_numpy_has_a_regression_loss_but_no_iso_loss(rng):
    p, t = rng.normal(size=(2, 5, 4))
    assert regression_loss(p, t) == pytest.approx(oracle(p, t, False))
    with pytest.raises(TypeError, match="needs arrays of PyTorch or JAX, got ndarray"):
        iso_loss(p, p, t)


def rows_of_norm(rng, norm, rows=64, dim=16):
    x = rng.normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True) * norm


def value_and_grad(library, dtype, loss, p, t):
    """In that dtype, as float64; and the numbers that p and t then are."""
    if library == "torch":
        p, t = (torch.tensor(x).to(getattr(torch, dtype)) for x in (p, t))
        p.requires_grad_()
        value = loss(p, t)
        value.backward()
        assert value.dtype in (torch.float32, torch.float64)
        return (
            value.item(),
            p.grad.double().numpy(),
            p.detach().double().numpy(),
            t.double().numpy(),
        )
    jax = pytest.importorskip("jax")
    p, t = (jax.numpy.asarray(x, dtype) for x in (p, t))
    value, gradient = jax.value_and_grad(loss)(p, t)
    assert value.dtype == jax.numpy.float32
    return float(value), *(np.asarray(x, np.float64) for x in (gradient, p, t))


def exact_gradient(p, t):
    """Of the mean of 2 − 2 cos∠(p, t)."""
    norm = np.linalg.norm(p, axis=1, keepdims=True)
    u, v = p / norm, t / np.linalg.norm(t, axis=1, keepdims=True)
    return -2 * (v - np.sum(u * v, axis=1, keepdims=True) * u) / norm / len(p)


SCALES = [("float16", n) for n in (1e-4, 1e-2, 1, 300, 6e4)]
SCALES += [("bfloat16", n) for n in (1e-7, 1e-3, 1, 300, 6e4, 1e30)]
SCALES += [("float32", n) for n in (1e-33, 1e-30, 1e-7, 1, 6e4, 1e20, 1e30)]


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize(("dtype", "norm"), SCALES)
@pytest.mark.parametrize("iso", [False, True])
def test_any_precision_and_scale_has_the_right_loss_and_gradient(rng, library, dtype, norm, iso):
    p, t = rows_of_norm(rng, norm), rows_of_norm(rng, norm)
    loss = (lambda p, t: iso_loss(p, p, t)) if iso else regression_loss
    value, gradient, p, t = value_and_grad(library, dtype, loss, p, t)
    assert value == pytest.approx(oracle(p, t, False), rel=1e-5)
    exact = exact_gradient(p, t)
    eps = float(torch.finfo(getattr(torch, dtype)).eps)
    denormal = 6e-8 if dtype == "float16" else 1e-37
    np.testing.assert_allclose(gradient, exact, atol=4 * eps * np.abs(exact).max() + denormal)
    # Rows that are equal are at distance 0, also where their norm is 1e-7 in float16.
    same = rows_of_norm(rng, max(norm, 1e-6))
    assert abs(value_and_grad(library, dtype, loss, same, same)[0]) <= 1e-6


@pytest.mark.parametrize("euclidean", [False, True])
def test_float16_of_cpu_autocast(rng, euclidean):
    p, t = (torch.tensor(rows_of_norm(rng, 500)).half() for _ in range(2))
    exact = oracle(p.double().numpy(), t.double().numpy(), euclidean)
    with torch.autocast("cpu", dtype=torch.float16):
        assert regression_loss(p, t, euclidean).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zeros_have_no_gradient_and_nan_stays(rng, library, dtype):
    p, t = rng.normal(size=(2, 4, 3))
    p[0], t[1] = 0, 0
    value, gradient, *_ = value_and_grad(library, dtype, regression_loss, p, t)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert not gradient[:2].any()
    assert gradient[2:].all()
    p[2, 0] = np.nan
    assert np.isnan(value_and_grad(library, dtype, regression_loss, p, t)[0])


@pytest.mark.parametrize("norm", [1e-35, 1e-20, 1e20, 1e38])
def test_numpy_at_any_scale(rng, norm):
    p, t = (rows_of_norm(rng, norm).astype("float32") for _ in range(2))
    exact = oracle(p.astype(float), t.astype(float), False)
    assert regression_loss(p, t) == pytest.approx(exact, rel=1e-5)
