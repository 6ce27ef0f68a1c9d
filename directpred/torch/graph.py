"""Recording work on fixed tensors as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable

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
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(like.device), torch.cuda.Stream(like.device)
    stream.wait_stream(current)
    collecting = gc.isenabled()
    gc.disable()  # freeing another graph or event would invalidate the capture
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    current.wait_stream(stream)
    return graph.replay


def capturing(like: Tensor) -> bool:
    """Tell whether the user captures a graph, which the work shall then land in."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
