"""Recorded closings give bit for bit what closings give that run as they are."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest

import directpred as dp

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import directpred.predictor  # noqa: E402
import directpred.solvers  # noqa: E402
import directpred.torch.head  # noqa: E402
import tape  # noqa: E402
from directpred.correlation import Moments, moments  # noqa: E402
from directpred.method import Options, advance  # noqa: E402
from directpred.recorded import Recorder, written  # noqa: E402
from directpred.state import State  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402

DIM = 16
STATE = State._fields


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Nothing may be read, and what is recorded is a tape."""
    for module in (directpred.predictor, directpred.solvers, directpred.torch.head):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    monkeypatch.setattr(directpred.torch.head, "record", tape.record)
    monkeypatch.setattr(directpred.predictor, "recorder_for", lambda x: Recorder(tape.record))


def pair(**options):
    """A head that records, and one that does not."""
    return DirectPredHead(DIM, **options), DirectPredHead(DIM, graphs=False, **options)


def rows(n, dtype=torch.float32):
    return (torch.randn(n, DIM) * torch.arange(1, DIM + 1) ** -0.5).to(dtype)


def run(heads, batches):
    for views in batches:
        for head in heads:
            for z in views:
                head.gather(z)
            head.step()


def recordings(head):
    return len(head._recorder._replays)


def assert_same(a, b):
    for name in STATE:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


RULES = [
    *(dp.Eq18(), dp.Eq18(0.0), dp.Eq18(normalize=False), dp.DirectSet(), dp.DirectSet(1.0)),
    *(dp.DirectCopy(), dp.BoostScale(), dp.BoostScale(eps=-0.1)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_rules_and_options_with_varying_rows(rule, freq, center, rho):
    recorded, eager = pair(rule=rule, freq=freq, center=center, rho=rho)
    torch.manual_seed(0)
    sizes = (64, 64, 32, 64, 7, 100, 64, 1, 2, 64, 64)
    run((recorded, eager), [[rows(n), rows(n + 3)] for n in sizes])
    assert recordings(recorded) == (1 if freq == 1 else 2)
    assert recordings(eager) == 0
    assert_same(recorded, eager)


@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("bad", [(0,), (0, 1, 2, 3), (4, 6), (5,)])
def test_steps_that_are_not_finite_are_skipped_and_counted(freq, bad):
    recorded, eager = pair(freq=freq)
    torch.manual_seed(0)
    batches = [[rows(32)] for _ in range(9)]
    for number, step in enumerate(bad):
        batches[step][0][3] = float("nan") if number % 2 == 0 else 1e25
    run((recorded, eager), batches)
    assert int(recorded.skipped) == len(bad)
    assert int(recorded.step_count) == 9 - len(bad)
    assert int(recorded.closings) == 9
    assert_same(recorded, eager)


@pytest.mark.parametrize("freq", [1, 2])
def test_steps_that_a_fused_optimizer_has_skipped(freq):
    recorded, eager = pair(freq=freq)
    torch.manual_seed(0)
    for step in range(9):
        z = rows(32)
        skipped = None if step == 6 else torch.tensor(step in (3, 5))
        for head in (recorded, eager):
            head.gather(z)
            head._close(head._watch.gathered, skipped)
    assert int(recorded.step_count) == 7
    assert int(recorded.skipped) == 0
    assert_same(recorded, eager)


def test_ranks_without_rows():
    recorded, eager = pair()
    torch.manual_seed(0)
    for step in range(9):
        batch = moments(rows(32), torch.float32)
        none = step in (0, 4, 8)
        parts = (torch.zeros_like(x) if none else x for x in batch[:2])
        batch = Moments(*parts, torch.tensor(0.0 if none else 32.0))
        for head in (recorded, eager):
            head._close(batch, None)
    assert int(recorded.step_count) == 6
    assert int(recorded.skipped) == 0
    assert_same(recorded, eager)


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
@pytest.mark.parametrize("rule", [dp.Eq18(), dp.DirectCopy()], ids=str)
@pytest.mark.parametrize("freq", [1, 2])
def test_a_closing_without_rows_sets_the_weight_that_is_due_from_what_there_is(rule, solver, freq):
    on_device, host = pair(rule=rule, solver=solver, freq=freq)
    torch.manual_seed(0)
    for step in range(8):
        batch = moments(rows(32), torch.float32)
        none = step in (2, 3, 6)
        parts = (torch.zeros_like(x) if none else x for x in batch[:2])
        batch = Moments(*parts, torch.tensor(0.0 if none else 32.0))
        on_device._close(batch, None)
        numbers = {n: int(getattr(host, n)) for n in STATE[3:]}
        state = host._state()._replace(**numbers)
        after = advance(state, batch, host.options, True, not none)
        for name, value in after._asdict().items():
            getattr(host, name).copy_(torch.as_tensor(value))
        torch.testing.assert_close(on_device.weight, host.weight, atol=1e-5, rtol=1e-5)
    assert int(on_device.step_count) == int(host.step_count) == 5


def test_large_features_of_many_rows_enter():
    recorded, eager = pair()
    torch.manual_seed(0)
    for _ in range(5):
        z = 1e18 * torch.randn(4096, DIM)
        for head in (recorded, eager):
            head.gather(z)
            head.step()
    assert int(recorded.step_count) == 5
    assert_same(recorded, eager)


def test_a_rule_whose_setting_changes_is_recorded_anew():
    class Own:
        eps = 0.1
        matrix_power = 0.5
        normalize = True

        def __call__(self, s):
            return (s / s[-1]).sqrt() + self.eps

        def matrix(self, powered, largest, eye):
            return powered + self.eps * eye

    recorded, eager = pair(rule=Own())
    torch.manual_seed(0)
    for eps in (0.1, 0.5):
        recorded.options.rule.eps = eps
        run((recorded, eager), [[rows(32)] for _ in range(5)])
        assert_same(recorded, eager)
    assert recordings(recorded) == 1


def test_a_loaded_state_is_used_by_the_same_recording():
    recorded, eager = pair(freq=2)
    torch.manual_seed(0)
    run((recorded, eager), [[rows(32)] for _ in range(5)])
    state = copy.deepcopy(eager.state_dict())
    replays = recorded._recorder._replays
    run((recorded, eager), [[rows(32)] for _ in range(3)])
    for head in (recorded, eager):
        head.load_state_dict(state)
    run((recorded, eager), [[rows(32)] for _ in range(4)])
    assert recorded._recorder._replays is replays
    assert len(replays) == 2
    assert_same(recorded, eager)


def test_a_state_elsewhere_is_recorded_anew():
    recorded, eager = pair()
    torch.manual_seed(0)
    run((recorded, eager), [[rows(32)] for _ in range(5)])
    replays = recorded._recorder._replays
    for head in (recorded, eager):
        head.double()
    run((recorded, eager), [[rows(32, torch.float64)] for _ in range(5)])
    assert recorded._recorder._replays is not replays
    assert recorded.weight.dtype == torch.float64
    assert_same(recorded, eager)
    old = recorded.weight
    kept = old.clone()
    for head in (recorded, eager):
        head.weight = head.weight.clone()
    run((recorded, eager), [[rows(32, torch.float64)] for _ in range(5)])
    assert torch.equal(old, kept)
    assert_same(recorded, eager)


def test_copies_record_their_own():
    recorded, eager = pair()
    torch.manual_seed(0)
    run((recorded, eager), [[rows(32)] for _ in range(5)])
    torch.save(recorded, io.BytesIO())
    copies = copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))
    assert [recordings(each) for each in copies] == [0, 0]
    before = copy.deepcopy(recorded.state_dict())
    run((recorded, eager), [[rows(32)] for _ in range(5)])
    for each in copies:
        for name in STATE:
            assert torch.equal(getattr(each, name), before[name])
    run(copies, [[rows(32)] for _ in range(5)])
    assert_same(*copies)
    assert_same(recorded, eager)


def test_functional_call_with_another_state():
    recorded, eager = pair()
    torch.manual_seed(0)
    run((recorded, eager), [[rows(32)] for _ in range(5)])
    z, zero = rows(32), {k: torch.zeros_like(v) for k, v in recorded.named_buffers()}
    for head in (recorded, eager):
        assert not torch.func.functional_call(head, zero, (z,)).any()
        head.gather(z)
        head.step()
    assert_same(recorded, eager)


def test_a_backward_through_a_replaced_weight_raises():
    recorded, _ = pair()
    torch.manual_seed(0)
    run((recorded,), [[rows(32)] for _ in range(5)])
    loss = recorded(rows(32).requires_grad_()).square().sum()
    recorded.gather(rows(32))
    recorded.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("between", ["hold", "train"])
@pytest.mark.parametrize("freq", [1, 3])
def test_attached_to_an_optimizer(between, freq):
    heads = []
    for graphs in (True, False):
        torch.manual_seed(0)
        encoder = nn.Linear(8, DIM)
        head = DirectPredHead(DIM, between=between, freq=freq, graphs=graphs)
        optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
        head.attach(optimizer)
        for _ in range(12):
            views = torch.randn(2, 32, 8)
            optimizer.zero_grad()
            sum(head(encoder(view)).square().mean() for view in views).backward()
            optimizer.step()
        heads.append(head)
    assert int(heads[0].step_count) == 12
    assert_same(*heads)


def test_raise_raises_and_changes_nothing():
    recorded, eager = pair(nonfinite="raise")
    torch.manual_seed(0)
    for step in range(8):
        z = rows(32) * (1e17 if step in (1, 5) else 1)
        for head in (recorded, eager):
            before = copy.deepcopy(head.state_dict())
            head.gather(z)
            if step not in (1, 5):
                head.step()
                continue
            gathered = head._watch.gathered
            head._watch.gathered = gathered._replace(outer=gathered.outer * 1e30)
            with pytest.raises(ValueError, match="not finite, or their correlation overflows"):
                head.step()
            assert all(torch.equal(before[name], x) for name, x in head.state_dict().items())
    assert int(recorded.closings) == int(recorded.step_count) == 6
    assert_same(recorded, eager)


def test_a_weight_that_raises_leaves_the_weight_of_before():
    recorded, _ = pair(rule=dp.DirectSet(1.0), freq=2, nonfinite="raise")
    torch.manual_seed(0)
    run((recorded,), [[rows(32)] for _ in range(6)])
    before = copy.deepcopy(recorded.state_dict())
    recorded._watch.gathered = moments(torch.full((32, DIM), 1.3e19), torch.float32)
    with pytest.raises(ValueError, match="not finite"):
        recorded.step()
    assert all(torch.equal(before[name], x) for name, x in recorded.state_dict().items())


def test_a_recording_that_fails_warns_once_and_training_goes_on(monkeypatch):
    def fails(run, like):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(directpred.torch.head, "record", fails)
    recorded, eager = pair(freq=2)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="closed without a recording.*out of memory") as caught:
        run((recorded, eager), [[rows(32)] for _ in range(8)])
    assert len(caught) == 1
    assert_same(recorded, eager)


@pytest.mark.parametrize("off", ["environment", "eigh", "own rule"])
def test_what_is_not_recorded(monkeypatch, off):
    options = {"eigh": {"solver": "eigh"}, "own rule": {"rule": torch.sqrt}}.get(off, {})
    head = DirectPredHead(DIM, **options)
    if off == "environment":
        monkeypatch.setenv("DIRECTPRED_GRAPHS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run((head,), [[rows(32)] for _ in range(5)])
    assert recordings(head) == 0
    assert int(head.step_count) == 5


@pytest.mark.parametrize("freq", [1, 5])
def test_a_closing_computes_a_weight_only_when_it_is_due(freq):
    head = DirectPredHead(DIM, freq=freq)
    torch.manual_seed(0)
    run((head,), [[rows(32)] for _ in range(8)])
    products = {
        solves: sum("mm" in name for name in replay.tape.names())
        for solves, replay in head._recorder._replays.items()
    }
    assert products[True] > 20
    assert products.get(False, 0) == 0
    assert set(products) == ({True} if freq == 1 else {True, False})


# ---- The object for any array library.


def test_directpred_replays_and_what_it_hands_out_stays():
    torch.manual_seed(0)
    options = {"freq": 2, "nonfinite": "skip"}
    recorded, eager = dp.DirectPred(DIM, **options), dp.DirectPred(DIM, **options)
    eager._recorder = Recorder(None)
    kept = []
    for step in range(9):
        z = rows(30 + step)
        z[0, 0] = float("nan") if step in (0, 5) else 1.0
        got, expected = recorded.update(z), eager.update(z)
        assert torch.equal(got, expected)
        assert torch.equal(recorded(z[1:]), z[1:] @ expected)
        handed = got, recorded.weight, recorded.correlation, recorded.mean
        kept.append([(x, x.clone()) for x in handed])
    assert all(torch.equal(x, before) for each in kept for x, before in each)
    assert len(recorded._recorder._replays) == 2
    assert (recorded.step_count, recorded.skipped) == (7, 2)
    for name, x in recorded.state_dict().items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(eager.state_dict()[name])), name


def test_copies_of_directpred_go_on_by_themselves():
    torch.manual_seed(0)
    predictor = dp.DirectPred(DIM)
    for _ in range(5):
        predictor.update(rows(32))
    z, before = rows(32), predictor.weight
    copies = copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))
    weights = [[each.update(z).clone() for _ in range(5)][-1] for each in copies]
    assert torch.equal(predictor.weight, before)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_directpred_that_raises_is_as_it_was():
    torch.manual_seed(0)
    predictor = dp.DirectPred(DIM)
    for _ in range(5):
        predictor.update(rows(32))
    before = predictor.state_dict()
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 32 rows"):
        predictor.update(rows(32).index_fill(0, torch.tensor([3]), float("nan")))
    after = predictor.state_dict()
    assert all((torch.as_tensor(after[k]) == torch.as_tensor(x)).all() for k, x in before.items())


# ---- Kernels: what a graph holds, so that it cannot creep back.


def test_the_number_of_kernels():
    dim = 256
    options = Options(dp.Eq18(), rho=0.3, freq=1, center=False, solver="matmul", nonfinite="skip")
    zero = torch.zeros((), dtype=torch.int64)
    counts = (zero.clone() for _ in range(3))
    state = State(torch.zeros(dim, dim), torch.zeros(dim), torch.eye(dim), *counts)
    batch = moments(torch.randn(512, dim), torch.float32)._replace(rows=torch.tensor(512.0))
    counted, closing = torch.tensor(True), tape.Tape()
    with closing:
        written(state, advance(state, batch, options, False, counted, True))
    names = closing.names()
    assert len(names) <= 105
    assert sum("mm" in name for name in names) <= 27

    # The norm is on a branch of its own.
    from directpred.matrix import largest_eigenvalue, powers

    parts, branch = powers(state.correlation, torch.eye(dim)), tape.Tape()
    with branch:
        largest_eigenvalue(parts)
    assert len(names) - len(branch.names()) <= 80


@pytest.mark.parametrize("freq", [1, 2])
def test_a_warning_that_is_an_error_costs_no_step(monkeypatch, freq):
    """It is issued once the step is done, and not in place of it."""

    def fails(run, like):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(directpred.predictor, "recorder_for", lambda x: Recorder(fails))
    recorded, eager = dp.DirectPred(DIM, freq=freq), dp.DirectPred(DIM, freq=freq)
    torch.manual_seed(0)
    eager._recorder = Recorder(None)
    raised = []
    for _ in range(6):
        z = rows(32)
        eager.update(z)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                recorded.update(z)
            except UserWarning as warning:
                raised.append(str(warning))
    assert ["closed without a recording" in message for message in raised] == [True]
    for name, x in eager.state_dict().items():
        np.testing.assert_array_equal(x, recorded.state_dict()[name], err_msg=name)
