"""A stand-in for a CUDA graph on a CPU, to test recorded closings without a GPU.

It keeps every ATen operation with its very arguments, and on replay writes into the very tensors
that came out the first time. Addresses, Python numbers and branches are baked in as in a graph, so
what would be wrong in a graph is wrong in it too. What it cannot show needs a GPU, and is in
`test_cuda.py`: it bumps the versions of tensors, and knows no streams and no memory pool.
"""

from torch import Tensor, autocast, no_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero")
NO_KERNEL = {
    *("_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like"),
    *("empty_strided", "expand", "new_empty", "permute", "reshape", "select", "slice", "split"),
    *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
}


class Tape(TorchDispatchMode):
    """Keeps the operations that run under it; they compute, unlike those of a graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (name := func.overloadpacket.__name__) in READS:
            raise RuntimeError(f"{name} waits for the device: it cannot be captured")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def names(self):
        """The operations that launch a kernel; views and allocations launch none."""
        names = [func.overloadpacket.__name__ for func, *_ in self.calls]
        return [name for name in names if name not in NO_KERNEL]

    def replay(self):
        with no_grad(), autocast("cpu", enabled=False):
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record(run, like):
    """As `directpred.torch.graph.record`."""
    tape = Tape()
    with tape:
        run()
    computed = True

    def replay():
        nonlocal computed
        if not computed:
            tape.replay()
        computed = False

    replay.tape = tape
    return replay
