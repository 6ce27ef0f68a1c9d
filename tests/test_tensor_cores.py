"""Products on tensor cores, emulated: TF32 reads 10 bits of the mantissa and sums in float32."""

import numpy as np
import pytest

import directpred as dp
import oracle

torch = pytest.importorskip("torch")
from directpred import fused  # noqa: E402
from directpred.solvers import SOLVERS  # noqa: E402


def truncated(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tensor_cores(monkeypatch):
    """Products as on a GPU from dim 1024 on; returns how many ran there."""
    products, inside = [], []
    product = fused._product

    class Tf32:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *_):
            inside.pop()

    def emulated(a, b, scale, plus):
        if inside:
            products.append(scale)
            a, b = truncated(a.contiguous()), truncated(b.contiguous())
        return product(a, b, scale, plus)

    monkeypatch.setattr(fused, "_on_tensor_cores", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(fused, "_tf32", Tf32)
    monkeypatch.setattr(fused, "_product", emulated)
    return products


def test_a_split_product_is_one_in_float32(tensor_cores):
    torch.manual_seed(0)
    a, b = torch.randn(2, 200, 200)
    x = fused.operand(a)
    assert torch.equal(x.high, truncated(a))
    assert torch.equal(x.high + x.low, a)
    exact = (a.double() @ b.double()).numpy()
    norm = np.linalg.norm(exact, 2)
    error = np.linalg.norm(fused.matmul(x, fused.operand(b)).numpy() - exact, 2) / norm
    assert error < 1e-6
    plus = torch.randn(200, 200)
    got = fused.matmul(x, fused.operand(b), 0.5, plus.clone())
    assert np.linalg.norm(got.numpy() - plus.numpy() - 0.5 * exact, 2) < 1e-6 * norm
    assert len(tensor_cores) == 6
    rough = np.linalg.norm(fused.rough_square(a).numpy() - a.double().numpy() @ a.double().numpy())
    assert rough > 1e-4  # so the emulation bites


SPECTRA = {
    "power law": lambda j: 1.0 / j,
    "condition 1e12": lambda j: np.geomspace(1, 1e-12, len(j)),
    "flat": lambda j: np.ones(len(j)),
    "half rank": lambda j: (j <= len(j) // 2) * 1.0,
    "two levels": lambda j: np.where(j <= len(j) // 2, 1, 1e-6),
    "one above": lambda j: np.where(j <= 1, 1, 1e-6),
    "rank one": lambda j: (j <= 1) * 1.0,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dim", [128, 512])
def test_the_weight_keeps_its_bound(tensor_cores, rng, spectrum, dim):
    s = SPECTRA[spectrum](np.arange(1, dim + 1))
    u = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    correlation = torch.from_numpy(((u * s) @ u.T).astype(np.float32))
    for rule, exact in (
        (dp.Eq18(), lambda s: oracle.eq18(s, 0.1)),
        (dp.Eq18(0.0), lambda s: oracle.eq18(s, 0.0)),
        (dp.DirectCopy(), lambda s: oracle.directcopy(s, 0.3)),
    ):
        weight = SOLVERS["matmul"](correlation, rule).double().numpy()
        exact = (u * exact(s)) @ u.T
        assert np.linalg.norm(weight - exact, 2) <= 1e-3 * np.linalg.norm(exact, 2)
        np.testing.assert_array_equal(weight, weight.T)
    assert len(tensor_cores) > 100


def test_small_matrices_and_other_dtypes_stay_in_float32():
    for x in (torch.eye(2048), torch.eye(2), np.eye(2048)):
        assert fused.operand(x).high is None
