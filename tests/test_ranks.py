"""Real processes with gloo: the batch is the global batch, and every rank has the same bits.

Four processes run every scenario, one after the other; those of two ranks run in a process group.
"""

import contextlib
import copy
import os
import socket
import time
from datetime import timedelta

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import directpred.torch  # noqa: E402
from directpred.correlation import moments  # noqa: E402
from directpred.method import NOT_FINITE  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch is built without distributed"
)
STEPS, DIM, WORLD = 50, 5, 4


def random(*shape, step):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def states(*heads):
    return [{name: x.clone() for name, x in head.state_dict().items()} for head in heads]


class Collectives:
    """Counts the collectives that heads start."""

    def __init__(self):
        self.count, self.all_reduce = 0, dist.all_reduce

    def __enter__(self):
        dist.all_reduce = self
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.all_reduce

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.all_reduce(*args, **kwargs)


# ---- Uneven rows, by hand: one rank has few, one a single row, one none in every other step.


def rows_of(step):
    return (24, 9, 1, 0) if step % 2 else (3, 17, 1, 5)


def share(z, step, rank):
    return z.split(rows_of(step))[rank] if rank is not None else z


def two_heads():
    return nn.ModuleList([DirectPredHead(DIM), DirectPredHead(3, center=True, freq=2)])


def uneven(rank=None, steps=STEPS):
    """Two heads, fed in micro-batches and closed together; alone (rank None) with all rows."""
    heads = two_heads()
    with Collectives() as collectives:
        for step in range(steps):
            z = share(random(sum(rows_of(step)), DIM, step=step), step, rank)
            for part in z.split(10):
                if len(part):
                    heads[0].gather(part), heads[1].gather(part[:, :3])
            directpred.torch.step(heads)
    assert collectives.count == (0 if rank is None else steps)
    return states(*heads)


# ---- Training: the same model alone on all rows, and wrapped on a share of them.


class Model(nn.Module):
    def __init__(self, between="hold", unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(8, DIM)
        self.head = DirectPredHead(DIM, dtype=torch.float64)
        self.other = DirectPredHead(DIM, freq=3, between=between, dtype=torch.float64)
        self.branches = nn.ModuleList([nn.Linear(8, DIM) for _ in range(2)]) if unused else None
        self.double()

    def forward(self, x, branch=0):
        z = self.encoder(x)
        if self.branches is not None:
            z = z + self.branches[branch](x)
        return self.head(z), self.other(z)


def train(model, wrapped, ranks=1, rank=None, micro=2, branch=lambda step: 0):
    """A loss that sums to that of all rows, whichever rank has them."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.2, momentum=0.5)
    for head in (model.head, model.other):
        head.attach(optimizer)
    with Collectives() as collectives:
        for step in range(STEPS):
            x = random(8, 8, step=step).double()
            x = x if rank is None else x.chunk(ranks)[rank]
            optimizer.zero_grad()
            parts = x.chunk(micro)
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                no_sync = not last and hasattr(wrapped, "no_sync")
                with wrapped.no_sync() if no_sync else contextlib.nullcontext():
                    predictions = wrapped(part, branch(step))
                    cos = nn.functional.cosine_similarity
                    loss = sum(-cos(p, part[:, :DIM]).sum() for p in predictions) / 8
                    (loss * ranks).backward()
            optimizer.step()
    assert collectives.count == (0 if rank is None else STEPS)
    return [*states(model.head, model.other)]


def ddp(rank, group, between="hold", unused=False, **options):
    model = Model(between, unused)
    wrapped = DistributedDataParallel(model, process_group=group, **options)
    return model, wrapped


SCENARIOS = {
    "ddp": {},
    "static graph": {"static_graph": True},
    "trained between": {"between": "train"},
    "unused": {"find_unused_parameters": True, "unused": True},
}


def of_group(model, group):
    for module in model.modules():
        if isinstance(module, DirectPredHead):
            module.process_group = group
    return model


def trained(name, rank=None, group=None):
    """A scenario on two ranks, or alone."""
    options = SCENARIOS[name]
    kept = {k: v for k, v in options.items() if k in ("between", "unused")}
    branch = (lambda step: step % 2) if name == "unused" else (lambda step: 0)
    micro = 1 if name == "static graph" else 2  # which DDP does not combine with no_sync
    if rank is None:
        model = Model(**kept)
        return train(model, model, micro=micro, branch=branch)
    model, wrapped = ddp(rank, group, **options)
    of_group(model, group)
    return train(model, wrapped, 2, rank, micro, branch)


def fully_sharded(rank=None, group=None):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    if rank is None:
        return train(model, model, micro=1)
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
    of_group(model, group)
    return train(model, model, 2, rank, micro=1)


# ---- Features of one rank that are not finite.


def one_bad_rank(rank, nonfinite):
    """The messages that the steps raised, and the state, which must be as if they had not been."""
    head, messages = DirectPredHead(DIM, nonfinite=nonfinite), []
    for step in range(6):
        z = random(7, DIM, step=10 * step + rank)
        if step == 3 and rank == 1:
            z[2, 1] = float("nan")
        if step == 4 and rank == 2:
            z[0, 0] = float("inf")
        head.gather(z)
        try:
            head.step()
        except ValueError as error:
            messages.append(str(error))
    return messages, states(head)


def without_bad_steps():
    head = DirectPredHead(DIM)
    for step in (0, 1, 2, 5):
        for rank in range(WORLD):
            head.gather(random(7, DIM, step=10 * step + rank))
        head.step()
    return states(head)


# ---- Saved in the middle of a step, on every rank; and with another number of ranks.


def resumed(rank):
    """Two heads: one goes on, the other is a new one that loaded its state in the middle."""
    head, other = DirectPredHead(DIM), DirectPredHead(DIM)
    for step in range(4):
        for part, z in enumerate(random(2, 6, DIM, step=10 * step + rank)):
            head.gather(z)
            if step == 2 and part == 0:
                other.load_state_dict(copy.deepcopy(head.state_dict()))
            elif step >= 2:
                other.gather(z)
        head.step()
        if step >= 2:
            other.step()
    return states(head, other)


# ---- Loops in which a head could go wrong in silence.


def sharded_micro_batches(rank=None, group=None, attached=True):
    """FSDP 2, whose gradients come to the optimizer's parameters in the last micro-batch only."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    if rank is not None:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        of_group(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for head in (model.head, model.other) if attached else ():
        head.attach(optimizer)
    for step in range(10):
        x = random(16, 8, step=step).double()
        parts = (x if rank is None else x.chunk(2)[rank]).chunk(4)
        for number, part in enumerate(parts):
            if rank is not None:
                model.set_requires_gradient_sync(number == 3)
            loss = sum(p.square().sum() for p in model(part))
            (loss if rank is None else 2 * loss).backward()  # of which the ranks take the mean
        optimizer.step()
        optimizer.zero_grad()
    return states(model.head, model.other)


def found(rank=None, group=None):
    """Heads that are attached to nothing, in DistributedDataParallel, with micro-batches."""
    model = Model()
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(of_group(model, group), process_group=group)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    for step in range(10):
        x = random(16, 8, step=step).double()
        parts = (x if rank is None else x.chunk(2)[rank]).chunk(4)
        for part in parts:
            loss = sum(p.square().sum() for p in wrapped(part))
            (loss if rank is None else 2 * loss).backward()  # of which the ranks take the mean
        optimizer.step()
        optimizer.zero_grad()
    return states(model.head, model.other)


def zero_redundancy(rank=None, group=None):
    """An optimizer of which each rank steps a part: rank 0 all that is in front of the head."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    front, head, tail = nn.Linear(8, DIM), DirectPredHead(DIM), nn.Linear(DIM, 100)
    model = nn.Sequential(front, head, tail)
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(of_group(model, group), process_group=group)
        optimizer = ZeroRedundancyOptimizer(
            wrapped.parameters(), torch.optim.SGD, process_group=group, lr=0.01
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(5):
        x = random(16, 8, step=step)
        optimizer.zero_grad()
        wrapped(x if rank is None else x.chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    return states(head)


def own_group(rank=None, groups=(None, None), alone=None):
    """Each half of the ranks has its own statistics, under the broadcast of buffers of all."""
    half = alone if rank is None else rank // 2
    torch.manual_seed(0)
    head = DirectPredHead(DIM, rho=0.9, process_group=groups[half])
    model = nn.Sequential(nn.Linear(8, DIM), head)
    wrapped = DistributedDataParallel(model) if rank is not None else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    head.attach(optimizer)
    for step in range(10):
        x = random(16, 8, step=100 * half + step) * (1 + 9 * half)
        x = x if rank is None else x.chunk(2)[rank % 2]
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    copied = copy.deepcopy(head)
    assert copied.process_group is head.process_group
    return states(head)


def empty_batches(rank=None):
    """A rank whose batch is empty at times, and steps in which no rank has rows."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(8, DIM), DirectPredHead(DIM, freq=2)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    head.attach(optimizer)
    for step in range(9):
        rows = (0, 0, 0, 0) if step in (2, 5) else rows_of(step)
        x = random(sum(rows), 8, step=step)
        x = x if rank is None else x.split(rows)[rank]
        out = head(encoder(x))
        assert out.shape == (len(x), DIM)
        out.sum().backward()
        optimizer.step()
    return states(head)


def resumed_on_one_rank(rank):
    """Rank 0 has loaded a state, which DistributedDataParallel broadcasts to the others."""
    torch.manual_seed(0)
    head = DirectPredHead(DIM, freq=3)
    if rank == 0:
        other = DirectPredHead(DIM, freq=3)
        for step in range(4):
            other._close(moments(random(9, DIM, step=step), torch.float32), None)
        head.load_state_dict(other.state_dict())
    model = nn.Sequential(nn.Linear(8, DIM), head)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        wrapped(random(6, 8, step=10 * step + rank)).square().mean().backward()
        optimizer.step()
    return states(head)


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {
        "uneven": uneven(rank),
        "skip": one_bad_rank(rank, "skip"),
        "raise": one_bad_rank(rank, "raise"),
        "resumed": resumed(rank),
    }
    # Both halves of the ranks train the same, each in its own process group.
    for name in SCENARIOS:
        results[name] = trained(name, rank % 2, groups[rank // 2])
    mine = rank % 2, groups[rank // 2]
    results["fully sharded"] = fully_sharded(*mine)
    results["sharded micro-batches, attached"] = sharded_micro_batches(*mine)
    results["sharded micro-batches"] = sharded_micro_batches(*mine, attached=False)
    results["found"] = found(*mine)
    results["zero redundancy"] = zero_redundancy(*mine)
    results["own group"] = own_group(rank, groups)
    results["empty batches"] = empty_batches(rank)
    results["resumed on one rank"] = resumed_on_one_rank(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank saw, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (free_port(), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same_bits(ranks, name):
    for other in ranks[1:]:
        for mine, theirs in zip(ranks[0][name], other[name], strict=True):
            for key, value in mine.items():
                assert torch.equal(value, theirs[key]), (name, key)


def assert_equal_to(alone, ranks, name):
    for mine, theirs in zip(alone, ranks[0][name], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, atol=1e-6, rtol=1e-6, msg=key)


def test_four_ranks_with_uneven_rows_equal_one_process(ranks):
    assert_same_bits(ranks, "uneven")
    assert_equal_to(uneven(), ranks, "uneven")
    assert all(int(state["step_count"]) == STEPS for state in ranks[0]["uneven"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_on_two_ranks_equals_one_process(ranks, name):
    """With accumulation under `no_sync`, and two heads that share one collective a step."""
    assert_same_bits(ranks, name)
    assert_equal_to(trained(name), ranks, name)
    assert int(ranks[0][name][0]["step_count"]) == STEPS


def test_fully_sharded_equals_one_process(ranks):
    assert_same_bits(ranks, "fully sharded")
    assert_equal_to(fully_sharded(), ranks, "fully sharded")


@pytest.mark.parametrize("name", ["sharded micro-batches, attached", "sharded micro-batches"])
def test_all_micro_batches_enter_where_gradients_are_sharded(ranks, name):
    assert_same_bits(ranks, name)
    assert_equal_to(sharded_micro_batches(), ranks, name)


def test_heads_find_their_optimizer_on_every_rank(ranks):
    assert_same_bits(ranks, "found")
    assert_equal_to(found(), ranks, "found")
    assert int(ranks[0]["found"][0]["step_count"]) == 10


def test_an_optimizer_that_is_shared_out_over_ranks(ranks):
    assert_same_bits(ranks, "zero redundancy")
    assert_equal_to(zero_redundancy(), ranks, "zero redundancy")
    assert int(ranks[0]["zero redundancy"][0]["step_count"]) == 5


@pytest.mark.parametrize("half", [0, 1])
def test_a_group_of_its_own_keeps_its_own_state(ranks, half):
    mine = ranks[2 * half : 2 * half + 2]
    assert_same_bits(mine, "own group")
    assert_equal_to(own_group(alone=half), mine, "own group")


def test_empty_batches_on_some_ranks_and_on_all(ranks):
    assert_same_bits(ranks, "empty batches")
    assert_equal_to(empty_batches(), ranks, "empty batches")
    assert int(ranks[0]["empty batches"][0]["closings"]) == 7


def test_ranks_that_did_not_load_count_as_the_one_that_did(ranks):
    assert_same_bits(ranks, "resumed on one rank")
    (state,) = ranks[0]["resumed on one rank"]
    assert int(state["closings"]) == int(state["step_count"]) == 9


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_features_of_one_rank_that_are_not_finite_count_for_all(ranks, nonfinite):
    messages = [rank[nonfinite][0] for rank in ranks]
    expected = [NOT_FINITE] * 2
    assert messages == [expected if nonfinite == "raise" else []] * WORLD
    assert_same_bits([{"x": rank[nonfinite][1]} for rank in ranks], "x")
    (state,) = ranks[0][nonfinite][1]
    assert int(state.pop("skipped")) == (2 if nonfinite == "skip" else 0)
    (alone,) = without_bad_steps()
    closings = int(alone.pop("closings"))
    assert int(state.pop("closings")) == closings + (2 if nonfinite == "skip" else 0)
    for key, value in state.items():
        torch.testing.assert_close(value, alone[key], atol=1e-6, rtol=1e-6)


def test_saved_in_the_middle_of_a_step_on_every_rank_it_continues_identically(ranks):
    for rank in ranks:
        going_on, loaded = rank["resumed"]
        assert all(torch.equal(value, loaded[key]) for key, value in going_on.items())


def test_it_continues_on_another_number_of_ranks(ranks):
    """From four ranks to one."""
    alone = two_heads()
    for head, state in zip(alone, ranks[0]["uneven"], strict=True):
        head.load_state_dict(state)
    z = random(30, DIM, step=STEPS)
    expected = two_heads()
    for step in range(STEPS + 1):
        rows = random(sum(rows_of(step)), DIM, step=step) if step < STEPS else z
        expected[0].gather(rows), expected[1].gather(rows[:, :3])
        directpred.torch.step(expected)
    alone[0].gather(z), alone[1].gather(z[:, :3])
    directpred.torch.step(alone)
    for mine, theirs in zip(states(*alone), states(*expected), strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=1e-6)


def lose_a_rank(rank, port, how, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=3))
    head = DirectPredHead(DIM)
    for step in range(3):
        head.gather(random(4, DIM, step=step))
        if rank == 1 and step == 2:
            if how == "killed":
                os._exit(0)
            while not os.path.exists(f"{folder}/done"):  # stuck
                time.sleep(0.1)
            os._exit(0)
        try:
            head.step()
        except RuntimeError as error:
            assert step == 2
            torch.save([str(error), *states(head)], f"{folder}/error.pt")
            break
    with open(f"{folder}/done", "w"):
        os._exit(0)  # the group is broken: what it would wait for is gone


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_lost_rank_is_an_error_and_no_hang(tmp_path, how):
    mp.spawn(lose_a_rank, (free_port(), how, str(tmp_path)), nprocs=2)
    message, state = torch.load(tmp_path / "error.pt", weights_only=True)
    assert message
    assert int(state["step_count"]) == 2


def test_a_model_without_a_head_is_named():
    with pytest.raises(ValueError, match="no DirectPredHead in Linear"):
        directpred.torch.step(nn.Linear(2, 2))
