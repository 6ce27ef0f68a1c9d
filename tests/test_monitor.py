"""The monitor of collapse: what it reads, when it warns, and what it leaves alone."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest

from directpred.metrics import diagnose
from directpred.monitor import ROWS, CollapseMonitor, CollapseWarning

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::directpred.monitor.CollapseWarning")


def healthy(rng, rows=64):
    return torch.from_numpy(rng.normal(size=(rows, 8)))


def alike(rng, apart=0.01):
    """Always the same noise, whose spread is the same in each reading."""
    return 1 + apart * healthy(np.random.default_rng(7))


def on_a_line(rng, rows=64):
    """Collapsed behind a batch normalisation: its spread is 1."""
    return torch.from_numpy(rng.choice([-1.0, 1.0], size=(rows, 1)) * np.ones(8))


def warned(monitor, outputs):
    """The calls that warned, of a monitor that reads every call, by their numbers."""
    found = []
    for index, z in enumerate(outputs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert monitor(z) is not None
        found += [(index, str(warning.message)) for warning in caught]
    return found


def test_healthy_outputs_are_never_warned_of(rng):
    assert warned(CollapseMonitor(every=1), [healthy(rng) for _ in range(30)]) == []


@pytest.mark.parametrize(
    ("collapsed", "what"),
    [(alike, r"all rows alike \(spread 0.01, effective rank 1.0 of 8, 3 readings"),
     (on_a_line, r"all on one line \(spread 1.00, effective rank 1.0 of 8, 3 readings"),
     (lambda rng: 0 * healthy(rng), r"all rows alike \(spread 0.00, effective rank 0.0 of 8")],
)  # fmt: skip
def test_a_collapse_is_warned_of_once_at_its_third_reading(rng, collapsed, what):
    outputs = [healthy(rng), *(collapsed(rng) for _ in range(20))]
    ((index, message),) = warned(CollapseMonitor(every=1), outputs)
    assert index == 3
    assert re.search(what, message)
    assert "DirectPredHead" in message


def test_in_many_dimensions_the_spread_shows_what_the_rank_does_not(rng):
    z = 1 + 0.18 * torch.from_numpy(rng.normal(size=(1500, 512)))
    assert diagnose(z)["effective_rank"] > 1.3
    ((index, message),) = warned(CollapseMonitor(every=1), [healthy(rng), *[z] * 5])
    assert index == 3
    assert "all rows alike (spread 0.18" in message


def test_two_readings_are_not_enough(rng):
    kinds = 5 * [alike, alike, healthy]
    assert warned(CollapseMonitor(every=1), [kind(rng) for kind in kinds]) == []


def test_outputs_that_start_collapsed_are_given_ten_readings(rng):
    found = warned(CollapseMonitor(every=1), [alike(rng) for _ in range(20)])
    assert [index for index, _ in found] == [9]


def test_what_spreads_is_on_its_way_out(rng):
    growing = [alike(rng, apart=0.01 * 1.2**n) for n in range(12)]
    assert warned(CollapseMonitor(every=1), growing) == []
    fallen = [healthy(rng), *growing]
    assert warned(CollapseMonitor(every=1), fallen) == []
    stuck = [alike(rng, apart=0.01 * 1.01**n) for n in range(12)]
    assert len(warned(CollapseMonitor(every=1), stuck)) == 1


def test_it_warns_again_only_after_a_recovery(rng):
    spell = [alike] * 5
    kinds = [healthy, *spell, healthy, healthy, *spell, healthy, healthy, healthy, *spell]
    found = warned(CollapseMonitor(every=1), [kind(rng) for kind in kinds])
    assert [index for index, _ in found] == [3, 18]


def test_what_is_not_finite_is_left_out_and_told_after_three(rng):
    bad = healthy(rng)
    bad[3, 3] = torch.nan
    seen = []
    monitor = CollapseMonitor(every=1, log=seen.append)
    for z in [bad, bad, healthy(rng), bad, bad]:
        monitor(z)
    assert len(seen) == 1
    with pytest.raises(CollapseWarning, match="the model hold NaN or infinity, 3 readings"):
        monitor(bad)
    monitor(bad)


def test_it_reads_the_first_pass_and_every_nth(rng, backend):
    seen = []
    monitor = CollapseMonitor(every=4, log=seen.append)
    outputs = [backend.array(rng.normal(size=(40, 6))) for _ in range(9)]
    returned = [monitor(z) for z in outputs]
    assert [index for index, figures in enumerate(returned) if figures] == [0, 4, 8]
    assert seen == [diagnose(z) for z in outputs[::4]]
    assert monitor.latest == seen[-1]
    monitor.look()
    assert monitor(outputs[3]) == diagnose(outputs[3])
    assert monitor(outputs[3]) is None


def test_without_every_it_reads_after_a_look_alone(rng):
    monitor = CollapseMonitor(every=None)
    assert [monitor(healthy(rng)) for _ in range(3)] == [None] * 3
    monitor.look()
    assert monitor(healthy(rng))


def test_small_batches_are_read_together(rng):
    monitor = CollapseMonitor(every=10)
    z = healthy(rng, 40)
    parts = z.split(12)
    got = []
    for part in parts:
        part = part.clone()
        got.append(monitor(part))
        part.zero_()  # as an operation in place behind the module would
    assert got == [None, None, diagnose(z[:36]), None]
    assert ROWS == 32


def test_bfloat16_in_numpy(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    z = rng.normal(size=(64, 8)).astype(ml_dtypes.bfloat16)
    assert CollapseMonitor()(z) == diagnose(z.astype("float32"))


def test_the_rows_of_a_huge_pass_are_thinned_evenly(rng):
    z = healthy(rng, 10_000)
    assert CollapseMonitor()(z) == diagnose(z[::3])


def test_pixels_tokens_and_vectors_are_rows(rng):
    maps = torch.from_numpy(rng.normal(size=(5, 8, 3, 4)))
    expected = diagnose(maps.permute(0, 2, 3, 1).reshape(-1, 8))
    assert CollapseMonitor(channel_dim=1)(maps) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"shape \(5, 8, 3, 4\): say which axis.*channel_dim=1"):
        CollapseMonitor()(maps)
    tokens = torch.from_numpy(rng.normal(size=(5, 7, 8)))
    assert CollapseMonitor()(tokens) == diagnose(tokens)
    assert CollapseMonitor(channel_dim=1)(tokens)["effective_rank"] <= 7


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        ((1, 2), TypeError, "one plain array, got tuple.*select=lambda"),
        ({"z": 1}, TypeError, "got dict"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "real floating dtype, got torch.int64"),
        (torch.ones(8), ValueError, r"got shape \(8,\)"),
        (torch.ones(40, 1), ValueError, r"two features or more, got shape \(40, 1\)"),
    ],
)
def test_outputs_that_cannot_be_read_are_an_error_at_the_first_pass(output, error, match):
    with pytest.raises(error, match=match):
        CollapseMonitor(every=None)(output)


def test_options_are_checked():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        CollapseMonitor("projector")
    with pytest.raises(ValueError, match="every must be ≥ 1, got 0"):
        CollapseMonitor(every=0)
    with pytest.raises(TypeError, match=r"every must be an integer, got 2\.5"):
        CollapseMonitor(every=2.5)
    with pytest.raises(ValueError, match=r"axis 5"):
        CollapseMonitor(channel_dim=5)(torch.ones(40, 4))


def test_of_a_tuple_one_part_is_selected(rng):
    class Two(nn.Linear):
        def forward(self, x):
            return x, super().forward(x)

    model = Two(8, 4)
    monitor = CollapseMonitor(model, select=lambda output: output[1])
    _, z = model(torch.randn(64, 8))
    assert monitor.latest == diagnose(z)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks are small: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def test_it_watches_training_passes_and_changes_nothing(model):
    plain, x = copy.deepcopy(model), torch.randn(64, 8)
    seen = []
    CollapseMonitor(model[2], every=2, log=seen.append)  # the hook keeps it
    for _ in range(4):
        model.eval()
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        z = model(x)
    assert seen == [diagnose(z)] * 2
    torch.testing.assert_close(z, plain(x), rtol=0, atol=0)
    z.sum().backward()
    plain(x).sum().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_it_can_be_removed_and_moved(model):
    seen = []
    monitor = CollapseMonitor(model, every=1, log=seen.append)
    x = torch.randn(64, 8)
    model(x)
    monitor.watch(model[0])
    z = model[0](x)
    model(x)
    assert seen[1:] == [diagnose(z)] * 2
    monitor.remove()
    model(x)
    assert len(seen) == 3
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_watch_nothing(model, duplicate):
    """A target network is a copy of the online network."""
    seen = []
    monitor = CollapseMonitor(model, every=1)
    monitor.log = seen.append
    target = duplicate(model)
    x = torch.randn(64, 8)
    target(x)
    assert seen == []
    model(x)
    assert len(seen) == 1
    monitor.log = None
    model.register_forward_hook(lambda *_: None)  # which has no pickle
    other = duplicate(monitor)
    other.remove()
    assert other(model(x)) == monitor.latest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    monitor = CollapseMonitor(model)
    with torch.autocast("cpu", dtype=dtype):
        z = model(torch.randn(64, 8))
    assert z.dtype == dtype
    assert monitor.latest == diagnose(z)


def test_a_compiled_module_is_watched_from_outside(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    monitor = CollapseMonitor(compiled, every=1)
    x = torch.randn(64, 8)
    for _ in range(3):
        z = compiled(x)
        assert monitor.latest == pytest.approx(diagnose(z), rel=1e-5)
        x = 2 * x


def test_inside_a_compiled_module_it_breaks_the_graph(model):
    torch._dynamo.reset()  # which reuses what it compiled of the same code without a hook
    seen = []
    CollapseMonitor(model[0], every=2, log=seen.append)
    x = torch.randn(64, 8)
    compiled = torch.compile(model, backend="eager")
    for _ in range(5):
        compiled(x).sum().backward()
    assert seen == [diagnose(model[0](x))] * 3
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_transforms_and_tracers_pass(model):
    monitor = CollapseMonitor(model, every=1)
    x, parameters = torch.randn(64, 8), dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.randn(3, 64, 8))
    torch.func.grad(loss)(parameters, x)
    outer = nn.Sequential(model, nn.Linear(8, 2))
    torch.fx.symbolic_trace(outer)
    torch.jit.trace(model, x)
    torch.export.export(model, (x,))
    model.to("meta")(x.to("meta"))
    assert monitor.latest == {}


def test_checkpointed_modules_are_watched(model):
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        monitor = CollapseMonitor(model, every=None)
        monitor.look()
        x = torch.randn(64, 8, requires_grad=True)
        z = checkpoint(model, x, use_reentrant=reentrant)
        z.sum().backward()
        assert monitor.latest == diagnose(z)
        monitor.remove()


def test_a_copy_compiled_beside_it_is_not_watched(model):
    torch._dynamo.reset()
    monitor = CollapseMonitor(model[2], every=1)
    seen = []
    monitor.log = seen.append
    target = copy.deepcopy(model)
    online, target = (torch.compile(m, backend="eager") for m in (model, target))
    for _ in range(3):
        target(torch.randn(64, 8))
        online(torch.randn(64, 8))
    assert len(seen) == 3


def watch_on_a_rank(rank, folder):
    """Two ranks, wrapped and not: the first reads, the other does not."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    wrapped = nn.parallel.DistributedDataParallel(model)
    counts = [[], []]
    CollapseMonitor(wrapped, every=1, log=counts[0].append)
    CollapseMonitor(model[0], every=2, log=counts[1].append)
    for _ in range(3):
        wrapped(torch.randn(64, 8)).sum().backward()
    assert [len(seen) for seen in counts] == ([3, 2] if rank == 0 else [0, 0])
    sharded = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    monitor = CollapseMonitor(sharded[1], every=1)
    torch.distributed.fsdp.fully_shard(sharded[1])
    torch.distributed.fsdp.fully_shard(sharded)
    z = sharded(torch.randn(64, 8))
    z.sum().backward()
    assert monitor.latest == (diagnose(z) if rank == 0 else {})
    torch.distributed.destroy_process_group()


def test_the_first_of_several_ranks_reads(tmp_path):
    torch.multiprocessing.spawn(watch_on_a_rank, (str(tmp_path),), nprocs=2)


def test_the_head_in_front_of_it_is_left_alone(rng):
    head, watched = DirectPredHead(8), DirectPredHead(8)
    CollapseMonitor(watched, every=1)
    for _ in range(3):
        x = healthy(rng).float().requires_grad_()
        for module in (head, watched):
            module(x).sum().backward()
            module.step()
    assert torch.equal(head.weight, watched.weight)
    assert int(watched.step_count) == 3


def train(monitored, *, predictor, stop_gradient, steps=150, seed=0):
    """BYOL on the digits, as a user's script has it."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images = torch.from_numpy(load_digits().data).float() / 16
    torch.manual_seed(seed)
    online = nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)
    )
    target = copy.deepcopy(online).requires_grad_(not stop_gradient)
    optimizer = torch.optim.SGD(
        [*online.parameters(), *predictor.parameters()], lr=0.05, momentum=0.9
    )
    if isinstance(predictor, DirectPredHead):
        predictor.attach(optimizer)
    monitored(online)
    cos = torch.nn.functional.cosine_similarity
    for _ in range(steps):
        batch = images[torch.randint(len(images), (128,))]
        x1, x2 = (batch + 0.5 * torch.randn_like(batch) for _ in range(2))
        z1, z2 = online(x1), online(x2)
        t1, t2 = (z1, z2) if not stop_gradient else (target(x1), target(x2))
        loss = -(cos(predictor(z1), t2) + cos(predictor(z2), t1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
    return diagnose(online(images))


@pytest.mark.parametrize(
    ("predictor", "stop_gradient"),
    [
        (nn.Identity, True),
        (lambda: nn.Linear(32, 32, bias=False), True),
        (lambda: DirectPredHead(32), False),
    ],
    ids=["no predictor", "learned linear", "no stop-gradient"],
)
def test_byol_that_collapses_is_warned_of(predictor, stop_gradient):
    with pytest.warns(CollapseWarning, match="outputs of Sequential have collapsed") as caught:
        end = train(CollapseMonitor, predictor=predictor(), stop_gradient=stop_gradient)
    assert len(caught) == 1
    assert end["spread"] < 0.2


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "predictor",
    [
        lambda: DirectPredHead(32),
        lambda: nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)),
    ],
    ids=["DirectPred", "MLP"],
)
def test_byol_that_does_not_is_not(predictor, seed):
    torch.manual_seed(seed)
    end = train(CollapseMonitor, predictor=predictor(), stop_gradient=True, seed=seed)
    assert end["spread"] > 0.3
