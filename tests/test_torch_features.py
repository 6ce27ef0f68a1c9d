"""The head among the features of PyTorch: checkpointing, export, transforms, copies, precision."""

import copy
import io
import pickle

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import directpred.torch  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402

DIM = 4


def model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, DIM), DirectPredHead(DIM, **options))


def assert_weight(head, batches, bound=1e-5):
    """The weight is that after batches, each a list of tensors of features."""
    arrays = [[z.detach().double().numpy() for z in views] for views in batches]
    exact = oracle.weight(arrays, 0.3, lambda s: oracle.eq18(s, 0.1))
    error = np.linalg.norm(head.weight.detach().numpy() - exact, 2)
    assert error <= bound * np.linalg.norm(exact, 2)


def trained(**options):
    """A model in evaluation, after a step."""
    net = model(**options)
    net(torch.randn(16, 8)).sum().backward()
    net[1].step()
    return net.eval()


@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_of_a_checkpointed_forward_count_once(closes, reentrant):
    net, twin = model(), model()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    head, batches = net[1], []
    if closes == "attach":
        head.attach(optimizer)
    for _ in range(4):
        x = torch.randn(16, 8, requires_grad=True)
        batches.append([net[0](x)])
        optimizer.zero_grad()
        checkpoint(lambda x: net(x).tanh(), x, use_reentrant=reentrant).sum().backward()
        # The gradient is that of the plain forward with the same weight.
        twin.load_state_dict({k: v for k, v in net.state_dict().items() if "accumul" not in k})
        twin.zero_grad()
        twin(x.detach()).tanh().sum().backward()
        torch.testing.assert_close(net[0].weight.grad, twin[0].weight.grad)
        optimizer.step()
        if closes == "step":
            head.step()
    assert int(head.step_count) == 4
    assert_weight(head, batches)


def test_several_heads_and_several_inputs_are_one_step_each():
    heads = nn.ModuleList([DirectPredHead(DIM) for _ in range(3)])
    encoder = nn.Linear(8, DIM)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for head in heads[:2]:
        head.attach(optimizer)
    batches = [[], [], []]
    for _ in range(3):
        z = [encoder(torch.randn(n, 8)) for n in (16, 9, 4)]
        optimizer.zero_grad()
        loss = sum(head(z[i]).sum() + head(z[(i + 1) % 3]).sum() for i, head in enumerate(heads))
        loss.backward()
        optimizer.step()
        directpred.torch.step(nn.ModuleDict({"nested": nn.Sequential(heads[2])}))
        for i, batch in enumerate(batches):
            batch.append([z[i], z[(i + 1) % 3]])
    for head, batch in zip(heads, batches, strict=True):
        assert int(head.step_count) == 3
        assert_weight(head, batch)


def test_one_head_that_raises_does_not_keep_the_others_from_their_step():
    def rule(s):
        return s * float("nan")

    heads = nn.ModuleList([DirectPredHead(DIM, rule=rule), DirectPredHead(DIM)])
    for head in heads:
        head.gather(torch.randn(9, DIM))
    with pytest.raises(ValueError, match="gave a weight that is not finite"):
        directpred.torch.step(heads)
    assert [int(head.step_count) for head in heads] == [0, 1]
    torch.testing.assert_close(heads[0].weight, torch.eye(DIM))
    heads[0].step()  # what raised is gone
    assert int(heads[0].step_count) == 0


def test_a_copied_target_network_has_a_head_of_its_own():
    online = model()
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    online[1].attach(optimizer)
    for _ in range(3):
        x = torch.randn(16, 8)
        with torch.no_grad():
            wanted = target(x)
        nn.functional.mse_loss(online(x), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(online[1].step_count) == 3
    assert int(target[1].step_count) == 0
    torch.testing.assert_close(target[1].weight, torch.eye(DIM))
    target.load_state_dict(online.state_dict())
    assert torch.equal(target[1].weight, online[1].weight)
    assert target[1].weight.data_ptr() != online[1].weight.data_ptr()


def test_a_tied_head_is_one_head():
    head = DirectPredHead(DIM)
    tied = nn.ModuleDict({"a": head, "b": head})
    z1, z2 = torch.randn(2, 9, DIM)
    tied["a"].gather(z1), tied["b"].gather(z2)
    directpred.torch.step(tied)
    assert int(head.step_count) == 1
    assert_weight(head, [[z1, z2]])


def test_export_of_the_evaluation_path():
    net, x = trained(), torch.randn(5, 8)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 5):
        torch.testing.assert_close(loaded(x[:rows]), net(x[:rows]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_of_the_evaluation_path(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, x, path = trained(), torch.randn(5, 8), tmp_path / "head.onnx"
    rows = {0: torch.export.Dim("n")}
    torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=(rows,), verbose=False)
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    np.testing.assert_allclose(out, net(x[:3]).detach(), atol=1e-6)


def test_functional_call_takes_another_weight_and_other_parameters():
    net, x = trained(), torch.randn(5, 8)
    weight = torch.randn(DIM, DIM)
    out = functional_call(net, {"1.weight": weight}, (x,))
    torch.testing.assert_close(out, net[0](x) @ weight)
    between, twin = model(between="train"), model(between="train")
    grad = torch.func.grad(lambda p: functional_call(between, p, (x,)).square().sum())(
        {name: p.detach() for name, p in between.named_parameters()}
    )
    twin(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(grad[name], parameter.grad)


def test_gathered_under_torch_func_grad():
    net, x = model(), torch.randn(16, 8)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    torch.func.grad(lambda p: functional_call(net, p, (x,)).square().sum())(parameters)
    net[1].step()
    assert_weight(net[1], [[net[0](x)]])


def test_data_parallel_is_refused():
    net = nn.DataParallel(model())
    with pytest.raises(RuntimeError, match=r"take torch\.nn\.parallel.DistributedDataParallel"):
        net.module[1]._replicate_for_data_parallel()


def test_a_pickled_model_goes_on_in_the_middle_of_a_step():
    net = model()
    net(torch.randn(16, 8)).sum().backward()
    net[1].step()
    net(torch.randn(3, 8)).sum().backward()
    other = pickle.loads(pickle.dumps(net))
    x = torch.randn(7, 8)
    for each in (net, other):
        each(x).sum().backward()
        each[1].step()
    assert torch.equal(net[1].weight, other[1].weight)
    assert int(other[1].step_count) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast_with_a_scaler(dtype):
    """Overflows are no steps, and their rows wait; statistics are of the features as they came."""
    net, batches, seen = model(), [], []
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.05)
    net[1].attach(optimizer)
    net[0].register_forward_hook(lambda *call: seen.append(call[2]))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = net(torch.randn(16, 8))
        overflows = step in (0, 3, 4)
        scaler.scale(out.float().square().mean() * (float("inf") if overflows else 1)).backward()
        before = {k: v.clone() for k, v in net[1].named_buffers()}
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert all(torch.equal(before[k], v) for k, v in net[1].named_buffers())
        else:
            assert seen[0].dtype == dtype
            batches.append(seen.copy())
            seen.clear()
    assert int(net[1].step_count) == 5
    assert int(net[1].skipped) == 0
    assert_weight(net[1], batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_all_of_one_dtype(dtype):
    net, batches = model().to(dtype), []
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.05)
    net[1].attach(optimizer)
    for _ in range(4):
        x = torch.randn(16, 8).to(dtype)
        batches.append([net[0](x)])
        optimizer.zero_grad()
        out = net(x)
        assert out.dtype == dtype
        out.square().mean().backward()
        optimizer.step()
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert net[1].weight.dtype == net[1].correlation.dtype == statistics
    assert_weight(net[1], batches)


def test_largest_half_precision_features_do_not_overflow():
    z = torch.full((4096, DIM), 65504.0).half()
    head = DirectPredHead(DIM, nonfinite="raise")
    head.gather(z)
    head.step()
    assert_weight(head, [[z]])


def test_gathered_rows_move_to_another_dtype_with_the_head():
    head, wide = DirectPredHead(DIM), DirectPredHead(DIM, dtype=torch.float64)
    z1, z2 = torch.randn(2, 9, DIM)
    head.gather(z1)
    wide.load_state_dict(head.state_dict())
    for each in (head, wide):
        each.gather(z2)
        each.step()
    assert wide.weight.dtype == torch.float64
    np.testing.assert_allclose(wide.weight, head.weight, atol=1e-5)
    assert_weight(head, [[z1, z2]])


def test_safetensors_hold_the_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    head, other = DirectPredHead(DIM), DirectPredHead(DIM)
    head.gather(torch.randn(9, DIM))
    head.step()
    head.gather(torch.randn(9, DIM))  # in the middle of the next
    safetensors.save_file(head.state_dict(), tmp_path / "head.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "head.safetensors"))
    for each in (head, other):
        each.step()
    for name, value in head.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
