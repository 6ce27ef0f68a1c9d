"""Every path through the package gives what `directpred.reference` gives."""

import numpy as np
import pytest

import directpred as dp
import oracle
from backends import Backend

torch = pytest.importorskip("torch")
from directpred.reference import EPS, RHO, DirectPred  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402

DIM, STEPS, VIEWS = 6, 5, 2


@pytest.fixture
def batches(rng):
    return [rng.normal(size=(VIEWS, 9 + step, DIM)) for step in range(STEPS)]


@pytest.fixture
def expected(batches):
    """The weights before the first step and after each."""
    reference = DirectPred(DIM).double()
    weights = [reference.weight.numpy().copy()]
    for views in batches:
        for z in views:
            np.testing.assert_allclose(reference(torch.from_numpy(z)), z @ weights[-1])
        reference.step()
        weights.append(reference.weight.numpy().copy())
    return weights


def test_the_reference_equals_the_oracle(batches, expected):
    for step in range(1, STEPS + 1):
        exact = oracle.weight([list(b) for b in batches[:step]], RHO, lambda s: oracle.eq18(s, EPS))
        np.testing.assert_allclose(expected[step], exact, atol=1e-12)


@pytest.mark.parametrize(("solver", "bound"), [("auto", 1e-7), ("eigh", 1e-12), ("matmul", 2e-7)])
def test_any_array_library(backend: Backend, batches, expected, solver, bound):
    predictor = dp.DirectPred(DIM, solver=solver)
    for views, before, after in zip(batches, expected, expected[1:], strict=False):
        z = [backend.array(view) for view in views]
        prediction = backend.to_numpy(predictor(z[0]))
        np.testing.assert_allclose(prediction, views[0] @ before, atol=10 * bound)
        weight = backend.to_numpy(predictor.update(*z))
        assert np.linalg.norm(weight - after, 2) <= bound * np.linalg.norm(after, 2)


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_the_head_however_its_step_is_closed(batches, expected, closes):
    head = DirectPredHead(DIM, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.eye(DIM, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    if closes == "attach":
        head.attach(optimizer)
    for views, before, after in zip(batches, expected, expected[1:], strict=False):
        predictions = [head(torch.from_numpy(z) @ parameter) for z in views]
        for prediction, z in zip(predictions, views, strict=True):
            np.testing.assert_allclose(prediction.detach(), z @ before, atol=1e-10)
        sum(p.square().mean() for p in predictions).backward()
        optimizer.step()
        optimizer.zero_grad()
        if closes == "step":
            head.step()
        np.testing.assert_allclose(head.weight, after, atol=1e-12)


def test_jax_and_flax(batches, expected):
    jax = pytest.importorskip("jax")
    import directpred.jax as dpj

    with jax.enable_x64(True):
        state, update = dpj.init(DIM, dtype="float64"), jax.jit(dpj.update)
        for views, after in zip(batches, expected[1:], strict=False):
            state, weight = update(state, *views)
            np.testing.assert_allclose(weight, after, atol=1e-10)
        pytest.importorskip("flax")
        from directpred.flax import DirectPredHead as FlaxHead

        head = FlaxHead(DIM, dtype="float64")
        for views, after in zip(batches, expected[1:], strict=False):
            for z in views:
                head(z)
            head.step()
            np.testing.assert_allclose(head.weight[...], after, atol=1e-10)
