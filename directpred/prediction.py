"""The prediction z @ weight in the dtype of the features, also where the weight does not fit it."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np

from directpred.array import Array, array_namespace, host_view, is_torch

NARROW = ("float16", "float8_", "float6_", "float4_")
"""Names of dtypes of a smaller range than float32 begin so."""


def predict(z: Array, weight: Array) -> Array:
    """Multiply features by the weight.

    The weight of a rule that is not scale-free may be beyond float16, though the prediction is not.
    Features of so small a range are therefore multiplied in the dtype of the weight, and the
    prediction is converted. Nothing waits for a device, and a compiler may trace it.

    Args:
        z: Features, (..., n, dim), real floating.
        weight: (dim, dim), float32 or float64, of the same library and device.

    Returns:
        (..., n, dim), in the dtype of z, or of PyTorch's autocast where that is on.

    Warns:
        RuntimeWarning: The prediction itself is beyond the dtype, and so infinite; of NumPy, and of
            PyTorch on a CPU.
    """
    xp, dtype = array_namespace(z), _dtype_of_products(z)
    narrow = str(dtype).removeprefix("torch.").startswith(NARROW)
    if not (narrow or (isinstance(z, np.ndarray) and z.dtype.itemsize < 4)):  # bfloat16 in NumPy
        prediction = z @ xp.astype(weight, z.dtype, copy=False)
        return prediction.astype(dtype, copy=False) if isinstance(z, np.ndarray) else prediction
    with _as_they_are(z):
        wide = xp.astype(z, weight.dtype) @ weight
        prediction = xp.astype(wide, dtype)
    if (view := host_view(wide)) is not None and not _fits(prediction) and np.isfinite(view).all():
        warnings.warn(
            f"predictions up to {np.abs(view).max():.3g} are beyond {dtype} and so infinite: take "
            "a rule that is scale-free, such as Eq18(), or features in float32 or bfloat16",
            RuntimeWarning,
            stacklevel=3,
        )
    return prediction


def _dtype_of_products(z: Array) -> Any:
    """The dtype that a product with z has, with PyTorch's autocast of its user."""
    if not is_torch(z):
        return z.dtype
    torch, kind = sys.modules["torch"], z.device.type
    narrows = torch.is_autocast_enabled(kind) and z.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrows else z.dtype


def _as_they_are(z: Array) -> Any:
    """Multiply in the dtypes given, and let a number overflow without NumPy's own warning."""
    if is_torch(z):
        return sys.modules["torch"].autocast(z.device.type, enabled=False)
    return (
        np.errstate(over="ignore", invalid="ignore") if isinstance(z, np.ndarray) else nullcontext()
    )


def _fits(prediction: Array) -> bool:
    xp = array_namespace(prediction)
    return bool(xp.all(xp.isfinite(xp.astype(prediction, xp.float32))))
