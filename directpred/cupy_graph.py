"""Recording work on fixed CuPy arrays as a CUDA graph.

CuPy refuses cuBLAS while a stream is captured (cupy/cupy#6290), so products are a kernel of our own
there: at the small sizes that are worth a recording it is as fast as the launch that it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cupy

from directpred.array import Array

LARGEST = 512
"""The dim up to which closings are recorded: beyond, cuBLAS gains more than launches cost."""


def record(run: Callable[[], None], like: Array) -> Callable[[], None]:
    """Record a function, without running it, as `directpred.torch.graph.record` does.

    Raises:
        RuntimeError: It does something that cannot be captured.
    """
    pool = cupy.cuda.MemoryPool()  # what the graph works in must not be lent to others
    current, stream = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    stream.wait_event(current.record())
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            run()
        except NotImplementedError as error:
            raise RuntimeError(str(error)) from error
        finally:
            graph = stream.end_capture()

    def replay(keep: Any = pool) -> None:
        graph.launch(cupy.cuda.get_current_stream())

    return replay


def product(a: Array, b: Array) -> Array:
    """Return a @ b; in a capture of matrices of one shape (dim, dim), float32 or float64."""
    if not cupy.cuda.get_current_stream().is_capturing():
        return a @ b
    dim = a.shape[0]
    out = cupy.empty_like(a, order="C")
    tiles = -(-dim // 32)
    _kernel(a.dtype.char)(
        (tiles, tiles),
        (16, 16),
        (cupy.ascontiguousarray(a), cupy.ascontiguousarray(b), out, cupy.int32(dim)),
    )
    return out


SOURCE = """
extern "C" __global__ void product(const T* a, const T* b, T* out, int n) {
    // A tile of 32 x 32 numbers; each of 16 x 16 threads has four of them.
    __shared__ T rows[32][33], columns[32][33];
    const int x = threadIdx.x, y = threadIdx.y;
    const int top = 32 * blockIdx.y, left = 32 * blockIdx.x;
    T sum[2][2] = {};
    for (int start = 0; start < n; start += 32) {
        for (int i = y; i < 32; i += 16)
            for (int j = x; j < 32; j += 16) {
                const bool in_a = top + i < n && start + j < n;
                const bool in_b = start + i < n && left + j < n;
                rows[i][j] = in_a ? a[(top + i) * n + start + j] : T(0);
                columns[i][j] = in_b ? b[(start + i) * n + left + j] : T(0);
            }
        __syncthreads();
        for (int k = 0; k < 32; ++k)
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j)
                    sum[i][j] += rows[y + 16 * i][k] * columns[k][x + 16 * j];
        __syncthreads();
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
            if (top + y + 16 * i < n && left + x + 16 * j < n)
                out[(top + y + 16 * i) * n + left + x + 16 * j] = sum[i][j];
}
"""


@cache
def _kernel(char: str) -> Any:
    kind = {"f": "float", "d": "double"}[char]
    return cupy.RawKernel(f"#define T {kind}\n{SOURCE}", "product")
