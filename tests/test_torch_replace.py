"""`replace_predictor` on any model: where it looks, what it says, and that it is all or nothing."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import directpred.torch.replace as mechanics  # noqa: E402
from directpred.torch import DirectPredHead, replace_predictor, restore  # noqa: E402
from directpred.torch.wrappers import unwrapped  # noqa: E402

DIM = 4
SIDES = [("online", "target"), ("student", "teacher"), ("net", "ema_net")]


def mlp(dim=DIM, hidden=9, out=None, **options):
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim if out is None else out)
    )


class Online(nn.Module):
    """A model of its own, with a predictor under any name."""

    def __init__(self, name="predictor", predictor=None, **parts):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.projector = nn.Linear(8, DIM)
        setattr(self, name, mlp() if predictor is None else predictor)
        for part, module in parts.items():
            setattr(self, part, module)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(self.projector(self.encoder(x)))


class Siamese(nn.Module):
    """BYOL whose target is a copy of all of the online network, the predictor too."""

    def __init__(self, frozen=True, sides=("online", "target")):
        super().__init__()
        self.sides = sides
        setattr(self, sides[0], Online())
        setattr(self, sides[1], copy.deepcopy(getattr(self, sides[0])).requires_grad_(not frozen))

    def forward(self, x):
        online, target = (getattr(self, side) for side in self.sides)
        with torch.no_grad():
            aim = target.projector(target.encoder(x))
        return -nn.functional.cosine_similarity(online(x), aim).mean()

    @torch.no_grad()
    def follow(self, m=0.5):
        online, target = (getattr(self, side) for side in self.sides)
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            q.mul_(m).add_(p, alpha=1 - m)


@pytest.fixture(autouse=True)
def silent():
    """Every warning is an error where a test does not ask for it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def trains(model, optimizer, head, steps=3):
    """Train by hand; whether the weight then is that of the oracle."""
    batches = []
    handle = head.register_forward_pre_hook(
        lambda _, args: batches.append([args[0].detach().double().numpy()])
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(12, 6)).square().sum().backward()
        optimizer.step()
    handle.remove()
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    # The root of an eigenvalue is as exact as the root of the rounding error.
    return np.abs(head.weight.numpy() - expected).max() < 1e-3


def held(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]}


# Where it looks.


@pytest.mark.parametrize(
    "name",
    [
        *("predictor", "prediction_head", "online_predictor", "student_predictor", "pred", "h"),
        *("q_network", "prediction_mlp", "predict_head", "byol_predictor", "predictor_head"),
        *("Predictor", "final_classifier", "global_final_classifier", "pred_head"),
    ],
)
def test_a_predictor_is_found_under_the_names_that_codebases_give_it(name):
    model = Online(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    head = replace_predictor(model, optimizer)
    assert getattr(model, name) is head
    np.testing.assert_allclose(head.weight, np.eye(DIM))
    assert trains(model, optimizer, head)


def test_a_name_may_be_an_attribute_or_a_path():
    for name in ("predictor", "a.predictor"):
        model = nn.ModuleDict({"a": Online(), "b": nn.Linear(2, 2)})
        assert replace_predictor(model, name=name) is model["a"].predictor
    model = nn.ModuleDict({"a": Online(), "b": Online()})
    assert replace_predictor(model, name="b.predictor") is model["b"].predictor
    assert not isinstance(model["a"].predictor, DirectPredHead)
    model = Online(aux=Online())
    assert replace_predictor(model, name="predictor") is model.predictor  # the path itself
    assert not isinstance(model.aux.predictor, DirectPredHead)
    model = nn.Sequential(nn.Linear(6, DIM), mlp())
    assert replace_predictor(model, name="1") is model[1]
    model = nn.Module()
    model.predictors = nn.ModuleList([mlp(), mlp()])
    assert replace_predictor(model, name="predictors.1") is model.predictors[1]


@pytest.mark.parametrize("name", [None, "predictor", "parts.2"])
def test_a_predictor_with_several_names_goes_by_any_of_them(name):
    model = Online()
    learned = model.predictor
    del model.predictor
    model.parts = nn.ModuleList([model.encoder, model.projector, learned])  # this comes first
    model.predictor = learned
    head = replace_predictor(model, name=name)
    assert model.predictor is model.parts[2] is head
    assert restore(model) is learned is model.parts[2] is model.predictor


def test_parameters_that_the_rest_of_the_model_shares_stay_in_the_optimizer():
    model = Online()
    model.predictor[2].weight = nn.Parameter(torch.randn(DIM, 9))
    model.decoder = nn.Linear(9, DIM)
    model.decoder.weight = model.predictor[2].weight
    model.again = nn.ModuleList([model.predictor[0]])  # a whole layer of it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_predictor(model, optimizer)
    assert held(optimizer) == set(model.parameters())
    assert model.decoder.weight in held(optimizer)
    assert model.again[0].weight in held(optimizer)
    restore(model)
    assert held(optimizer) == set(model.parameters())


def test_a_name_inside_of_a_predictor_is_no_second_one():
    model = Online()
    model.predictor = nn.Module()
    model.predictor.pred = mlp()
    assert replace_predictor(model) is model.predictor


def test_what_is_called_so_but_maps_features_to_something_else_is_left():
    blocks = nn.ModuleList([nn.Linear(8, 8)])  # transformers call their layers h
    model = Online(q_network=nn.Linear(8, 3), h=blocks)
    assert replace_predictor(model) is model.predictor
    assert model.h is blocks


def test_none_or_several_are_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"no predictor found in Sequential.*head.*it h"):
        replace_predictor(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"2 predictors found .*predictor \(S.*, pred \(L"):
        replace_predictor(Online(pred=nn.Linear(DIM, DIM)))
    with pytest.raises(ValueError, match=r"name=.a\.predictor."):
        replace_predictor(nn.ModuleDict({"a": Online(), "b": Online()}), name="predictor")
    with pytest.raises(ValueError, match="an attribute `head`"):
        replace_predictor(Online(), name="head")
    model = Online()
    replace_predictor(model)
    with pytest.raises(ValueError, match="already; restore"):
        replace_predictor(model)


# What a predictor tells.


def test_one_by_one_convolutions_are_of_maps():
    conv = nn.Sequential(nn.Conv2d(DIM, 9, 1), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, DIM, 1))
    options = find_options(Online(predictor=conv))
    assert options == (DIM, {"device": torch.device("cpu"), "channel_dim": 1})
    assert find_options(Online(predictor=nn.Conv1d(DIM, DIM, 1)))[1]["channel_dim"] == 1
    assert find_options(Online())[1]["channel_dim"] == -1
    assert find_options(Online(), channel_dim=0)[1]["channel_dim"] == 0


def find_options(model, **given):
    from directpred.torch.find import find, head_options

    return head_options(find(model), given)


@pytest.mark.parametrize(
    "predictor",
    [
        nn.Conv2d(DIM, DIM, 3, padding=1),
        nn.Sequential(nn.Conv2d(DIM, 8, 1), nn.Flatten(), nn.Linear(8, DIM)),
    ],
)
def test_a_predictor_that_mixes_positions_is_said(predictor):
    model = Online(predictor=predictor)
    with pytest.raises(ValueError, match=r"more than one position.*dim=4"):
        replace_predictor(model)
    head = replace_predictor(model, dim=DIM)
    assert head.dim == DIM


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (mlp(out=5), "features of width 4 to 5"),
        (nn.Identity(), "pass it as dim="),
        (nn.LazyLinear(4), "not initialised"),
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), "not initialised"),
    ],
)
def test_widths_that_do_not_fit_or_are_not_there_are_an_error(predictor, message):
    model = Online(predictor=predictor)
    with pytest.raises(ValueError, match=message):
        replace_predictor(model)
    assert model.predictor is predictor


def test_a_width_that_the_layers_do_not_tell_is_given():
    model = Online(predictor=nn.Identity()).double()
    head = replace_predictor(model, dim=DIM)
    assert head.weight.shape == (DIM, DIM)
    assert head.weight.dtype == torch.float64
    head = replace_predictor(Online(predictor=mlp(out=5)), dim=DIM)
    assert head.dim == DIM


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(DIM, affine=False), nn.LayerNorm(DIM), nn.GroupNorm(2, DIM)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_at_the_end_of_a_predictor_is_not_dropped_silently(norm):
    model = Online(predictor=nn.Sequential(*mlp(), norm, nn.Identity()))
    with pytest.warns(UserWarning, match=f"ended in {type(norm).__name__}") as caught:
        replace_predictor(model)
    assert [w.filename for w in caught] == [__file__]


def test_a_norm_inside_of_a_predictor_is_not_said():
    class Predictor(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.bn = nn.Linear(DIM, 9), nn.Linear(9, DIM), nn.BatchNorm1d(9)

    replace_predictor(Online(predictor=Predictor()))


# Target networks.


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sides", SIDES)
def test_a_copy_in_the_target_network_is_replaced_too(frozen, sides):
    model = Siamese(frozen, sides)
    learned = [model.get_submodule(f"{side}.predictor") for side in sides]
    optimizer = torch.optim.SGD(model.get_submodule(sides[0]).parameters(), lr=0.1)
    head = replace_predictor(model, optimizer)
    online, target = (model.get_submodule(side) for side in sides)
    assert online.predictor is head
    assert isinstance(target.predictor, DirectPredHead)
    assert target.predictor is not head
    with torch.no_grad():
        online.projector.bias += 1
    model.follow()  # strict: both have the same parameters
    torch.testing.assert_close(target.projector.bias, online.projector.bias - 0.5)
    assert trains(online, optimizer, head)
    target.load_state_dict(online.state_dict())
    assert restore(model) is learned[0] is online.predictor
    assert target.predictor is learned[1]


def test_the_target_alone_is_refused():
    model = Siamese()
    with pytest.raises(ValueError, match=r"target.predictor follows online.predictor"):
        replace_predictor(model, name="target.predictor")
    assert not any(isinstance(m, DirectPredHead) for m in model.modules())
    replace_predictor(model, name="online.predictor")
    assert sum(isinstance(m, DirectPredHead) for m in model.modules()) == 2


def test_a_frozen_predictor_beside_another_is_replaced_where_it_is_named():
    model = nn.ModuleDict({"a": Online().requires_grad_(False), "b": Online()})
    assert replace_predictor(model, name="a.predictor") is model["a"].predictor
    assert not isinstance(model["b"].predictor, DirectPredHead)


def test_names_tell_the_sides_apart_where_both_train():
    model = Online("online_predictor", target_predictor=mlp())
    head = replace_predictor(model)
    assert model.online_predictor is head
    assert isinstance(model.target_predictor, DirectPredHead)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("given", ["online", "target"])
def test_a_copy_outside_of_the_model_is_said(given, frozen):
    model = Siamese(frozen)
    other = model.target if given == "online" else model.online
    part = getattr(model, given)
    optimizer = torch.optim.SGD(model.online.parameters(), lr=0.1)
    if given == "target":  # the online network is trained: it is no copy of the target's
        replace_predictor(part, name="predictor")
        return
    with pytest.warns(UserWarning, match=r"Online.predictor is a copy of the predictor") as caught:
        replace_predictor(part, optimizer)
    assert [w.filename for w in caught] == [__file__]
    replace_predictor(other)
    model.follow()


def test_the_moving_average_of_a_whole_model_made_before_is_said():
    model = Online()
    average = torch.optim.swa_utils.AveragedModel(model).requires_grad_(False)
    with pytest.warns(UserWarning, match="is a copy"):
        replace_predictor(model)
    replace_predictor(average)
    average.update_parameters(model)


def test_a_model_that_is_gone_is_not_spoken_of():
    gone = Siamese()
    gone.itself = [gone]  # until the next collection
    weak = weakref.ref(gone)
    model = gone.online
    del gone
    assert weak() is not None
    replace_predictor(model)
    assert weak() is None


def test_another_model_of_the_same_kind_is_none_of_its_business():
    model, other = Online(), Online()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    twin = copy.deepcopy(model)
    optimizers.append(torch.optim.SGD(twin.parameters(), lr=0.1))
    replace_predictor(model, optimizers[0])


# Optimizers.


def test_every_optimizer_lets_go_of_the_replaced_parameters():
    model = Online()
    learned = list(model.predictor.parameters())
    main = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    main.step()
    replace_predictor(model)  # it is not given
    assert held(main) == set(model.parameters())
    assert not set(main.state) & set(learned)
    restore(model)
    assert list(held(main) & set(learned))
    assert set(main.state) >= set(learned)


def two_optimizers(model):
    features = [*model.encoder.parameters(), *model.projector.parameters()]
    return torch.optim.SGD(features, lr=0.1), torch.optim.SGD(model.predictor.parameters(), lr=0.1)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("give", [(), (0,), (0, 1)])
def test_an_optimizer_of_the_predictor_alone_goes_on_under_a_scaler(give, unscale):
    model = Online()
    optimizers = two_optimizers(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = scaler_steps(model, optimizers, scaler, unscale)
    replace_predictor(model, [optimizers[i] for i in give])
    assert not held(optimizers[1])
    assert all(scaler_steps(model, optimizers, scaler, unscale))
    restore(model)
    assert all(before)
    assert "_step_supports_amp_scaling" not in vars(optimizers[1])
    assert all(scaler_steps(model, optimizers, scaler, unscale))


def scaler_steps(model, optimizers, scaler, unscale):
    """Two steps of a loop; whether each changed the encoder."""
    changed = []
    for _ in range(2):
        before = model.projector.weight.clone()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(torch.randn(5, 6)).square().sum()).backward()
        for optimizer in optimizers:
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        changed.append(not torch.equal(before, model.projector.weight))
    return changed


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_any_implementation_goes_on_under_a_scaler(make, options):
    model = Online()
    features = [*model.encoder.parameters(), *model.projector.parameters()]
    optimizers = [make(p, lr=0.1, **options) for p in (features, model.predictor.parameters())]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    replace_predictor(model, optimizers)
    assert all(scaler_steps(model, optimizers, scaler, False))


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.Adafactor,
    ],
    ids=lambda make: make.__name__,
)
def test_optimizers_step_without_any_parameter(make):
    model = Online()
    main, _ = two_optimizers(model)
    optimizer = make(model.predictor.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    head = replace_predictor(model)
    for _ in range(2):
        main.zero_grad()
        optimizer.zero_grad()
        model(torch.randn(3, 6)).sum().backward()
        main.step()
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert int(head.step_count) == 2


def test_lbfgs_of_the_predictor_alone_is_refused_before_anything_changes():
    model = Online()
    learned = model.predictor
    optimizer = torch.optim.LBFGS(learned.parameters())
    with pytest.raises(ValueError, match="LBFGS cannot step without parameters"):
        replace_predictor(model)
    assert model.predictor is learned
    assert held(optimizer) == set(learned.parameters())


def test_an_optimizer_that_is_built_over_the_head_alone_is_torchs_error():
    model = Online()
    head = replace_predictor(model)
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(head.parameters(), lr=0.1)


class Larc:
    """As apex's and PatrickHua's: it is no torch optimizer and keeps one in `optim`."""

    def __init__(self, optim):
        self.optim = optim

    @property
    def param_groups(self):
        return self.optim.param_groups

    @property
    def state(self):
        return self.optim.state

    def step(self):
        self.optim.step()

    def zero_grad(self):
        self.optim.zero_grad()


class Unpatched(torch.optim.Optimizer):
    """As timm's Lookahead: it has the dicts of the hooks, and torch never wrapped its step."""

    def __init__(self, base):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self._base_optimizer, self.param_groups, self.state = base, base.param_groups, {}

    def step(self, closure=None):
        return self._base_optimizer.step(closure)


class TwoSteps(torch.optim.Optimizer):
    """As SAM: a torch optimizer whose own step nobody calls."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        self.param_groups = base.param_groups

    def first_step(self):
        for p in held(self):
            self.state[p]["old"] = p.data.clone()

    def second_step(self):
        self.base_optimizer.step()


WRAPPERS = [Larc, Unpatched, TwoSteps, lambda o: Larc(Unpatched(o))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_optimizer_that_steps_is_found_in_its_wrappers(wrap):
    model = Online()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 6)).sum().backward()
    inner.step()
    optimizer = wrap(inner)
    if wrap is TwoSteps:
        optimizer.first_step()
        assert all(p in optimizer.state for p in model.predictor.parameters())
    assert unwrapped(optimizer) is inner
    learned = list(model.predictor.parameters())
    head = replace_predictor(model, optimizer)
    assert head._watch.followed() is inner
    for each in (optimizer, inner):
        assert not held(each) & set(learned)
        assert not set(each.state) & set(learned)
    restore(model)
    assert held(inner) == set(model.parameters())
    assert all(p in inner.state for p in learned)
    if wrap is TwoSteps:
        assert all(p in optimizer.state for p in learned)


def test_real_wrappers_are_looked_through():
    timm = pytest.importorskip("timm.optim")
    accelerate = pytest.importorskip("accelerate")
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    mmengine = pytest.importorskip("mmengine.optim")
    model = Online()
    for wrap in (
        timm.Lookahead,
        accelerate.Accelerator(cpu=True).prepare,
        core.LightningOptimizer,
        mmengine.OptimWrapper,
        lambda o: Larc(timm.Lookahead(o)),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert unwrapped(wrap(optimizer)) is optimizer


def test_steps_under_a_real_lookahead_are_closed():
    timm = pytest.importorskip("timm.optim")
    model = Online()
    optimizer = timm.create_optimizer_v2(model, opt="lookahead_sgd", lr=0.01)
    head = replace_predictor(model, optimizer)
    assert trains(model, optimizer, head, 4)
    assert int(head.step_count) == 4


def test_an_optimizer_that_steps_a_part_only_is_not_looked_into():
    """As ZeRO's, whose inner one holds the shard of a rank."""
    model = Online()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    outer.optim = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    assert unwrapped(outer) is outer


class Foreign:
    def step(self): ...


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sgd", "got str of builtins; pass the optimizer that trains the features"),
        (Foreign(), r"got Foreign .*call head.step\(\) after each step"),
        (type("SGD", (Foreign,), {"__module__": "keras.src.optimizers.sgd"})(), "adapters.keras"),
        (type("Optimizer", (Foreign,), {"__module__": "fastai.optimizer"})(), "after_step"),
        (torch.optim.SGD, "got type"),
    ],
)
def test_what_is_no_optimizer_is_named_with_the_cure(given, message):
    with pytest.raises(TypeError, match=message):
        unwrapped(given)
    model = Online()
    learned = model.predictor
    with pytest.raises(TypeError, match=message):
        replace_predictor(model, given)
    assert model.predictor is learned


def test_of_several_optimizers_in_one_object_one_must_be_chosen():
    trainer = nn.Module()
    trainer.a, trainer.b = two_optimizers(Online())
    with pytest.raises(TypeError, match=r"several \(a, b\)"):
        unwrapped(trainer)


# All or nothing.


def test_whatever_fails_nothing_has_changed(monkeypatch):
    model = Online(second=None)
    model.second = nn.ModuleDict({"predictor": model.predictor})
    optimizers = two_optimizers(model)
    model(torch.randn(3, 6)).sum().backward()
    optimizers[1].step()
    before = [str(model), *map(held, optimizers), *(dict(o.state) for o in optimizers)]
    before += [vars(optimizers[1]).keys()]

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(DirectPredHead, "attach", fail)
    with pytest.raises(RuntimeError, match="no"):
        replace_predictor(model, optimizers, name="predictor")
    monkeypatch.undo()
    after = [str(model), *map(held, optimizers), *(dict(o.state) for o in optimizers)]
    assert [*after, vars(optimizers[1]).keys()] == before
    with pytest.raises(ValueError, match="found 0"):
        restore(model)


class Stubborn(nn.Module):
    """A second owner of a predictor that refuses to let go of it."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def __setattr__(self, name, value):
        if name == "predictor" and isinstance(value, DirectPredHead):
            raise AttributeError("not this")
        super().__setattr__(name, value)


def test_an_owner_that_refuses_the_head_leaves_the_others_as_they_were():
    model = Online()
    model.other = Stubborn(model.predictor)
    learned = model.predictor
    with pytest.raises(AttributeError, match="not this"):
        replace_predictor(model, name="predictor")
    assert model.predictor is model.other.predictor is learned


def test_data_parallel_on_one_device_or_none_replicates_nothing():
    model = Online()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = nn.DataParallel(model)
    head = replace_predictor(wrapped, optimizer)
    assert trains(wrapped, optimizer, head)
    wrapped = nn.DataParallel(Online())
    wrapped.device_ids = [0, 1]  # as with two
    with pytest.raises(TypeError, match="DataParallel on 2 devices"):
        replace_predictor(wrapped)


def test_what_is_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        replace_predictor("model")


def test_nothing_is_kept_alive():
    model = Siamese()
    optimizer = torch.optim.SGD(model.online.parameters(), lr=0.1)
    gc.collect()
    count = len(mechanics._swaps)
    replace_predictor(model, optimizer)
    assert len(mechanics._swaps) == count + 2
    del model, optimizer
    gc.collect()
    assert len(mechanics._swaps) == count


# Checkpoints.


def trained():
    """A model, its optimizer after a step, and copies of both states."""
    model = Online()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    return model, optimizer, copy.deepcopy(model.state_dict())


def test_a_checkpoint_of_the_learned_predictor_is_loaded_before_the_swap():
    _, _, saved = trained()
    model = Online()
    model.load_state_dict(saved)
    replace_predictor(model)
    assert torch.equal(model.projector.weight, saved["projector.weight"])


def test_a_checkpoint_of_the_head_is_loaded_after_the_swap():
    model, optimizer, _ = trained()
    head = replace_predictor(model, optimizer)
    assert trains(model, optimizer, head)
    again = Online()
    replace_predictor(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.predictor.weight, head.weight)


@pytest.mark.parametrize("shape", [(3, DIM, 6), (2, 3, 2, 6), (7, 2, 6)], ids=str)
def test_a_linear_predictor_of_tokens_or_time_steps_has_its_features_last(shape):
    """(batch, tokens, dim), as wide as there are tokens too; channels last; (time, batch, dim)."""
    model = Online()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    head = replace_predictor(model, optimizer)
    z = model.projector(model.encoder(torch.randn(shape)))
    head(z).square().sum().backward()
    optimizer.step()
    rows = z.detach().double().reshape(-1, DIM).numpy()
    expected = oracle.weight([[rows]], 0.3, lambda s: oracle.eq18(s, 0.1))
    assert np.abs(head.weight.numpy() - expected).max() < 1e-3


def test_a_checkpoint_of_the_learned_predictor_says_what_it_is():
    _, _, saved = trained()
    model = Online()
    head = replace_predictor(model)
    message = "predictor: the checkpoint holds .* a learned predictor.* load it before"
    before = copy.deepcopy(head.state_dict())
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(saved)
    with pytest.warns(UserWarning, match=message):
        model.load_state_dict(saved, strict=False)  # leaves the head as it is
    assert all(torch.equal(x, before[name]) for name, x in head.state_dict().items())
    assert torch.equal(model.projector.weight, saved["projector.weight"])
