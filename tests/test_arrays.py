"""What arrays, numbers and rules may be: right, or one sentence that names the cure."""

import warnings

import numpy as np
import pytest

import directpred as dp
import oracle
from directpred.losses import regression_loss
from directpred.state import to_numpy

DIM = 4
EXACT = (dp.Eq18(), lambda s: oracle.eq18(s, 0.1))


def weight_of(*views):
    return oracle.weight([[np.asarray(z, np.float64) for z in views]], 0.3, EXACT[1])


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Arrays


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "longdouble", "float16"])
def test_any_float_of_numpy(rng, dtype):
    z = rng.normal(size=(30, DIM)).astype(dtype)
    predictor = dp.DirectPred(DIM)
    weight = predictor.update(z)
    double = np.dtype(dtype).itemsize >= 8
    assert weight.dtype == (np.float64 if double else np.float32)
    np.testing.assert_allclose(weight, weight_of(z), atol=1e-12 if double else 1e-4)
    assert predictor(z).dtype == z.dtype
    eps = float(np.finfo(z.dtype).eps)
    np.testing.assert_allclose(predictor(z), z.astype(float) @ weight, atol=max(8 * eps, 1e-12))
    again = dp.DirectPred(DIM)
    again.accumulate(z[:7])
    again.accumulate(z[7:])
    np.testing.assert_allclose(again.step(), weight, atol=1e-5)


def test_float64_in_another_order_of_bytes_may_be_as_large_as_float64(rng):
    z = (1e100 * rng.normal(size=(30, DIM))).astype(">f8")
    np.testing.assert_allclose(dp.DirectPred(DIM).update(z), weight_of(z), atol=1e-7)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float6_e3m2fn"]
)
def test_the_floats_of_ml_dtypes_in_numpy(rng, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    z = rng.normal(size=(5000, DIM)).astype(getattr(ml_dtypes, dtype))
    predictor = dp.DirectPred(DIM)
    weight = predictor.update(z, z)
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, weight_of(z), atol=1e-4)
    prediction = predictor(z)
    assert prediction.dtype == z.dtype
    exact = z.astype(float) @ weight
    eps = float(ml_dtypes.finfo(z.dtype).eps)
    np.testing.assert_allclose(prediction.astype(float), exact, atol=eps * np.abs(exact).max())
    with pytest.raises(TypeError, match="must be real floating, got int4"):
        predictor.update(np.ones((3, DIM), ml_dtypes.int4))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16"])
def test_the_small_floats_of_torch(dtype):
    torch = pytest.importorskip("torch")
    z = torch.randn(5000, DIM).to(getattr(torch, dtype))
    predictor = dp.DirectPred(DIM)
    weight = predictor.update(z, z)
    np.testing.assert_allclose(weight, weight_of(z.float()), atol=1e-4)
    assert predictor(z).dtype == z.dtype
    error = (predictor(z).double() - z.double() @ weight.double()).abs().max()
    assert error <= 8 * torch.finfo(z.dtype).eps


class Odd(np.ndarray):
    """A subclass with operators of its own, as those that carry units have."""

    def __matmul__(self, other):
        raise AssertionError

    __mul__ = __add__ = __matmul__


def test_a_subclass_of_numpy_is_its_numbers(rng):
    z = rng.normal(size=(30, DIM))
    predictor, expected = dp.DirectPred(DIM, center=True), dp.DirectPred(DIM, center=True)
    for views in ([z, z], [z]):
        weight = predictor.update(*(view.view(Odd) for view in views))
        np.testing.assert_array_equal(weight, expected.update(*views))
    prediction = predictor(z.view(Odd))
    np.testing.assert_array_equal(prediction, expected(z))
    assert type(weight) is type(prediction) is np.ndarray


class Foreign:
    """An array of a library that this package does not know, such as TensorFlow's."""

    shape, dtype = (3, DIM), "float32"

    def numpy(self):
        return np.ones(self.shape)


def foreign(name):
    ones = np.ones((3, DIM))
    if name == "masked":
        return np.ma.masked_array(ones, mask=ones > 2), r"no mask.*compress_rows\(z\)"
    if name == "matrix":
        return np.matrix(ones), r"got matrix: pass numpy.asarray\(z\)"
    if name == "scipy sparse":
        return pytest.importorskip("scipy.sparse").csr_array(ones), r"csr_array: pass z.toarray\(\)"
    if name == "pandas":
        frame = pytest.importorskip("pandas").DataFrame(ones)
        return frame, r"DataFrame: pass z.to_numpy\(\)"
    if name == "jax sparse":
        sparse = pytest.importorskip("jax.experimental.sparse")
        return sparse.BCOO.fromdense(ones), r"BCOO: pass z.todense\(\)"
    if name == "tensorflow":
        return Foreign(), r"got Foreign: pass z.numpy\(\)"
    if name == "list":
        return ones.tolist(), r"got list: pass numpy.asarray\(z\)"
    if name == "objects":
        return ones.astype(object), "real floating, got object"
    torch = pytest.importorskip("torch")
    dense = torch.ones(3, DIM)
    if name == "torch nested":
        return (
            torch.nested.as_nested_tensor([dense, dense], layout=torch.jagged),
            r"must be dense, got torch.jagged",
        )
    sparse = dense.to_sparse() if name == "torch coo" else dense.to_sparse_csr()
    return sparse, r"must be dense, got torch.sparse_\w+: pass z.to_dense\(\)"


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "name",
    [
        *("masked", "scipy sparse", "pandas", "jax sparse", "tensorflow", "list", "objects"),
        *("torch coo", "torch csr", "torch nested", "matrix"),
    ],
)
def test_what_is_no_array_here_is_named_with_the_cure(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z, message = foreign(name)
    predictor = dp.DirectPred(DIM)
    for call in (predictor, predictor.update, predictor.accumulate):
        with pytest.raises(TypeError, match=message):
            call(z)
    assert predictor.step_count == 0


# Options and rules


NUMBERS = [
    np.float64,
    np.float32,
    np.float16,
    np.asarray,
    np.longdouble,
    lambda x: np.array(x, ">f8"),
]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_numpy_decide_no_dtype(backend, rng, number):
    rules = [
        dp.Eq18(number(0.25)),
        dp.Eq18(number(0.25), normalize=np.bool_(False)),
        dp.DirectSet(number(0.75), number(0.25)),
        dp.DirectCopy(number(0.25)),
        dp.BoostScale(number(0.25), number(0.5), False, number(0.125)),
    ]
    z = backend.array(rng.normal(size=(30, DIM)), "float32")
    for rule in rules:
        predictor = dp.DirectPred(
            DIM, rule, rho=number(0.5), freq=np.int64(1), center=np.bool_(True)
        )
        for _ in range(2):
            weight = predictor.update(z)
        assert weight.dtype == predictor.correlation.dtype == z.dtype
        assert predictor(z).dtype == z.dtype


def test_numbers_of_other_libraries_are_numbers():
    torch = pytest.importorskip("torch")
    assert dp.Eq18(torch.tensor(0.25)) == dp.Eq18(0.25)
    assert type(dp.DirectPred(4, rho=torch.tensor(0.25)).options.rho) is float


@pytest.mark.parametrize("dim", [np.int64(4), np.int8(4), np.asarray(4)])
def test_a_whole_number_of_numpy_is_a_dim(rng, dim):
    predictor = dp.DirectPred(dim, freq=dim)
    assert (type(predictor.dim), type(predictor.options.freq)) == (int, int)
    assert predictor.update(rng.normal(size=(9, 4))).shape == (4, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dp.DirectPred(4.0), TypeError, "dim must be an integer, got 4.0"),
        (lambda: dp.DirectPred(True), TypeError, "dim must be an integer, got True"),
        (lambda: dp.DirectPred(np.bool_(True)), TypeError, "dim must be an integer"),
        (
            lambda: dp.DirectPred(4, solver=["auto"]),
            TypeError,
            r"solver must be text, got \['auto'\]",
        ),
        (lambda: dp.DirectPred(4, nonfinite={}), TypeError, "nonfinite must be text, got {}"),
        (lambda: dp.DirectPred(4, solver="lu"), ValueError, "solver must be one of"),
        (lambda: dp.DirectPred(4, rho="0.3"), TypeError, "rho must be a number"),
        (lambda: dp.DirectPred(4, rho=np.ones(2)), TypeError, "rho must be a number"),
        (lambda: dp.DirectPred(4, rho=10**400), ValueError, "rho must be in"),
        (lambda: dp.DirectPred(4, center="no"), TypeError, "center must be True or False"),
        (lambda: dp.DirectPred(4, freq=1.5), ValueError, "freq must be an integer"),
        (lambda: dp.Eq18(normalize="no"), TypeError, "normalize must be True or False, got 'no'"),
        (lambda: dp.Eq18(normalize=1), TypeError, "normalize must be True or False, got 1"),
        (lambda: dp.BoostScale(inside="no"), TypeError, "inside must be True or False, got 'no'"),
        (lambda: dp.Eq18(10**400), ValueError, "eps must be ≥ 0"),
        (lambda: dp.Eq18(1j), TypeError, "eps must be ≥ 0"),
        (lambda: dp.Eq18(np.array([0.1])), TypeError, "eps must be ≥ 0"),
        (
            lambda: dp.DirectPred(4).load_state_dict(None),
            TypeError,
            r"state_dict\(\) gave, got NoneType",
        ),
        (
            lambda: dp.DirectPred(4).load_state_dict([1]),
            TypeError,
            r"state_dict\(\) gave, got list",
        ),
    ],
)
def test_an_option_of_the_wrong_type_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def dtype_of(backend, name):
    return backend.array([0.0], name).dtype


def namespace(s):
    return dp.array.array_namespace(s)


RETURNS = {
    "float64": lambda s: namespace(s).astype(namespace(s).sqrt(s), namespace(s).float64),
    "integers": lambda s: namespace(s).astype(s * 10, namespace(s).int64),
    "bools": lambda s: s > s[0],
    "numpy": lambda s: np.sqrt(to_numpy(s).astype(np.float64)),
}


@pytest.mark.parametrize("returns", sorted(RETURNS))
def test_a_rule_that_returns_another_dtype_or_library(backend, rng, returns):
    given = rng.normal(size=(30, DIM)).astype("float32")
    z = backend.array(given, "float32")
    predictor = dp.DirectPred(DIM, RETURNS[returns])
    for _ in range(2):
        weight = predictor.update(z)
    assert weight.dtype == z.dtype
    assert predictor(z).dtype == z.dtype
    expected = dp.DirectPred(DIM, RETURNS[returns]).update(given)
    np.testing.assert_allclose(to_numpy(weight), expected, atol=1e-4)


def test_a_rule_that_returns_complex_numbers_is_named(backend, rng):
    z = backend.array(rng.normal(size=(30, DIM)), "float32")
    predictor = dp.DirectPred(DIM, lambda s: namespace(s).astype(s, namespace(s).complex64))
    with pytest.raises(TypeError, match=r"must return real numbers, got .*complex64"):
        predictor.update(z)
    assert predictor.step_count == 0


def test_a_rule_of_torch_for_numpy_and_back(rng):
    torch = pytest.importorskip("torch")
    z = rng.normal(size=(30, DIM))
    exact = dp.DirectPred(DIM, np.sqrt).update(z)
    got = dp.DirectPred(DIM, lambda s: torch.from_numpy(s).sqrt().requires_grad_()).update(z)
    np.testing.assert_allclose(got, exact, rtol=1e-12)
    torch_z = torch.from_numpy(z)
    got = dp.DirectPred(DIM, lambda s: np.sqrt(s.numpy())).update(torch_z)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, exact, atol=1e-12)


@pytest.mark.parametrize("returns", ["float64", "integers", "bools"])
def test_a_rule_that_returns_another_dtype_under_jit(rng, returns):
    jax = pytest.importorskip("jax")
    dpj = pytest.importorskip("directpred.jax")
    z = rng.normal(size=(30, DIM)).astype("float32")
    with jax.enable_x64(True):
        state = dpj.init(DIM, RETURNS[returns])
        state, weight = jax.lax.scan(dpj.update, state, jax.numpy.asarray(z)[None])
        assert weight.dtype == jax.numpy.float32
        expected = dp.DirectPred(DIM, RETURNS[returns]).update(z)
        np.testing.assert_allclose(weight[0], expected, atol=1e-4)
        with pytest.raises(TypeError, match="must return real numbers, got complex64"):
            jax.jit(dpj.update)(dpj.init(DIM, lambda s: s + 0j), z)


# Predictions in half precision


@pytest.mark.parametrize("dtype", ["float64", "longdouble", ">f8"])
def test_wide_features_are_multiplied_as_wide_as_they_are(dtype):
    predictor = dp.DirectPred(1)
    predictor(np.zeros((1, 1), "float32"))
    z = np.full((1, 1), 1e-161, dtype)
    assert predictor(z) == z


UNBOUNDED = [dp.Eq18(normalize=False), dp.DirectCopy(), dp.DirectSet(0.5, 30.0)]


@pytest.mark.parametrize("rule", UNBOUNDED, ids=str)
def test_a_weight_beyond_float16_predicts_what_fits(backend, rng, rule):
    if not hasattr(backend.library, "float16"):
        pytest.skip("the array API standard has no half precision")
    dim = 64
    large = 600 * rng.normal(size=(100, 1)) * np.ones(dim)
    predictor = dp.DirectPred(dim, rule)
    weight = to_numpy(predictor.update(backend.array(large, "float32"))).astype(float)
    small = rng.normal(size=(20, dim))
    small -= 0.999 * small.mean(axis=1, keepdims=True)  # across the large direction
    z = backend.array(small * 1e4 / np.abs(weight).max() / 50, "float32")
    half = dp.array.array_namespace(z).astype(z, backend.library.float16)
    prediction = predictor(half)
    assert prediction.dtype == half.dtype
    exact = to_numpy(half).astype(float) @ weight
    error = np.abs(to_numpy(prediction).astype(float) - exact).max()
    assert error <= 2e-3 * np.abs(exact).max()


@pytest.mark.parametrize("library", ["numpy", "torch", "torch autocast"])
def test_predictions_beyond_float16_are_said(rng, library):
    z = (64 * rng.normal(size=(256, 1)) * np.ones(128)).astype("float16")
    if library != "numpy":
        torch = pytest.importorskip("torch")
        z = torch.from_numpy(z)

    def predict(predictor):
        if library != "torch autocast":
            return predictor(z)
        with torch.autocast("cpu", dtype=torch.float16):
            return predictor(z.float())

    for rule in UNBOUNDED[:2]:
        predictor = dp.DirectPred(128, rule)
        predictor.update(z)
        with pytest.warns(
            RuntimeWarning, match=r"predictions up to \d.*beyond .*float16.*Eq18\(\)"
        ):
            predict(predictor)
    scale_free = dp.DirectPred(128)
    scale_free.update(z)
    assert np.isfinite(to_numpy(scale_free(z))).all()


def test_the_gradient_through_a_weight_beyond_float16(rng):
    torch = pytest.importorskip("torch")
    large = torch.tensor(600 * rng.normal(size=(100, 1)) * np.ones(64), dtype=torch.float32)
    predictor = dp.DirectPred(64, dp.DirectCopy())
    weight = predictor.update(large)
    z = (1e-4 * torch.randn(8, 64)).half().requires_grad_()
    (predictor(z) * 1e-4).sum().backward()
    exact = 1e-4 * weight.double().sum(dim=0)
    error = (z.grad.double() - exact).abs().max() / exact.abs().max()
    assert error <= 2e-3


# What is handed out, and warnings that are errors


def test_what_is_handed_out_may_be_written_to(backend, rng):
    z = backend.array(rng.normal(size=(30, DIM)))
    predictor, untouched = dp.DirectPred(DIM), dp.DirectPred(DIM)

    def handed_out():
        yield predictor.update(z)
        predictor.accumulate(z)
        yield from (predictor.weight, predictor.correlation, predictor.mean)
        yield from predictor.state_dict().values()

    for x in handed_out():
        if backend.module != "jax.numpy" or isinstance(x, np.ndarray):
            x[...] = 7
    untouched.update(z)
    untouched.accumulate(z)
    for name, x in predictor.state_dict().items():
        np.testing.assert_array_equal(to_numpy(x), to_numpy(untouched.state_dict()[name]))


def test_the_features_and_a_loaded_state_may_be_written_to_afterwards(rng):
    z = rng.normal(size=(30, DIM))
    predictor, fresh = dp.DirectPred(DIM), dp.DirectPred(DIM)
    weight = predictor.update(z)
    state = predictor.state_dict()
    fresh.load_state_dict(state)
    z[...] = 0
    for x in state.values():
        x[...] = 0
    np.testing.assert_array_equal(fresh.weight, weight)
    np.testing.assert_array_equal(predictor.weight, weight)


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_warnings_that_are_errors_cost_no_step(rng, library):
    """Here all are: an overflow in what is then skipped is no business of NumPy's."""
    xp = pytest.importorskip(library)
    z = xp.asarray(rng.normal(size=(30, DIM)).astype("float32"))
    predictor = dp.DirectPred(DIM, dp.Eq18(normalize=False), nonfinite="skip", center=True)
    predictor.update(z)
    predictor.accumulate(z)
    for bad in (1e25, np.inf, np.nan):
        predictor.accumulate(z * xp.asarray(np.float32(bad)))
        predictor.step()
    predictor.update(z * xp.asarray(np.float32(1e-30)))
    assert (predictor.step_count, predictor.skipped) == (2, 3)


def test_every_device_of_the_standard_goes_to_numpy(rng):
    xp = pytest.importorskip("array_api_strict")
    z = rng.normal(size=(30, DIM)).astype("float32")
    for device in ("CPU_DEVICE", "device1", "device2"):
        there = xp.asarray(z, device=xp.Device(device))
        np.testing.assert_array_equal(to_numpy(there), z)
        predictor, fresh = dp.DirectPred(DIM), dp.DirectPred(DIM)
        predictor.update(there)
        predictor.accumulate(there)
        fresh.load_state_dict(predictor.state_dict())
        np.testing.assert_array_equal(fresh.weight, to_numpy(predictor.weight))
        assert fresh.state_dict()["accumulated_rows"] == 30


# States


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("accumulated_rows", np.inf, "accumulated_rows must be a number ≥ 0, got inf"),
        ("accumulated_rows", np.nan, "accumulated_rows must be a number ≥ 0, got nan"),
        ("step_count", np.inf, "step_count must hold finite numbers"),
        ("correlation", np.triu(np.ones((DIM, DIM))), "correlation must be symmetric"),
        ("correlation", -np.eye(DIM), "correlation must be symmetric, with a diagonal ≥ 0"),
    ],
)
def test_a_state_that_cannot_be_is_named(rng, name, value, message):
    predictor = dp.DirectPred(DIM)
    predictor.update(rng.normal(size=(30, DIM)))
    predictor.accumulate(rng.normal(size=(30, DIM)))
    state = predictor.state_dict()
    with pytest.raises(ValueError, match=message):
        predictor.load_state_dict(state | {name: np.asarray(value)})
    for key, x in predictor.state_dict().items():
        np.testing.assert_array_equal(x, state[key])


def test_a_correlation_stored_in_half_precision_is_symmetric_enough(rng):
    predictor, fresh = dp.DirectPred(DIM), dp.DirectPred(DIM)
    predictor.update(rng.normal(size=(30, DIM)))
    state = {k: x.astype("float16") if x.ndim else x for k, x in predictor.state_dict().items()}
    fresh.load_state_dict(state)
    np.testing.assert_allclose(fresh.weight, predictor.weight, atol=1e-2)


# Inference mode


@pytest.mark.parametrize("first", [True, False], ids=["inference first", "inference second"])
@pytest.mark.parametrize("how", ["update", "accumulate", "predict", "load"])
def test_inference_mode_and_training_take_turns(rng, how, first):
    torch = pytest.importorskip("torch")
    z = torch.tensor(rng.normal(size=(30, DIM)))
    predictor = dp.DirectPred(DIM, center=True)
    expected = dp.DirectPred(DIM, center=True)

    def call(predictor, z):
        if how == "predict":
            predictor(z)
        if how == "accumulate":
            predictor.accumulate(z)
            predictor.accumulate(z)
            return predictor.step()
        if how == "load":
            predictor(z)
            predictor.load_state_dict(predictor.state_dict())
        return predictor.update(z)

    handed_out = []
    for inference in (first, not first, first):
        with torch.inference_mode(inference):
            handed_out += [call(predictor, z.clone()), predictor.weight, predictor.mean]
        call(expected, z)
    trained = z.clone().requires_grad_()
    predictor(trained).square().sum().backward()
    for x in handed_out:
        (trained @ x).sum().backward()
        x.mul_(0)
    assert torch.equal(predictor.weight, expected.weight)
    with torch.inference_mode():
        made_inside = z.clone()
    predictor.update(made_inside)
    expected.update(z)
    assert torch.equal(predictor(made_inside), expected(z))


# Losses


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", ">f8", "float16"])
def test_losses_of_any_float_of_numpy(rng, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    p, t = (x.astype(getattr(ml_dtypes, dtype, dtype)) for x in rng.normal(size=(2, 30, DIM)))
    wide = [np.asarray(x, float) for x in (p, t)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in wide]
    exact = np.mean(np.sum((unit[0] - unit[1]) ** 2, axis=1))
    np.testing.assert_allclose(float(regression_loss(p, t)), exact, rtol=1e-5)
