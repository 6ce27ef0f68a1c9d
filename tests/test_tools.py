"""The head among other people's tools: what they do to a state dict, to buffers, or to a graph."""

import copy
import itertools

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

DIM = 4


def model(steps=2, seed=0, open_step=False):
    """A head between two layers, whose tail a state dict with moving keys would shift."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, DIM), DirectPredHead(DIM, freq=2), nn.Linear(DIM, DIM))
    for _ in range(steps):
        net[1].gather(torch.randn(9, DIM))
        net[1].step()
    if open_step:
        net(torch.randn(7, 8)).sum().backward()
    return net


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- State dicts


def test_the_keys_are_the_same_at_every_moment():
    net = model(0)
    keys = [*net.state_dict()]
    names = {name for name, _ in net.named_buffers()} | {name for name, _ in net.named_parameters()}
    assert set(keys) == names
    shapes = [x.shape for x in net.state_dict().values()]
    out = net(torch.randn(9, 8))
    for moment in (lambda: None, lambda: out.sum().backward(), net[1].step, net[1].discard):
        moment()
        assert [*net.state_dict()] == keys
        assert [x.shape for x in net.state_dict().values()] == shapes


def test_an_open_step_goes_through_torch_distributed_checkpoint(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net, other = model(open_step=True), model(0, seed=1)
    expected = copy.deepcopy(net.state_dict())
    dcp.save(get_model_state_dict(net), checkpoint_id=tmp_path)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state)
    same(other.state_dict(), expected)
    for each in (net, other):
        each[1].step()
    same(net.state_dict(), other.state_dict())
    assert int(other[1].step_count) == 3


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto"])
def test_accelerate_loads_and_dispatches(tmp_path, device_map):
    accelerate = pytest.importorskip("accelerate")
    net = model()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights(include_buffers=True):
        other = model(0)
    if device_map is None:
        other = model(0)
    file = str(tmp_path / "pytorch_model.bin")
    other = accelerate.load_checkpoint_and_dispatch(other, file, device_map=device_map)
    same(other.state_dict(), net.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(other(x), net(x))
    other(x).sum().backward()
    other[1].step()
    assert int(other[1].step_count) == 3


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_moving_averages_of_timm_leave_the_neighbours_right(name):
    utils = pytest.importorskip("timm.utils")
    net = model()
    ema = getattr(utils, name)(net, decay=0.5)
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    net(torch.randn(9, 8)).sum().backward()  # the step is open
    before = ema.module[2].weight.clone()
    ema.update(net)
    torch.testing.assert_close(ema.module[2].weight, (before + net[2].weight) / 2)
    ema.module.load_state_dict(ema.module.state_dict())
    assert ema.module.eval()(torch.randn(3, 8)).isfinite().all()


def test_averaged_models_of_pytorch():
    from torch.optim.swa_utils import AveragedModel, update_bn

    net = model()
    averaged = AveragedModel(net, use_buffers=True)
    for _ in range(3):
        net(torch.randn(9, 8)).sum().backward()
        net[1].step()
        averaged.update_parameters(net)
    update_bn([torch.randn(4, 8)], averaged)
    averaged.module.load_state_dict(averaged.module.state_dict())
    assert averaged.eval()(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize("share", [0.5, 0.01, 0.99])
def test_an_average_of_state_dicts_loads_and_its_counts_are_rounded(share):
    a, b = model(3, open_step=True).state_dict(), model(4, seed=1, open_step=True).state_dict()
    net = model(0)
    mean = {k: (1 - share) * a[k] + share * b[k] for k in a}
    assert str(net.load_state_dict(mean)) == "<All keys matched successfully>"
    assert int(net[1].step_count) == round(3 + share)
    torch.testing.assert_close(net[1].correlation, mean["1.correlation"])
    net[1].step()  # the average of what was open
    assert net[1].weight.isfinite().all()


def test_every_way_to_average_in_place_is_harmless():
    online = model(open_step=True)
    for kind in ("state_dict", "buffers", "parameters"):
        target = model(0, seed=1)
        pairs = zip(*(self_or_values(net, kind) for net in (target, online)), strict=True)
        with torch.no_grad():
            for x, y in pairs:
                x.copy_(y)
        if kind != "buffers":
            assert torch.equal(target[2].weight, online[2].weight)
        if kind != "parameters":
            assert torch.equal(target[1].weight, online[1].weight)
        target(torch.randn(9, 8)).sum().backward()
        target[1].step()
        assert target[1].weight.isfinite().all()


def self_or_values(net, kind):
    return list(net.state_dict().values() if kind == "state_dict" else getattr(net, kind)())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_in_half_precision(dtype):
    net, other = model(open_step=True), model(0)
    narrow = {k: x.to(dtype) if x.is_floating_point() else x for k, x in net.state_dict().items()}
    other.load_state_dict(narrow)
    assert other[1].weight.dtype == torch.float32
    torch.testing.assert_close(other[1].weight, net[1].weight, rtol=1e-2, atol=1e-2)
    for each in (net, other):
        each[1].step()
    torch.testing.assert_close(other[1].weight, net[1].weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layers", [(4, 4), (4, 9, 4)])
def test_the_checkpoint_of_a_learned_predictor_says_what_to_do(layers):
    learned = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(layers)))
    whole = nn.ModuleDict({"encoder": nn.Linear(8, DIM), "predictor": learned})
    mine = nn.ModuleDict({"encoder": nn.Linear(8, DIM), "predictor": DirectPredHead(DIM)})
    advice = "predictor: the checkpoint holds 0.bias.*learned.*load it before .* is replaced"
    with pytest.warns(UserWarning, match=advice), pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict(whole.state_dict())
    with pytest.warns(UserWarning, match=advice):
        keys = mine.load_state_dict(whole.state_dict(), strict=False)
    assert len(keys.unexpected_keys) == len(learned.state_dict())
    assert torch.equal(mine["encoder"].weight, whole["encoder"].weight)


def test_hooks_on_loading_are_called():
    net, seen = model(), []
    net[1].register_load_state_dict_pre_hook(lambda *args: seen.append(args[2]))
    net.load_state_dict(net.state_dict())
    assert seen == ["1."]


# ---- Deferred construction


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, DIM), DirectPredHead(DIM, freq=2), nn.Linear(DIM, DIM))


def test_to_empty_and_reset_parameters():
    for _ in range(3):
        junk = [torch.full((DIM, DIM), 7.0) for _ in range(200)]
        del junk
        net = on_meta().to_empty(device="cpu")
        for reset in (lambda: None, net[1].reset_parameters):
            reset()
            fresh = DirectPredHead(DIM, freq=2).state_dict()
            same(net[1].state_dict(), fresh)
    trained = model()
    trained[1].gather(torch.randn(3, DIM))
    trained[1].reset_parameters()
    same(trained[1].state_dict(), fresh)


@pytest.mark.parametrize("between", ["hold", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loading_by_assignment(between, dtype):
    trained = model(3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    state = {
        k: x.to(dtype) if x.is_floating_point() else x for k, x in trained.state_dict().items()
    }
    with torch.device("meta"):
        head = DirectPredHead(DIM, between=between, freq=2)
    entries = {k.removeprefix("1."): x for k, x in state.items() if k.startswith("1.")}
    assert str(head.load_state_dict(entries, assign=True)) == "<All keys matched successfully>"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert head.weight.device.type == "cpu"
    assert head.weight.dtype == wide
    assert isinstance(head.weight, nn.Parameter) == (between == "train")
    assert int(head.step_count) == 3
    torch.testing.assert_close(head.weight.detach(), entries["weight"].to(wide))
    head.gather(torch.randn(9, DIM, dtype=wide))
    head.step()
    assert int(head.step_count) == 4
    assert int(entries["step_count"]) == 3  # what was loaded is not written to


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_on_meta_it_gives_shapes_and_loads_nothing_in_silence():
    net = on_meta()
    out = net(torch.randn(5, 8, device="meta"))
    assert out.shape == (5, DIM)
    with pytest.warns(UserWarning, match="1 is on the meta device.*assign=True"):
        net.load_state_dict(model().state_dict())
    head, state = DirectPredHead(DIM, freq=2), model()[1].state_dict()
    with torch.device("meta"):  # where tensors would be made
        head.load_state_dict(state)
    same(head.state_dict(), state)


# ---- Graphs and transforms


def test_fx_traces_through():
    net = model()
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(9, 8)
    torch.testing.assert_close(traced(x), net(x))
    traced(x).sum().backward()
    assert dict(traced.named_modules())["1"] is net[1]
    net[1].step()
    assert int(net[1].step_count) == 3
    torch.testing.assert_close(torch.fx.symbolic_trace(net[1])(x[:, :4]), net[1].eval()(x[:, :4]))


def test_feature_extractors_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.predictor = nn.Linear(8, DIM), DirectPredHead(DIM)

        def forward(self, x):
            return self.predictor(self.encoder(x))

    net = Net()
    assert "predictor" in extraction.get_graph_node_names(net)[0]
    both = extraction.create_feature_extractor(net, ["encoder", "predictor"])
    out = both(torch.randn(9, 8))
    torch.testing.assert_close(out["encoder"] @ net.predictor.weight, out["predictor"])


def test_vmap_gathers_all_rows_at_once():
    head, z = DirectPredHead(DIM), torch.randn(6, 5, DIM)
    out = torch.func.vmap(head)(z)
    torch.testing.assert_close(out, z)
    head.step()
    exact = oracle.correlation([[z.reshape(-1, DIM).numpy()]], 0.3)
    np.testing.assert_allclose(head.correlation, exact, atol=1e-5)


def test_batches_without_rows_and_single_rows():
    head = DirectPredHead(DIM)
    for shape in ((0, DIM), (3, 0, DIM), (0, 5, DIM)):
        z = torch.randn(shape, requires_grad=True)
        out = head(z)
        assert out.shape == shape
        out.sum().backward()
    head.step()
    assert int(head.closings) == 0
    with pytest.raises(ValueError, match=r"shape \(n, 4\), got \(4,\)"):
        head(torch.randn(DIM))
    assert head.eval()(torch.randn(DIM)).shape == (DIM,)


@pytest.mark.parametrize("shape", [(6, DIM, 3, 5), (6, DIM, 7), (6, DIM), (2, DIM, 3, 4, 5)])
@pytest.mark.parametrize("channel_dim", [1, "last"])
def test_rows_along_the_other_axes(shape, channel_dim):
    """Maps of convolutions, as PixPro's predictor has them, and maps whose channels are last."""
    if channel_dim == "last":
        shape = (shape[0], *shape[2:], DIM)
    axis = -1 if channel_dim == "last" else 1
    torch.manual_seed(0)
    head, z = DirectPredHead(DIM, channel_dim=axis), torch.randn(shape, requires_grad=True)
    convolution = nn.Conv2d(DIM, DIM, 1, bias=False)
    for _ in range(2):
        weight = head.weight.clone()
        out = head(z)
        out.square().sum().backward()
        head.step()
    rows = z.detach().movedim(axis, -1).reshape(-1, DIM)
    exact = oracle.correlation([[rows.numpy()]] * 2, 0.3)
    np.testing.assert_allclose(head.correlation, exact, atol=1e-5)
    assert out.shape == z.shape
    if axis == 1 and z.ndim == 4:
        with torch.no_grad():
            convolution.weight.copy_(weight.T[:, :, None, None])
        torch.testing.assert_close(out, convolution(z))


@pytest.mark.parametrize(
    "shape", [(8, DIM, DIM), (8, 16, DIM, DIM), (8, 16, 3, DIM), (2, 3, 5, DIM)]
)
@pytest.mark.parametrize("training", [True, False])
def test_maps_are_never_taken_for_rows_in_silence(shape, training):
    head = DirectPredHead(DIM).train(training)
    with pytest.raises(ValueError, match=r"Take channel_dim=1 for maps \(n, c, h, w\)"):
        head(torch.randn(shape))
    assert DirectPredHead(DIM, channel_dim=-1)(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("shape", [(6, 5, DIM), (5, 6, DIM), (1, 1, DIM)])
def test_tokens_and_time_steps_are_rows(shape):
    head, z = DirectPredHead(DIM), torch.randn(shape, requires_grad=True)
    head(z).sum().backward()
    head.step()
    rows = z.detach().reshape(-1, DIM).numpy()
    np.testing.assert_allclose(head.correlation, oracle.correlation([[rows]], 0.3), atol=1e-5)


def test_a_wrong_axis_is_named():
    with pytest.raises(TypeError, match="channel_dim must be an integer or None"):
        DirectPredHead(DIM, channel_dim=1.0)
    head = DirectPredHead(DIM, channel_dim=3)
    with pytest.raises(ValueError, match="expected features along axis 3, got"):
        head(torch.randn(2, DIM))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", [torch.complex64, torch.float16, torch.bfloat16])
def test_no_conversion_of_a_model_narrows_the_state(kind):
    net = model()
    before = copy.deepcopy(net[1].state_dict())
    for convert in (lambda: net.to(kind), lambda: net.type(kind)):
        convert()
        same(net[1].state_dict(), before)
    net[1].type(torch.int8)
    same(net[1].state_dict(), before)


def test_a_head_behind_data_parallel_without_a_second_device():
    net = nn.DataParallel(model(0))
    net(torch.randn(9, 8)).sum().backward()
    net.module[1].step()
    assert int(net.module[1].step_count) == 1


def test_precision_settings_stay_those_of_the_user():
    backends = torch.backends
    settings = backends.mkldnn.matmul

    def closing():
        head = DirectPredHead(DIM)
        head.gather(torch.randn(9, DIM))
        head.step()

    generic, settings.fp32_precision = backends.fp32_precision, "none"
    try:
        for inherited in ("tf32", "bf16", "ieee"):
            backends.fp32_precision = inherited
            closing()
            assert settings.fp32_precision == inherited
            backends.fp32_precision = "ieee"  # what inherits follows
            assert settings.fp32_precision == "ieee"
        for own in ("tf32", "bf16", "ieee"):
            for other in ("tf32", "bf16", "ieee"):
                backends.fp32_precision = other
                settings.fp32_precision = own
                closing()
                assert backends.fp32_precision == other
                backends.fp32_precision = "none"
                assert settings.fp32_precision == own  # what was set stays
                settings.fp32_precision = "none"
    finally:
        settings.fp32_precision = "none"
        backends.fp32_precision = generic


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_in_training_mode_leaves_nothing_behind(strict):
    net = model(0)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    torch.export.export(net, (torch.randn(5, 8),), strict=strict)
    other.step()
    net(torch.randn(9, 8)).sum().backward()
    net[1].step()
    assert int(net[1].step_count) == 1
    assert net[1].weight.isfinite().all()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_what_is_gathered_by_hand_is_checked_and_laid_out_as_in_a_forward_pass(axis):
    by_hand, passed = (DirectPredHead(DIM, channel_dim=axis) for _ in range(2))
    z = torch.randn(6, 5, DIM).movedim(-1, axis)
    by_hand.gather(z)
    out = passed(z.clone().requires_grad_())
    assert out.shape == z.shape
    out.sum().backward()
    for head in (by_hand, passed):
        head.step()
    assert torch.equal(by_hand.correlation, passed.correlation)
    before = copy.deepcopy(by_hand.state_dict())
    for bad, error in ((torch.ones(3, DIM + 1), ValueError), (np.ones((3, DIM)), TypeError)):
        with pytest.raises(error, match="features must be"):
            by_hand.gather(bad)
    by_hand.gather(torch.ones(0, DIM) if axis == -1 else torch.ones(DIM, 0).movedim(0, axis))
    same(by_hand.state_dict(), before)
