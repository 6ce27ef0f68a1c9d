"""Two real processes with gloo: the batch is the global batch."""

import os
import socket

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import nn  # noqa: E402

from directpred.torch import DirectPredHead  # noqa: E402

STEPS, ROWS, DIM = 6, (24, 9), 5


def features(step):
    return torch.randn(sum(ROWS), DIM, generator=torch.Generator().manual_seed(step))


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    head = DirectPredHead(DIM)
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Identity(), head, Scale()))
    for step in range(STEPS):
        z = features(step).split(ROWS)[rank]
        if step == 3 and rank == 0:
            z = z * float("nan")
        if step != 4:
            for part in z.chunk(2):  # DDP copies the buffers of rank 0 before each forward
                wrapped(part)
        elif rank == 0:  # a rank without rows still closes the step
            head(z)
        head.step()
    torch.save(head.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Scale(nn.Module):
    """One parameter, without which DistributedDataParallel has nothing to do."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return z * self.scale


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
def test_two_ranks_with_uneven_rows_equal_one_process(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    alone = DirectPredHead(DIM)
    for step in range(STEPS):
        if step == 3:
            continue
        alone(features(step)[: ROWS[0]] if step == 4 else features(step))
        alone.step()
    torch.testing.assert_close(states[0]["weight"], alone.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(states[0]["mean"], alone.mean, atol=1e-6, rtol=0)
    assert int(states[0]["step_count"]) == STEPS - 1
    assert int(states[0]["skipped"]) == 1
