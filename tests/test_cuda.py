"""What only a GPU can show: no synchronisation with the host, CUDA graphs, float32 products."""

import numpy as np
import pytest

import directpred as dp
import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DIM = 64


@pytest.fixture
def no_synchronisation():
    """From its call on, PyTorch raises where the host would wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def assert_weight(head, batches, rho=0.3):
    exact = oracle.weight(batches, rho, lambda s: oracle.eq18(s, 0.1))
    error = np.linalg.norm(head.weight.cpu().numpy() - exact, 2) / np.linalg.norm(exact, 2)
    assert error <= 1e-3


@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("closes", ["attach", "step", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_does_not_synchronise(no_synchronisation, closes, freq, dtype):
    encoder = nn.Linear(32, DIM).cuda()
    head = DirectPredHead(DIM, freq=freq).cuda()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    if closes == "attach":
        head.attach(optimizer)
    x = torch.randn(8, 256, 32, device="cuda")

    def train(batches):
        for batch in batches:
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                z = encoder(batch)
                loss = head(z).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if closes == "step":
                head.step()

    train(x[:2])  # libraries load, handles are made
    no_synchronisation()
    train(x[2:])
    torch.cuda.set_sync_debug_mode("default")
    assert int(head.step_count) == 8 - (closes == "alone")
    assert int(head.skipped) == 0


def test_directpred_does_not_synchronise(no_synchronisation):
    predictor = dp.DirectPred(DIM, nonfinite="skip")
    z = torch.randn(4, 256, DIM, device="cuda")
    predictor.update(z[0])
    no_synchronisation()
    for batch in z[1:]:
        predictor.accumulate(batch[:100])
        predictor.accumulate(batch[100:])
        predictor.step()
        predictor(batch)
    torch.cuda.set_sync_debug_mode("default")
    assert_weight(predictor, [[batch.cpu().numpy()] for batch in z])


def test_a_captured_graph_replays_with_new_data():
    head = DirectPredHead(DIM, device="cuda")
    static = torch.randn(256, DIM, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    batches = [[static.cpu().numpy()]] * 3
    with torch.cuda.stream(stream):
        for _ in range(3):
            head(static)
            head.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prediction = head(static)
        head.step()
    for _ in range(4):
        before = head.weight.clone()
        static.copy_(torch.randn_like(static))
        graph.replay()
        torch.testing.assert_close(prediction, static @ before, rtol=1e-3, atol=1e-3)
        batches.append([static.cpu().numpy()])
    assert int(head.step_count) == 7
    assert_weight(head, batches)
    static.fill_(float("nan"))
    before = head.weight.clone()
    graph.replay()
    assert torch.equal(head.weight, before)
    assert int(head.skipped) == 1


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_tf32_is_kept_out(solver):
    z = torch.randn(4096, DIM, device="cuda") * torch.logspace(0, -2, DIM, device="cuda")
    head = DirectPredHead(DIM, solver=solver, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        head(z)
        head.step()
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = oracle.correlation([[z.cpu().numpy()]], 0.3)
    error = np.abs(head.correlation.cpu().numpy() - exact).max() / np.abs(exact).max()
    assert error < 2e-5
    assert_weight(head, [[z.cpu().numpy()]])


def test_compiled_with_inductor():
    model = nn.Sequential(nn.Linear(32, DIM), DirectPredHead(DIM)).cuda()
    forward = torch.compile(model, fullgraph=True)
    step = torch.compile(model[1].step, fullgraph=True)
    batches = []
    for _ in range(3):
        x = torch.randn(256, 32, device="cuda")
        batches.append([model[0](x).detach().cpu().numpy()])
        forward(x).square().mean().backward()
        step()
    assert_weight(model[1], batches)


def test_moving_to_the_gpu_and_back_keeps_the_state():
    head = DirectPredHead(DIM)
    head(torch.randn(100, DIM))
    head.step()
    head(torch.randn(100, DIM))
    before = head.state_dict()
    there = head.cuda().state_dict()
    assert all(x.is_cuda for x in (there["weight"], there["accumulated_outer"]))
    for name, value in head.cpu().state_dict().items():
        assert torch.equal(value, before[name]), name
