"""Peak memory of an update: what it takes beyond its features and its state."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import directpred as dp
from benches.conftest import Bench
from benches.predictors import features
from benches.published import Published, stored_bytes

STATUS = Path("/proc/self/status")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Has glibc return freed memory to the kernel, so that it is not taken unseen once more."""


def status_bytes(key: str) -> int:
    """A size from the kernel's account of this process."""
    (line,) = [x for x in STATUS.read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) * 1024


def updater(name: str, dim: int) -> Callable[[Tensor], object]:
    """Make the update of that name, a function of features (rows, dim)."""
    if name != "published":
        rule = dp.DirectCopy() if name == "DirectCopy" else dp.Eq18()
        return dp.DirectPred(dim, rule=rule, solver=name.partition(", ")[2] or "auto").update
    published = Published(dim)

    def update(z: Tensor) -> None:
        published.to(z.device).batch = z
        published.step()

    return update


def peak(name: str, dim: int, rows: int, device: str) -> int:
    """Bytes that an update takes at its peak, beyond features and state.

    On a CPU this is the resident memory of the process, so it wants a fresh one that gives back
    what it frees.
    """
    first, second = features(dim, rows, device)[:2]
    updater(name, 8)(first[:, :8].contiguous())  # load all libraries, start all threads
    update = updater(name, dim)
    update(first[:1])  # have the state in place
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
        before = status_bytes("VmRSS")
    update(second)
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return status_bytes("VmHWM") - before


@pytest.mark.parametrize(
    "name", ["DirectPred, eigh", "DirectPred, matmul", "DirectCopy", "published"]
)
def test_memory(bench: Bench, device: str, name: str, rows: int) -> None:
    dim = 256
    entry = {"group": "memory", "name": name, "dim": dim, "rows": rows}
    if name == "published" and stored_bytes(dim, rows) > 6e9:
        bench.leave_out(f"{stored_bytes(dim, rows) / 1e9:.0f} GB", **entry)
    if device == "cuda" or bench.rehearsal:
        measured = peak(name, dim, rows, device)
    elif STATUS.exists():
        done = subprocess.run(
            [sys.executable, "-m", "benches.test_memory", name, str(dim), str(rows)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **GIVE_BACK, "PYTHONSAFEPATH": ""},
            check=True,
            timeout=120,
            stdout=subprocess.PIPE,
        )
        measured = int(done.stdout)
    else:
        pytest.skip("the peak of a process is read from /proc, which is Linux's")
    bench.keep(**entry, bytes=measured)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "cpu"))
