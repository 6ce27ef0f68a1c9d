"""Every codebase with a loop of its own: replace the predictor, train, save, go on, undo."""

import copy
import gc
import importlib
import io
import warnings

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import directpred as dp  # noqa: E402
import directpred.torch.replace as mechanics  # noqa: E402
from directpred.torch import DirectPredHead, replace_predictor, restore  # noqa: E402
from peers import PEERS, LightlyBYOL, LightlySimSiam, record, views  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch")


def adapter(peer):
    return importlib.import_module(f"directpred.adapters.{peer.adapter}")


@pytest.fixture(params=PEERS, ids=lambda kind: kind.__name__)
def kind(request):
    if request.param.adapter != "simsiam":  # which is a checkout, not a package
        pytest.importorskip(request.param.adapter)
    return request.param


def swapped(kind, **options):
    peer = kind()
    peer.head = adapter(peer).replace_predictor(peer.model, peer.optimizer, **options)
    peer.batches = record(peer.head)
    return peer


def held(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]}


def test_the_weight_is_that_of_the_features_and_the_loss_falls(kind):
    peer = swapped(kind, rule=dp.BoostScale(eps=0.01), rho=0.5)
    losses = [peer.step() for _ in range(30)]
    assert int(peer.head.step_count) == 30
    assert sum(map(len, peer.batches[0])) == 32  # both views
    expected = oracle.weight(
        peer.batches, 0.5, lambda s: oracle.boost_scale(s, 0.01, 0.5, False, 1e-4)
    )
    np.testing.assert_allclose(peer.head.weight, expected, atol=1e-4)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05


def test_the_learned_predictor_is_gone_from_the_optimizer(kind):
    peer = kind()
    peer.step()  # momenta exist
    learned = list(find_predictor(peer).parameters())
    before = len(held(peer.optimizer))
    assert all(p in peer.optimizer.state for p in learned if p.grad is not None)
    groups = len(peer.optimizer.param_groups)
    adapter(peer).replace_predictor(peer.model, peer.optimizer)
    assert len(held(peer.optimizer)) == before - len(learned)
    assert held(peer.optimizer).isdisjoint(learned)
    assert set(peer.optimizer.state).isdisjoint(learned)
    assert len(peer.optimizer.param_groups) == groups
    assert set(peer.model.parameters()).isdisjoint(learned)
    peer.step()


def find_predictor(peer):
    return peer.model.get_submodule(peer.predictor)


def test_a_run_saved_in_the_middle_continues_identically(kind):
    whole, first, second = swapped(kind), swapped(kind), swapped(kind)
    uninterrupted = [whole.step() for _ in range(6)]
    for _ in range(3):
        first.step()
    file = io.BytesIO()
    torch.save(first.save(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    second.taken = 3
    assert [second.step() for _ in range(3)] == uninterrupted[3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_model_copies_and_loads_strictly(kind):
    peer = swapped(kind)
    peer.step()
    twin = copy.deepcopy(peer.model)
    other = swapped(kind)
    other.model.load_state_dict(peer.model.state_dict())
    for name, value in peer.model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
        assert torch.equal(value, other.model.state_dict()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        kind().model.load_state_dict(peer.model.state_dict())


def test_undo_gives_the_same_run_as_if_nothing_had_been(kind):
    peer, plain = kind(), kind()
    predictor = find_predictor(peer)
    for each in (peer, plain):
        each.step()
    adapter(peer).replace_predictor(peer.model, peer.optimizer, between="train")
    back = adapter(peer).restore(peer.model)
    assert back is predictor is find_predictor(peer)
    assert [peer.step() for _ in range(3)] == [plain.step() for _ in range(3)]
    with pytest.raises(ValueError, match="found 0"):
        adapter(peer).restore(peer.model)


def test_a_trained_weight_takes_the_place_of_the_predictor_in_its_group(kind):
    peer = kind()
    groups = peer.optimizer.param_groups
    (index,) = {
        i for i, group in enumerate(groups) for p in find_predictor(peer).parameters()
        if any(p is q for q in group["params"])
    }  # fmt: skip
    head = adapter(peer).replace_predictor(peer.model, peer.optimizer, between="train", freq=5)
    assert any(p is head.weight for p in groups[index]["params"])
    peer.step()
    assert head.weight.grad is None or head.weight.grad.isfinite().all()
    before = head.weight.detach().clone()
    peer.step()
    assert not torch.equal(head.weight, before)


def test_device_dtype_and_mode_are_the_predictors():
    pytest.importorskip("lightly")
    peer = LightlyBYOL()
    peer.model.double().eval()
    head = adapter(peer).replace_predictor(peer.model, peer.optimizer)
    assert head.weight.dtype == torch.float64
    assert not head.training
    peer = LightlyBYOL()
    peer.model.to(torch.bfloat16)
    assert adapter(peer).replace_predictor(peer.model, peer.optimizer).weight.dtype == torch.float32


def test_accumulated_micro_batches_are_one_step():
    pytest.importorskip("lightly")
    peer = swapped(LightlySimSiam)
    for step in range(2):
        peer.optimizer.zero_grad()
        for part in range(2):
            (peer.loss(*views(2 * step + part)) / 2).backward()
        peer.optimizer.step()
    assert int(peer.head.step_count) == 2
    assert [len(batch) for batch in peer.batches] == [4, 4]
    expected = oracle.weight(peer.batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(peer.head.weight, expected, atol=1e-4)


class Small(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.predictor = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.predictor(self.encoder(x))


def small(**parts):
    model = Small(**parts)
    return model, torch.optim.Adam(model.parameters())


def swap(model, optimizer=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return replace_predictor(model, optimizer, "predictor", **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, o: (nn.Linear(2, 2), o), ValueError, "no predictor found in Linear"),
        (
            lambda m, o: (nn.ModuleDict({"a": m, "b": Small()}), o),
            ValueError,
            "a.predictor .*, b.pr",
        ),
        (lambda m, o: (Small(predictor=nn.Linear(4, 5)), o), ValueError, "width 4 to 5"),
        (lambda m, o: (Small(predictor=nn.Identity()), o), ValueError, "no nn.Linear"),
        (lambda m, o: (Small(predictor=nn.LazyLinear(4)), o), ValueError, "not initialised"),
        (lambda m, o: (Small(predictor=DirectPredHead(4)), o), ValueError, "already"),
        (lambda m, o: (Small(predictor=nn.Linear(4, 4, device="meta")), o), ValueError, "initial"),
        (lambda m, o: ("model", o), TypeError, "got str"),
        (lambda m, o: (m, "sgd"), TypeError, "got str"),
        (lambda m, o: (m, Small()), TypeError, "got Small"),
        (lambda m, o: (m, small()[1]), ValueError, "holds no parameter of Small"),
        (lambda m, o: (m, torch.optim.SGD(m.predictor.parameters())), ValueError, "apart from"),
        (lambda m, o: (m, o, {"rho": 2.0}), ValueError, "rho"),
        (lambda m, o: (m, o, {"unknown": 1}), TypeError, "unknown"),
    ],
)
def test_what_cannot_be_adapted_is_an_error_that_changes_nothing(change, error, message):
    model, optimizer = small()
    optimizer.zero_grad()
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    given = change(model, optimizer)
    before = (str(model), held(optimizer), dict(optimizer.state))
    with pytest.raises(error, match=message):
        swap(given[0], given[1], **(given[2] if len(given) > 2 else {}))
    assert (str(model), held(optimizer), dict(optimizer.state)) == before
    assert not optimizer._optimizer_step_post_hooks


def test_a_weight_that_no_optimizer_would_train_is_an_error():
    model = Small()
    optimizer = torch.optim.SGD(model.encoder.parameters())
    with pytest.raises(ValueError, match="between='train'"):
        swap(model, optimizer, between="train")
    assert isinstance(model.predictor, nn.Sequential)


def test_a_predictor_held_twice_is_replaced_in_both_places():
    model, optimizer = small()
    model.same = nn.ModuleDict({"predictor": model.predictor})
    head = swap(model, optimizer)
    assert model.predictor is model.same["predictor"] is head
    predictor = restore(model)
    assert model.predictor is model.same["predictor"] is predictor


def test_undo_by_the_head_and_only_in_the_process_that_replaced():
    model, optimizer = small()
    predictor = model.predictor
    head = swap(model, optimizer)
    with pytest.raises(ValueError, match="found 0"):
        restore(copy.deepcopy(model))
    assert restore(head) is predictor


def test_undo_after_the_optimizer_was_loaded():
    model, optimizer = small()
    before = list(model.parameters())
    swap(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # with new groups
    restore(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in before]


def test_what_was_replaced_is_forgotten_with_its_head():
    gc.collect()
    model, optimizer = small()
    count = len(mechanics._swaps)
    swap(model, optimizer)
    assert len(mechanics._swaps) == count + 1
    del model, optimizer
    gc.collect()
    assert len(mechanics._swaps) == count


def test_a_compiled_model_takes_the_head():
    model, optimizer = small()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(8, 6)
    compiled(x)
    head = swap(compiled, optimizer)
    out = compiled(x)
    torch.testing.assert_close(out, model.encoder(x))
    out.sum().backward()
    optimizer.step()
    assert int(head.step_count) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_step_with_the_emptied_group(fused, foreach):
    if fused and foreach:
        pytest.skip("torch refuses both at once")
    model = Small()
    groups = [{"params": model.encoder.parameters()}, {"params": model.predictor.parameters()}]
    optimizer = torch.optim.AdamW(groups, fused=fused, foreach=foreach)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    swap(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
