import copy
import gc
import io
import pickle

import numpy as np
import pytest

import directpred as dp
import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

DIM = 4


class Run:
    """A small siamese training run that records the features of every step."""

    def __init__(self, closes="attach", seed=0, lr=0.1, **options):
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, DIM)).double()
        self.head = DirectPredHead(DIM, dtype=torch.float64, **options)
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=lr)
        self.closes = closes
        if closes == "attach":
            self.head.attach(self.optimizer)
        self.batches = []

    def loss(self, rows=16):
        x = torch.randn(rows, 8, dtype=torch.float64)
        z1, z2 = self.encoder(x), self.encoder(x + 0.1 * torch.randn_like(x))
        self.batches.append([z1.detach().numpy(), z2.detach().numpy()])
        self.predictions = self.head(z1), self.head(z2)
        cos = nn.functional.cosine_similarity
        return -(
            cos(self.predictions[0], z2.detach()).mean()
            + cos(self.predictions[1], z1.detach()).mean()
        )

    def step(self, **kwargs):
        self.optimizer.zero_grad()
        self.loss(**kwargs).backward()
        self.optimizer.step()
        if self.closes == "step":
            self.head.step()
        return self

    def expected(self, rule=lambda s: oracle.eq18(s, 0.1), rho=0.3):
        return oracle.weight(self.batches, rho, rule)


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_weight_equals_the_oracle_however_the_step_is_closed(closes):
    run = Run(closes)
    for steps in range(1, 6):
        run.step(rows=10 + steps)
        np.testing.assert_allclose(run.head.weight, run.expected(), atol=1e-10)
        assert int(run.head.step_count) == steps


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_a_step_is_applied_with_the_weight_of_the_step_before(closes):
    run = Run(closes)
    weight = np.eye(DIM)
    for _ in range(4):
        run.step()
        for view, prediction in zip(run.batches[-1], run.predictions, strict=True):
            np.testing.assert_allclose(prediction.detach(), view @ weight, atol=1e-10)
        weight = run.expected()


def test_head_equals_directpred(rng):
    options = {"rule": dp.BoostScale(), "rho": 0.5, "freq": 2, "center": True}
    head, predictor = DirectPredHead(DIM, **options), dp.DirectPred(DIM, **options)
    for _ in range(5):
        z1, z2 = torch.randn(2, 9, DIM)
        head.gather(z1), head.gather(z2)
        head.step()
        predictor.update(z1, z2)
        torch.testing.assert_close(head.weight, predictor.weight, rtol=0, atol=0)
        torch.testing.assert_close(head.mean, predictor.mean, rtol=0, atol=0)


def test_hold_has_no_parameters_and_lets_the_gradient_through():
    head = DirectPredHead(DIM)
    assert not list(head.parameters())
    head.gather(torch.randn(6, DIM))
    head.step()
    z = torch.randn(6, DIM, requires_grad=True)
    g = torch.randn(6, DIM)
    head(z).backward(g)
    torch.testing.assert_close(z.grad, g @ head.weight.T)
    assert not head.weight.requires_grad
    assert not head.correlation.requires_grad


def test_statistics_carry_no_gradient():
    head = DirectPredHead(DIM)
    z = torch.randn(6, DIM, requires_grad=True)
    head.gather(z)
    head.step()
    assert not head.weight.requires_grad
    assert z.grad is None


def test_train_moves_the_weight_between_settings():
    run = Run(freq=3, between="train", lr=0.5)
    assert [name for name, _ in run.head.named_parameters()] == ["weight"]
    for step in range(7):
        before = run.head.weight.detach().clone()
        run.step()
        moved = not torch.equal(before, run.head.weight)
        set_now = np.allclose(run.head.weight.detach(), run.expected(), atol=1e-10)
        assert moved
        assert set_now is (step % 3 == 0), step


def test_hold_keeps_the_weight_between_settings():
    run = Run(freq=3)
    for step in range(7):
        before = run.head.weight.clone()
        run.step()
        assert torch.equal(before, run.head.weight) is (step % 3 != 0)


def test_evaluation_gathers_nothing():
    head = DirectPredHead(DIM).eval()
    z = torch.randn(6, DIM, requires_grad=True)
    torch.testing.assert_close(head(z), z)
    head(z).sum().backward()
    head(z)
    head.step()
    assert int(head.step_count) == 0
    torch.testing.assert_close(head.correlation, torch.zeros(DIM, DIM))
    head.train()(z).sum().backward()
    head.step()
    assert int(head.step_count) == 1


def test_step_without_features_does_nothing():
    head = DirectPredHead(DIM)
    head.step()
    assert int(head.step_count) == 0
    assert int(head.skipped) == 0


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_micro_batches_are_one_step(closes):
    run = Run(closes)
    for _ in range(4):
        run.optimizer.zero_grad()
        micro = []
        for rows in (5, 9, 2):
            run.loss(rows).backward()
            micro += run.batches.pop()
        run.batches.append(micro)
        run.optimizer.step()
        if closes == "step":
            run.head.step()
    np.testing.assert_allclose(run.head.weight, run.expected(), atol=1e-10)
    assert int(run.head.step_count) == 4


def test_attach_replaces_and_detach_undoes():
    head = DirectPredHead(DIM)
    one, two = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    head.attach(one)
    head.attach(one)
    head.attach(two)
    head.gather(torch.randn(3, DIM))
    one.step()
    assert int(head.step_count) == 0
    two.step()
    assert int(head.step_count) == 1
    head.detach()
    head.detach()
    z = torch.randn(3, DIM, requires_grad=True)
    head(z).sum().backward()
    two.step()
    assert int(head.step_count) == 1
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, .* got str"):
        head.attach("optimizer")


def test_an_optimizer_does_not_keep_the_head_alive():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    head = DirectPredHead(DIM)
    head.attach(optimizer)
    del head
    gc.collect()
    optimizer.step()


def test_a_head_whose_optimizer_is_gone_finds_the_next():
    run = Run("attach")
    run.step()
    run.optimizer = torch.optim.SGD(run.encoder.parameters(), lr=0.1)
    gc.collect()
    run.step().step()
    np.testing.assert_allclose(run.head.weight, run.expected(), atol=1e-10)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_no_step_and_its_rows_wait(fused):
    encoder = nn.Linear(8, DIM)
    head = DirectPredHead(DIM)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, fused=fused)
    head.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    batches, waiting = [], []
    for step in range(5):
        optimizer.zero_grad()
        z = encoder(torch.randn(16, 8))
        overflow = step in (0, 2)
        waiting = [] if fused else waiting  # what an optimizer has not stepped joins the next step
        waiting = [*waiting, z.detach().numpy()]
        if not overflow:
            batches.append(waiting)
            waiting = []
        loss = head(z).square().mean() * (float("inf") if overflow else 1.0)
        before = copy.deepcopy(head.state_dict())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow and fused:
            after = head.state_dict()
            assert int(after.pop("closings")) == int(before["closings"]) + 1
            assert all(torch.equal(before[k], v) for k, v in after.items())
    assert int(head.step_count) == 3
    assert int(head.skipped) == 0
    exact = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, exact, atol=1e-5)


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_features_that_are_not_finite_are_skipped(closes):
    run = Run(closes)
    run.step()
    good = {k: v.clone() for k, v in run.head.state_dict().items() if "accumul" not in k}
    run.loss()
    bad = torch.full((2, DIM), float("nan"), dtype=torch.float64, requires_grad=True)
    run.head(bad).sum().backward()
    if closes == "step":
        run.head.step()
    else:
        run.optimizer.step()
    got = {k: v for k, v in run.head.state_dict().items() if "accumul" not in k}
    assert int(got.pop("skipped")) == 1
    assert int(got.pop("closings")) == 2
    good.pop("skipped"), good.pop("closings")
    for name, value in got.items():
        assert torch.equal(value, good[name]), name


def test_raise_refuses_features_in_the_forward_pass():
    head = DirectPredHead(DIM, nonfinite="raise")
    head.gather(torch.randn(3, DIM))
    head.step()  # by hand, from here on
    head.gather(torch.randn(3, DIM))
    before = {k: v.clone() for k, v in head.state_dict().items()}
    z = torch.randn(3, DIM)
    z[1, 2] = float("inf")
    z.requires_grad_()
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 rows"):
        head(z)
    assert all(torch.equal(before[k], v) for k, v in head.state_dict().items())
    head.step()
    assert int(head.step_count) == 2


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        (np.ones((2, DIM)), TypeError, "must be a torch.Tensor, got ndarray"),
        (torch.ones(2, DIM, dtype=torch.int64), TypeError, "real floating, got torch.int64"),
        (torch.ones(2, 3), ValueError, r"shape \(n, 4\), got \(2, 3\)"),
        (torch.ones(DIM - 1), ValueError, r"shape \(n, 4\), got \("),
        (torch.ones(0, 3), ValueError, r"shape \(n, 4\), got \(0, 3\)"),
        (torch.ones(2, DIM, device="meta"), ValueError, "features on cpu, got some on meta"),
    ],
)
def test_bad_features_are_named(z, error, message):
    for head in (DirectPredHead(DIM), DirectPredHead(DIM).eval()):
        with pytest.raises(error, match=message):
            head(z)
        head.step()
        assert int(head.step_count) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"between": "drift"}, "between must be 'hold' or 'train', got 'drift'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"rho": 2}, "rho must be in"),
        ({"freq": 0}, "freq must be"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DirectPredHead(DIM, **options)


def test_half_precision_and_autocast_keep_float32_statistics(rng):
    wide = torch.from_numpy(rng.normal(size=(64, DIM))).half()
    exact = oracle.weight([[wide.numpy()]], 0.3, lambda s: oracle.eq18(s, 0.1))
    head = DirectPredHead(DIM)
    assert head(wide).dtype == torch.float16
    head.gather(wide)
    head.step()
    np.testing.assert_allclose(head.weight, exact, atol=1e-5)
    head = DirectPredHead(DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(wide.float()).dtype == torch.bfloat16
        head.gather(wide.float())
        head.step()
    np.testing.assert_allclose(head.weight, exact, atol=1e-5)


def test_to_moves_dtype_but_never_below_float32():
    head = DirectPredHead(DIM)
    head.gather(torch.randn(9, DIM))
    before = head.state_dict()
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.float):
        convert(head)
        for name, value in head.state_dict().items():
            assert torch.equal(value, before[name]), name
    head.double()
    assert head.weight.dtype == head.correlation.dtype == torch.float64
    assert head.step_count.dtype == torch.int64
    head.gather(torch.randn(9, DIM).double())
    head.step()
    assert head.half().weight.dtype == torch.float64
    assert DirectPredHead(DIM, device="meta").weight.device.type == "meta"


@pytest.mark.parametrize("between", ["hold", "train"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_state_dict_roundtrip_continues_identically(between, accumulated):
    one, two = (Run(freq=2, between=between, seed=s) for s in (0, 1))
    one.step().step()
    one.optimizer.zero_grad()
    if accumulated:
        one.loss().backward()
    file = io.BytesIO()
    torch.save({"encoder": one.encoder.state_dict(), "head": one.head.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    two.encoder.load_state_dict(saved["encoder"])
    assert str(two.head.load_state_dict(saved["head"])) == "<All keys matched successfully>"
    if accumulated:
        for theirs, ours in zip(one.encoder.parameters(), two.encoder.parameters(), strict=True):
            ours.grad = theirs.grad.clone()
    for run in (one, two):
        torch.manual_seed(7)
        run.loss().backward()
        run.optimizer.step()
        run.step()
    assert int(two.head.step_count) == 4
    for name, value in two.head.state_dict().items():
        assert torch.equal(value, one.head.state_dict()[name]), name


def test_state_goes_to_directpred_and_back(rng):
    head, predictor = DirectPredHead(DIM), dp.DirectPred(DIM)
    head.gather(torch.randn(9, DIM))
    head.step()
    predictor.load_state_dict(head.state_dict())
    z = rng.normal(size=(7, DIM)).astype(np.float32)
    predictor.update(z)
    head.gather(torch.from_numpy(z))
    head.step()
    np.testing.assert_allclose(head.weight, predictor.weight, atol=1e-6)
    other = DirectPredHead(DIM)
    other.load_state_dict({k: torch.as_tensor(v) for k, v in predictor.state_dict().items()})
    np.testing.assert_array_equal(other.weight, predictor.weight)


@pytest.mark.filterwarnings("ignore:.*holds bias, weight")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: DirectPredHead(5).state_dict(), r"correlation must be of shape \(4, 4\)"),
        (lambda s: s | {"version": torch.tensor(4)}, "version 1 to 3, got"),
        (lambda s: {k: v for k, v in s.items() if k != "mean"}, 'Missing key.*"mean"'),
        (lambda s: s | {"bias": torch.zeros(4)}, 'Unexpected key.*"bias"'),
        (lambda s: nn.Linear(DIM, DIM).state_dict(), "Missing key"),
    ],
)
def test_a_wrong_state_is_named_and_changes_nothing(spoil, message):
    head = DirectPredHead(DIM)
    head.gather(torch.randn(9, DIM))
    head.step()
    head.gather(torch.randn(9, DIM))
    before = {k: v.clone() for k, v in head.state_dict().items()}
    doubled = {k: v * 2 for k, v in before.items()} | {"version": torch.tensor(3)}
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(spoil(doubled))
    assert all(torch.equal(before[k], v) for k, v in head.state_dict().items())


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_from_before_version_3_loads(version):
    head, other = DirectPredHead(DIM, freq=3), DirectPredHead(DIM, freq=3)
    for _ in range(5):
        head.gather(torch.randn(9, DIM))
        head.step()
    old = {k: v for k, v in head.state_dict().items() if k != "closings"}
    assert not any(other.load_state_dict(old | {"version": torch.tensor(version)}))
    for name, value in head.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_wrong_state_inside_a_model_is_named_with_its_place():
    model = nn.ModuleDict({"predictor": DirectPredHead(DIM)})
    with pytest.raises(RuntimeError, match="predictor: correlation must be of shape"):
        model.load_state_dict(nn.ModuleDict({"predictor": DirectPredHead(5)}).state_dict())


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
def test_copies_and_pickles_are_independent_and_not_attached(closes):
    run = Run(closes)
    run.step()
    for other in (copy.deepcopy(run.head), pickle.loads(pickle.dumps(run.head))):
        before = run.head.state_dict()["correlation"].clone()
        other.gather(torch.randn(9, DIM).double())
        other.step()
        run.optimizer.step()
        assert torch.equal(before, run.head.correlation)
        assert int(other.step_count) >= 1


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize("freq", [1, 2])
def test_compiled_forward_and_step_equal_eager(solver, freq):
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = nn.Sequential(nn.Linear(8, DIM), DirectPredHead(DIM, solver=solver, freq=freq))
    compiled = copy.deepcopy(eager)
    options = {"fullgraph": True, "backend": "aot_eager"}
    forward, step = torch.compile(compiled, **options), torch.compile(compiled[1].step, **options)
    for number in range(4):
        x = torch.randn(16, 8)
        x[0, 0] = float("nan") if number == 1 else x[0, 0]
        for model, close in ((eager, eager[1].step), (forward, step)):
            model(x).sum().backward()
            close()
        torch.testing.assert_close(compiled[1].weight, eager[1].weight)
    assert int(compiled[1].step_count) == 3
    assert int(compiled[1].skipped) == 1


def test_products_are_float32_whatever_the_user_allows(rng):
    """On a GPU "high" is TF32, on some CPUs "medium" is bfloat16."""
    z = torch.from_numpy(rng.normal(size=(512, 64)).astype(np.float32))
    exact = oracle.weight([[z.numpy()]], 0.3, lambda s: oracle.eq18(s, 0.1))
    before = torch.get_float32_matmul_precision()
    for allowed in ("medium", "high", "highest"):
        torch.set_float32_matmul_precision(allowed)
        try:
            head = DirectPredHead(64)
            head.gather(z)
            head.step()
            assert torch.get_float32_matmul_precision() == allowed
        finally:
            torch.set_float32_matmul_precision(before)
        np.testing.assert_allclose(head.weight, exact, atol=1e-5)


def test_repr_tells_the_options():
    text = repr(DirectPredHead(DIM, rho=0.5, between="train"))
    assert text.startswith(
        "DirectPredHead(4, between='train', rule=Eq18(eps=0.1, normalize=True), rho=0.5"
    )
