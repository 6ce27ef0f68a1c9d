"""Recording work on fixed tensors as a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def record(run: Callable[[], None], like: Tensor) -> Callable[[], None]:
    """Record a function on the device of a tensor, without running it.

    It must have run before, so that libraries and kernels are loaded. Only this thread is bound by
    the capture: data workers that pin memory and the watchdog of NCCL go on. Nothing synchronises
    and no cached memory is given back, unlike in `torch.cuda.graph`.

    Returns:
        A function that replays it on the current stream.

    Raises:
        RuntimeError: It does something that cannot be captured, or there is no memory.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    current, stream = torch.cuda.current_stream(like.device), stream_for("record", like.device)
    stream.wait_stream(current)
    collecting = gc.isenabled()
    gc.disable()  # freeing another graph or event would invalidate the capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        _give_back(pool, stream.device_index)
        raise
    finally:
        if collecting:
            gc.enable()
    current.wait_stream(stream)
    return graph.replay


def stream_for(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of this thread for a purpose, since cuBLAS keeps memory for each."""
    return _streams(purpose, device, threading.get_ident())


@cache
def _streams(purpose: str, device: torch.device, thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _give_back(pool: tuple[int, int], device: int) -> None:
    """Tell the allocator that a capture has failed, which `capture_end` then leaves out."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def capturing(like: Tensor) -> bool:
    """Tell whether the user captures a graph, which the work shall then land in."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
