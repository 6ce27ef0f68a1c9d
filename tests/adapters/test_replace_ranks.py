"""Two real processes under DistributedDataParallel, replaced before and after wrapping."""

import os
import socket
import warnings

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from peers import ROWS, LightlyBYOL, LightlySimSiam, SimSiam, views  # noqa: E402

STEPS = 5
KINDS = {kind.__name__: kind for kind in (LightlySimSiam, SimSiam, LightlyBYOL)}


def build(kind, wrap):
    """The peer with its predictor replaced; wrapped before that, after, or not at all.

    Its batch normalisation is frozen: by its statistics a rank's features depend on who shares its
    batch, and the joint batch would give others.
    """
    from directpred.adapters import lightly, simsiam

    adapter = simsiam if kind is SimSiam else lightly
    peer = kind()
    peer.frozen = [
        m for m in peer.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    peer.inner = peer.model
    if wrap == "first":
        peer.model = DistributedDataParallel(peer.model)
    peer.head = adapter.replace_predictor(peer.model, peer.optimizer)
    if wrap == "last":
        peer.model = DistributedDataParallel(peer.model)
    for module in peer.frozen:
        module.eval()
    return peer


def train(peer, split):
    for step in range(STEPS):
        x1, x2 = (view[split] for view in views(step, peer.size))
        loss = peer.loss(x1, x2)
        peer.optimizer.zero_grad()
        loss.backward()
        peer.optimizer.step()
    return {"weight": peer.head.weight, "steps": peer.head.step_count, **peer.inner.state_dict()}


def work(rank, port, name, wrap, folder):
    warnings.simplefilter("ignore")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    torch.save(train(build(KINDS[name], wrap), half), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", ["first", "last"])
@pytest.mark.parametrize("name", ["LightlySimSiam", "SimSiam"])
def test_two_ranks_equal_one_process_on_the_joint_batch(name, wrap, tmp_path):
    if name == "SimSiam":
        SimSiam()  # skips without a checkout
    else:
        pytest.importorskip("lightly")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, name, wrap, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), key
    alone = train(build(KINDS[name], None), slice(None))
    assert int(alone["steps"]) == STEPS
    for key, value in alone.items():
        torch.testing.assert_close(ranks[0][key], value, atol=1e-5, rtol=1e-5, msg=key)


def hooked(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=1)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from directpred.adapters import lightly

    peer = LightlySimSiam()
    wrapped = DistributedDataParallel(peer.model)
    wrapped.register_comm_hook(None, allreduce_hook)
    with pytest.raises(TypeError, match="before the model is wrapped"):
        lightly.replace_predictor(wrapped, peer.optimizer)

    peer = LightlySimSiam()
    predictor = peer.model.prediction_head
    wrapped = DistributedDataParallel(peer.model, find_unused_parameters=True, bucket_cap_mb=7)
    wrapped.eval()
    lightly.replace_predictor(wrapped, peer.optimizer)
    assert not wrapped.training
    assert wrapped.find_unused_parameters
    assert wrapped.bucket_bytes_cap == 7 * 2**20
    assert lightly.restore(wrapped) is predictor
    wrapped.train()
    peer.model = wrapped
    assert peer.step() < 0
    assert all(p.grad is not None for p in predictor.parameters())
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_wrapper_keeps_its_options_and_refuses_what_it_cannot_keep(tmp_path):
    pytest.importorskip("lightly")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(hooked, (port, str(tmp_path)), nprocs=1)
