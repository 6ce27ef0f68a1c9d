"""The array libraries that tests of the core run over."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Backend:
    """An array library and a device: all that a test of the core needs of it.

    Attributes:
        module: The library.
        asarray: From the library and a NumPy array to an array of the library.
        to_numpy: Back.
        missing: From the library to why it cannot be used on this machine, or "".
        mode: From the library to a context in which a test of it runs.
    """

    module: str
    asarray: Callable[[Any, np.ndarray], Any] = lambda xp, x: xp.asarray(x)
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    missing: Callable[[Any], str] = lambda xp: ""
    mode: Callable[[Any], AbstractContextManager[Any]] = field(default=lambda xp: nullcontext())

    @property
    def library(self) -> Any:
        return importlib.import_module(self.module)

    def array(self, x: Any, dtype: str = "float64") -> Any:
        return self.asarray(self.library, np.asarray(x).astype(dtype))


def strict(version: str, **flags: Any) -> Backend:
    """The reference implementation of one version of the array API standard.

    The oldest that the package supports is 2023.12: the one before has no `clip`, cannot tell the
    dtypes of a device, and its arrays do not export to NumPy 2.
    """
    return Backend(
        "array_api_strict",
        to_numpy=lambda x: np.from_dlpack(x),
        mode=lambda xp: xp.ArrayAPIStrictFlags(
            api_version=version, enabled_extensions=["linalg"], **flags
        ),
    )


def cupy_devices(cupy: Any) -> str:
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)


BACKENDS = {
    "numpy": Backend("numpy"),
    "array-api-strict-2025.12": strict(
        "2025.12", boolean_indexing=False, data_dependent_shapes=False
    ),
    "array-api-strict-2023.12": strict("2023.12"),
    "torch-cpu": Backend("torch", lambda torch, x: torch.from_numpy(x)),
    "torch-cuda": Backend(
        "torch",
        lambda torch, x: torch.from_numpy(x).cuda(),
        lambda x: x.cpu().numpy(),
        lambda torch: "" if torch.cuda.is_available() else "no CUDA device",
    ),
    "cupy": Backend("cupy", to_numpy=lambda x: x.get(), missing=cupy_devices),
    "jax": Backend("jax.numpy", mode=lambda jnp: importlib.import_module("jax").enable_x64(True)),
}
