"""What only a GPU can show: no synchronisation, graphs and their memory, the products' precision.

That a recorded closing does what a plain one does is tested on the CPU too, by a recorder that
keeps every operation with its arguments. What it cannot show is here: versions of tensors that a
replay writes, memory that graphs hold and give back, streams and other threads, a capture of the
user's own, and the kernels themselves.
"""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import directpred as dp
import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DIM = 64
RULE = dp.DirectSet(alpha=0.5, eps=0.1)
RULES = [
    dp.Eq18(),
    RULE,
    dp.DirectCopy(),
    dp.BoostScale(),
    dp.BoostScale(eps=-0.1),  # has a positive part taken by products
    dp.DirectSet(alpha=0.7),  # needs an eigendecomposition, which cannot be recorded
]


@pytest.fixture
def no_synchronisation():
    """From its call on, PyTorch raises where the host would wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def replays(monkeypatch):
    """A list that grows by every replay of a graph of PyTorch's."""
    seen, replay = [], torch.cuda.CUDAGraph.replay

    def count(graph):
        seen.append(graph)
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return seen


def features(*shape, dtype=torch.float32):
    """Features with a correlation that falls off as 1 / j."""
    scale = torch.arange(1, shape[-1] + 1, device="cuda") ** -0.5
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def pair(**options):
    """A head that records its closings, and one that does not."""
    options = {"rule": RULE, "device": "cuda", **options}
    return DirectPredHead(DIM, **options), DirectPredHead(DIM, **options, graphs=False)


def close(heads, batches):
    """Take a step with every batch of views, in all the heads."""
    for views in batches:
        for head in heads:
            for z in views:
                head.gather(z)
            head.step()


def assert_same(a, b, tolerance=1e-6):
    """The states of two heads are equal, floating numbers up to a share of the largest."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert x.dtype == y.dtype, name
        if x.is_floating_point():
            assert float((x - y).abs().max()) <= tolerance * float(y.abs().max()), name
        else:
            assert torch.equal(x, y), name


def assert_weight(predictor, batches, rho=0.3):
    """The weight is that of the oracle; a batch is a list of views, in NumPy."""
    exact = oracle.weight(batches, rho, lambda s: oracle.directset(s, 0.5, 0.1))
    got = predictor.weight
    got = got.cpu().numpy() if isinstance(got, torch.Tensor) else got.get()
    assert np.linalg.norm(got - exact, 2) <= 1e-3 * np.linalg.norm(exact, 2)


def in_a_process(script, DIRECTPRED_GRAPHS=None):
    """Run a script with that setting of the environment; what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "DIRECTPRED_GRAPHS"}
    if DIRECTPRED_GRAPHS is not None:
        environment["DIRECTPRED_GRAPHS"] = DIRECTPRED_GRAPHS
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- No synchronisation


def training(closes, freq, dtype):
    """A function that trains on batches, closing the steps in one of several ways; its heads."""
    encoder = nn.Linear(32, DIM).cuda()
    heads = [
        DirectPredHead(DIM, rule=RULE, freq=freq).cuda() for _ in range(1 + (closes == "heads"))
    ]
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
    if closes in ("attach", "accumulate", "heads"):
        for head in heads:
            head.attach(optimizer)

    def train(batches):
        for batch in batches:
            for part in batch.split(100) if closes == "accumulate" else [batch]:
                with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                    z = encoder(part)
                    loss = sum(head(z).float().square().mean() for head in heads)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if closes == "step":
                heads[0].step()

    return train, heads


@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("closes", ["attach", "step", "alone", "accumulate", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_does_not_synchronise(no_synchronisation, replays, closes, freq, dtype):
    train, heads = training(closes, freq, dtype)
    x = torch.randn(20, 256, 32, device="cuda")
    train(x[:2])  # libraries load, handles are made
    no_synchronisation()
    train(x[2:])  # closings are recorded, and replayed
    torch.cuda.set_sync_debug_mode("default")
    assert len(replays) >= 10
    for head in heads:
        assert int(head.step_count) == 20
        assert int(head.skipped) == 0


def test_directpred_does_not_synchronise(no_synchronisation):
    predictor = dp.DirectPred(DIM, rule=RULE, nonfinite="skip")
    z = features(14, 256, DIM)
    predictor.update(z[0])
    no_synchronisation()
    for batch in z[1:]:
        predictor.accumulate(batch[:100])
        predictor.accumulate(batch[100:])
        predictor.step()
        predictor(batch)
    torch.cuda.set_sync_debug_mode("default")
    assert_weight(predictor, [[batch.cpu().numpy()] for batch in z])


# ---- The head's graph does what its operations do


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("center", [False, True])
def test_a_recorded_closing_is_a_plain_one(replays, rule, freq, center):
    heads = pair(rule=rule, freq=freq, center=center)
    rows = (64, 64, 32, 64, 7, 100, 64, 64, 1, 64, 300, 64, 64, 64, 64, 64)
    batches = [[features(n, DIM), features(n + 3, DIM)] for n in rows]
    batches[8][0][0, 2] = float("nan")
    batches[11][1][:] = 1e25  # overflows
    close(heads, batches)
    assert bool(replays) == (rule != dp.DirectSet(alpha=0.7))
    assert int(heads[0].skipped) == 2
    assert_same(*heads)


@pytest.mark.parametrize("between", ["hold", "train"])
def test_a_training_with_graphs_is_one_without(replays, between):
    ends = []
    for graphs in (True, False):
        torch.manual_seed(0)
        encoder = nn.Linear(8, DIM).cuda()
        head = DirectPredHead(DIM, rule=RULE, between=between, freq=3, graphs=graphs, device="cuda")
        optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.01)
        head.attach(optimizer)
        for _ in range(15):
            x = torch.randn(2, 32, 8, device="cuda")
            optimizer.zero_grad()
            (head(encoder(x[0])).square().mean() + head(encoder(x[1])).square().mean()).backward()
            optimizer.step()
        ends.append(head)
    assert replays
    assert_same(*ends, tolerance=1e-5)


def test_closings_on_another_stream_are_in_order(replays):
    heads = pair()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    batches = [[features(256, DIM)] for _ in range(15)]
    for i, batch in enumerate(batches):
        stream, before = streams[i % 3], streams[(i - 1) % 3]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            close(heads[:1], [batch])
    torch.cuda.current_stream().wait_stream(streams[(len(batches) - 1) % 3])
    close(heads[1:], batches)
    assert len(replays) >= 10
    assert_same(*heads)


def test_a_backward_through_a_weight_that_a_replay_has_replaced_raises(replays):
    head, _ = pair()
    close([head], [[features(32, DIM)] for _ in range(5)])
    z = features(32, DIM).requires_grad_()
    loss = head(z).square().sum()
    head.gather(z.detach())
    before = len(replays)
    head.step()
    assert len(replays) == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_closing_that_cannot_be_recorded_is_a_plain_one():
    """A rule that asks for a value on the host, which a capture forbids, is no harm to others."""
    in_a_process(
        f"""
        import warnings
        import torch
        import directpred as dp
        from directpred.torch import DirectPredHead

        class Waits(dp.DirectSet):
            def matrix(self, powered, largest, eye):
                assert float(largest) > 0
                return super().matrix(powered, largest, eye)

        batches = torch.randn(10, 64, {DIM}, device="cuda")
        weights = []
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for rule in (Waits(), dp.DirectSet()):
                head = DirectPredHead({DIM}, rule=rule, device="cuda")
                for z in batches:
                    head.gather(z)
                    head.step()
                weights.append(head.weight.clone())
        assert len([w for w in seen if "record" in str(w.message)]) == 1, seen
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)
        # An allocator that still believes in a capture fails here, and where memory runs out.
        torch.cuda.empty_cache()
        """
    )


# ---- A recording and the life of its head


def test_loading_and_moving_after_a_recording(replays):
    heads = pair()
    close(heads, [[features(32, DIM)] for _ in range(6)])
    state = copy.deepcopy(heads[1].state_dict())
    close(heads, [[features(32, DIM)] for _ in range(2)])
    for head in heads:
        head.load_state_dict(state)
    close(heads, [[features(32, DIM)] for _ in range(2)])
    assert_same(*heads)
    z = torch.randn(32, DIM)
    for head in heads:
        head.cpu()
        head.gather(z)
        head.step()
        head.cuda()
    before = len(replays)
    close(heads, [[features(32, DIM)] for _ in range(6)])
    assert len(replays) > before
    assert_same(*heads)
    for head in heads:
        head.double()
    before = len(replays)
    close(heads, [[features(32, DIM, dtype=torch.float64)] for _ in range(6)])
    assert len(replays) > before
    assert heads[0].weight.dtype == torch.float64
    assert_same(*heads)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_a_recording_of_its_own(replays, copied):
    def copy_of(head):
        if copied == "deepcopy":
            return copy.deepcopy(head)
        if copied == "pickle":
            return pickle.loads(pickle.dumps(head))
        file = io.BytesIO()
        torch.save(head, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    heads = pair()
    close(heads, [[features(32, DIM)] for _ in range(6)])
    copies = [copy_of(head) for head in heads]
    then = copy.deepcopy(heads[1])
    close(heads, [[features(32, DIM)] for _ in range(6)])
    assert_same(copies[0], then)  # closings of the original do not reach it
    del heads
    gc.collect()
    before = len(replays)
    close(copies, [[features(32, DIM)] for _ in range(6)])
    assert len(replays) > before
    assert_same(*copies)


def test_a_head_that_is_gone_takes_nothing_along(replays):
    """What outlives a head stays as it is, and memory it gives back is used by others."""
    heads = [pair() for _ in range(12)]
    batches = [[features(64, DIM)] for _ in range(6)]
    for both in heads:
        close(both, batches)
    assert len(replays) >= 12
    kept = [(both[0].weight, both[1].weight.clone()) for both in heads[::2]]
    close([heads[0][0]], batches[:1])  # a replay that may still run
    close([heads[0][1]], batches[:1])
    kept[0] = heads[0][0].weight, heads[0][1].weight.clone()
    del heads[::2]
    gc.collect()
    filled = [torch.full((DIM, DIM), float("nan"), device="cuda") for _ in range(400)]
    for both in heads:
        close(both, batches)
    del filled
    more = [pair() for _ in range(6)]
    for both in more:
        close(both, batches)
    for weight, expected in kept:
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    for both in heads + more:
        assert_same(*both)


def test_the_memory_of_recordings_comes_back(replays):
    """Neither the graphs' own, nor a workspace of cuBLAS for every stream that was recorded on."""

    def held():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**20

    batch = features(64, 256)
    known = []
    for _ in range(6):
        heads = [DirectPredHead(256, rule=RULE, device="cuda") for _ in range(4)]
        close(heads, [[batch]] * 5)
        del heads
        known.append(held())
    assert len(replays) >= 6 * 4
    assert known[-1] - known[0] <= 40, f"MiB after every four heads: {known}"


# ---- Beside other work


@pytest.mark.parametrize("closings_before", [1, 6])
def test_a_captured_graph_replays_with_new_data(closings_before):
    """In a capture of the user's own the closing lands there, recorded before or not."""
    head = DirectPredHead(DIM, rule=RULE, device="cuda")
    static = features(256, DIM)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    batches = [[static.cpu().numpy()]] * closings_before
    with torch.cuda.stream(stream):
        for _ in range(closings_before):
            head.gather(static)
            head.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prediction = head(static)
        head.gather(static)
        head.step()
    for _ in range(2):
        for _ in range(4):
            before = head.weight.clone()
            static.copy_(features(256, DIM))
            graph.replay()
            torch.testing.assert_close(prediction, static @ before, rtol=1e-3, atol=1e-3)
            batches.append([static.cpu().numpy()])
        for _ in range(4):  # by itself again, in turns with the user's graph
            z = features(100, DIM)
            close([head], [[z]])
            batches.append([z.cpu().numpy()])
    assert int(head.step_count) == closings_before + 16
    assert_weight(head, batches)
    static.fill_(float("nan"))
    before = head.weight.clone()
    graph.replay()
    assert torch.equal(head.weight, before)
    assert int(head.skipped) == 1


def test_recording_beside_a_loader_that_pins_memory(replays):
    """Its thread allocates pinned memory at any moment, which a global capture would forbid."""
    x = torch.randn(6000, 32)
    sizes = [16 * (1 + i) for i in range(26)]  # growing, so that it has to allocate
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    indices = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    torch.manual_seed(0)
    encoder = nn.Linear(32, DIM).cuda()
    for _ in range(4):
        heads = pair()
        loader = DataLoader(TensorDataset(x), batch_sampler=indices, num_workers=2, pin_memory=True)
        for (batch,) in loader:
            z = encoder(batch.cuda(non_blocking=True)).detach()
            close(heads, [[z]])
        assert int(heads[0].step_count) == len(sizes)
        assert_same(*heads)
    assert len(replays) >= 4 * 20


def test_compiled_with_inductor():
    model = nn.Sequential(nn.Linear(32, DIM), DirectPredHead(DIM, rule=RULE)).cuda()
    forward = torch.compile(model, fullgraph=True)
    step = torch.compile(model[1].step, fullgraph=True)
    batches = []
    for _ in range(3):
        x = torch.randn(256, 32, device="cuda")
        batches.append([model[0](x).detach().cpu().numpy()])
        forward(x).square().mean().backward()
        step()
    assert_weight(model[1], batches)


# ---- Precision

SPECTRA = {
    "1/j": lambda j, dim: 1 / j,
    "geometric to 1e-12": lambda j, dim: 10 ** (-12 * (j - 1) / (dim - 1)),
    "geometric to 1e-4": lambda j, dim: 10 ** (-4 * (j - 1) / (dim - 1)),
    "flat": lambda j, dim: torch.ones_like(j),
    "half rank": lambda j, dim: (j <= dim // 2).double(),
    "rank 1": lambda j, dim: (j <= 1).double(),
    "two levels, 1e-3": lambda j, dim: torch.where(j <= dim // 2, 1.0, 1e-3).double(),
    "two levels, 1e-6": lambda j, dim: torch.where(j <= dim // 2, 1.0, 1e-6).double(),
    "one, the rest 1e-6": lambda j, dim: torch.where(j <= 1, 1.0, 1e-6).double(),
    "flat, one 1e-6": lambda j, dim: torch.where(j < dim, 1.0, 1e-6).double(),
}
WIDE = [256, 1024]


def with_spectrum(dim, spectrum, scale=1.0):
    """Features (dim, dim) whose correlation has a spectrum."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, device="cuda"))[0]
    s = spectrum(torch.arange(1, dim + 1, dtype=torch.float64, device="cuda"), dim)
    return (scale * (dim * s).sqrt()[:, None] * basis.T).float()


def exact_weight(z):
    """The weight after steps on the same features, in float64 on the device; and its norm."""
    z = z.double()
    s, u = torch.linalg.eigh(z.T @ z / len(z))
    root = s.clamp(min=0).sqrt()
    p = root + 0.1 * root[-1]
    return (u * p) @ u.T, float(p[-1])


def assert_close_to(weight, exact, norm):
    """A weight is within 1e-3 of the exact one, in spectral norm, over that norm."""
    assert float(torch.linalg.eigvalsh(weight.double() - exact).abs().max()) <= 1e-3 * norm


@pytest.mark.parametrize(
    ("dim", "spectrum"),
    [(dim, name) for dim in (128, 256, 1024) for name in SPECTRA]
    + [(2048, name) for name in ("1/j", "half rank", "two levels, 1e-6", "one, the rest 1e-6")],
)
def test_a_hard_spectrum(replays, dim, spectrum):
    z = with_spectrum(dim, SPECTRA[spectrum])
    exact, norm = exact_weight(z)
    head = DirectPredHead(dim, rule=RULE, device="cuda")
    close([head], [[z]])
    assert_close_to(head.weight, exact, norm)
    close([head], [[z]] * 4)
    assert_close_to(head.weight, exact, norm)
    assert len(replays) >= 2
    assert torch.equal(head.weight, head.weight.T)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dim", WIDE)
def test_a_scale(dim, scale):
    z = with_spectrum(dim, SPECTRA["1/j"], scale)
    head = DirectPredHead(dim, rule=RULE, device="cuda")
    close([head], [[z]] * 5)
    assert_close_to(head.weight, *exact_weight(z))


@pytest.mark.parametrize("dim", WIDE)
def test_the_norm_of_a_wide_correlation(dim):
    """DirectCopy's weight is F̂ and its norm: no root, so all of its error is the norm's."""
    for spectrum in SPECTRA.values():
        z = with_spectrum(dim, spectrum)
        head = DirectPredHead(dim, rule=dp.DirectCopy(eps=1.0), device="cuda")
        close([head], [[z]] * 5)
        exact = float(torch.linalg.eigvalsh(z.double().T @ z.double() / dim)[-1])
        norm = float((head.weight - head.correlation).diagonal().mean())
        assert abs(norm / exact - 1) <= 1e-3


@pytest.mark.parametrize("solver", ["eigh", "matmul"])
def test_tf32_is_kept_out(solver):
    z = torch.randn(4096, DIM, device="cuda") * torch.logspace(0, -2, DIM, device="cuda")
    head = DirectPredHead(DIM, rule=RULE, solver=solver, device="cuda")
    torch.set_float32_matmul_precision("high")
    try:
        close([head], [[z]] * 5)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = oracle.correlation([[z.cpu().numpy()]], 0.3)
    error = np.abs(head.correlation.cpu().numpy() - exact).max() / np.abs(exact).max()
    assert error < 2e-5
    assert_weight(head, [[z.cpu().numpy()]])


def test_moving_to_the_gpu_and_back_keeps_the_state():
    head = DirectPredHead(DIM)
    head.gather(torch.randn(100, DIM))
    head.step()
    head.gather(torch.randn(100, DIM))
    before = head.state_dict()
    there = head.cuda().state_dict()
    assert all(x.is_cuda for x in (there["weight"], there["accumulated_outer"]))
    for name, value in head.cpu().state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- The object, on PyTorch's arrays and on CuPy's


def updates(rng, count, rows=64):
    scale = np.arange(1, DIM + 1) ** -0.5
    return [(rng.normal(size=(rows + i, DIM)) * scale).astype(np.float32) for i in range(count)]


ON_GPU = pytest.mark.parametrize("backend", ["torch-cuda", "cupy"], indirect=True)


@ON_GPU
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_update_returns_is_left_alone(backend, rng, nonfinite):
    predictor = dp.DirectPred(DIM, rule=RULE, nonfinite=nonfinite)
    batches, kept = updates(rng, 10), []
    for z in batches:
        weight = predictor.update(backend.array(z, "float32"))
        kept.append((weight, backend.to_numpy(weight).copy()))
    for weight, then in kept:
        assert np.array_equal(backend.to_numpy(weight), then)
    assert len({then.tobytes() for _, then in kept}) == len(kept)
    assert_weight(predictor, [[z] for z in batches])


@ON_GPU
@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_updates_are_those_of_a_predictor_that_never_gets_to_record(backend, rng, rule, freq):
    options = {"rule": rule, "freq": freq, "nonfinite": "skip"}
    predictor, fresh = (dp.DirectPred(DIM, **options) for _ in range(2))
    batches = updates(rng, 12)
    batches[5][3, 2] = np.nan
    batches[7][:] = 1e25
    for z in batches:
        z = backend.array(z, "float32")
        weight = predictor.update(z)
        state, fresh = fresh.state_dict(), dp.DirectPred(DIM, **options)
        fresh.load_state_dict(state)
        expected = backend.to_numpy(fresh.update(z))
        error = np.abs(backend.to_numpy(weight) - expected).max()
        assert error <= 1e-6 * np.abs(expected).max()
    assert (predictor.step_count, predictor.skipped) == (10, 2)
    assert (fresh.step_count, fresh.skipped) == (10, 2)


@ON_GPU
def test_a_batch_that_is_not_finite_leaves_the_object_as_it_was(backend, rng):
    predictor = dp.DirectPred(DIM, rule=RULE)  # nonfinite="raise"
    batches = updates(rng, 8)
    for z in batches[:6]:
        predictor.update(backend.array(z, "float32"))
    before = {k: backend.to_numpy(getattr(predictor, k)) for k in ("weight", "correlation", "mean")}
    bad = batches[6].copy()
    bad[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of"):
        predictor.update(backend.array(bad, "float32"))
    for name, x in before.items():
        assert np.array_equal(backend.to_numpy(getattr(predictor, name)), x), name
    predictor.update(backend.array(batches[7], "float32"))
    assert_weight(predictor, [[z] for z in [*batches[:6], batches[7]]])


@ON_GPU
def test_the_object_copied_and_gone(backend, rng):
    predictor = dp.DirectPred(DIM, rule=RULE, nonfinite="skip")
    batches = [backend.array(z, "float32") for z in updates(rng, 12)]
    for z in batches[:6]:
        weight = predictor.update(z)
    then = backend.to_numpy(weight).copy()
    twin = copy.deepcopy(predictor)
    for z in batches[6:]:
        predictor.update(z)
    assert np.array_equal(backend.to_numpy(twin.weight), then)
    after = backend.to_numpy(predictor.weight).copy()
    del predictor
    gc.collect()
    for z in batches[6:]:
        twin.update(z)
    assert np.abs(backend.to_numpy(twin.weight) - after).max() <= 1e-6 * np.abs(after).max()
    assert np.array_equal(backend.to_numpy(weight), then)


# ---- What is launched: last, because it starts the profiler


def launched(run):
    """What a function has the device do: names of kernels and copies, and launches of graphs."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = seen.events()
    work = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return work, [event.name for event in events if "GraphLaunch" in event.name]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_solve_that_is_not_due_is_not_launched(graphs):
    head = DirectPredHead(DIM, rule=RULE, freq=5, graphs=graphs, device="cuda")
    z = features(64, DIM)

    def closing():
        head.gather(z)
        head.step()

    for _ in range(20):
        closing()
    counts = [len(launched(closing)[0]) for _ in range(10)]
    assert [i for i, count in enumerate(counts) if count > max(counts) / 2] == [0, 5]


def test_a_closing_is_one_launch_of_a_graph():
    recorded, plain = pair()
    z = features(64, DIM)
    for head in (recorded, plain):
        close([head], [[z]] * 6)
        head.gather(z)
    assert len(launched(recorded.step)[1]) == 1
    assert launched(plain.step)[1] == []


@ON_GPU
def test_an_update_of_the_object_launches_a_graph(backend, rng):
    predictor = dp.DirectPred(DIM, rule=RULE, nonfinite="skip")
    batches = [backend.array(z, "float32") for z in updates(rng, 8)]
    for z in batches[:7]:
        predictor.update(z)
    assert launched(lambda: predictor.update(batches[7]))[1]


@pytest.mark.parametrize("setting", ["0", None])
def test_the_environment_turns_graphs_off(setting):
    printed = in_a_process(
        f"""
        import torch
        from directpred import DirectPred
        from directpred.torch import DirectPredHead

        replayed, replay = [], torch.cuda.CUDAGraph.replay
        torch.cuda.CUDAGraph.replay = lambda graph: (replayed.append(graph), replay(graph))[1]
        head = DirectPredHead({DIM}, device="cuda")
        predictor = DirectPred({DIM}, nonfinite="skip")
        for _ in range(6):
            z = torch.randn(64, {DIM}, device="cuda")
            head.gather(z)
            head.step()
            predictor.update(z)
        assert int(head.step_count) == predictor.step_count == 6
        print(len(replayed))
        """,
        DIRECTPRED_GRAPHS=setting,
    )
    assert int(printed) == 0 if setting == "0" else int(printed) >= 4
