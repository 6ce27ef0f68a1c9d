"""What an array is to this package: its library, where it is, and how it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from array_api_compat import is_array_api_obj, is_jax_array, to_device

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""


def is_torch(x: Any) -> bool:
    """Tell whether x is a tensor of PyTorch; dynamo can trace this, and array-api-compat's not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def array_namespace(x: Array) -> Any:
    """Return the functions of the array API standard for the library of x."""
    if is_torch(x):
        compat = sys.modules.get("array_api_compat.torch")
        return compat or array_api_compat.array_namespace(x)  # which imports it
    return array_api_compat.array_namespace(x)


def device(x: Array) -> Any:
    """Return the device of x, in the words of its library."""
    return x.device if is_torch(x) else array_api_compat.device(x)


def on_host(x: Array) -> bool:
    """Tell whether reading the values of x costs no synchronisation with a device."""
    if is_torch(x):
        return bool(x.is_cpu)
    where = device(x)
    if where is None:  # JAX traces x, for its default device
        where = sys.modules["jax"].default_backend()
    return "cpu" in str(where).lower()


def readable(x: Array) -> bool:
    """Tell whether Python may branch on the values of x: they are on the host, and not traced."""
    if is_torch(x):
        return on_host(x) and not sys.modules["torch"].compiler.is_compiling()
    traced = is_jax_array(x) and isinstance(x, sys.modules["jax"].core.Tracer)
    return not traced and on_host(x)


def is_plain(x: Array) -> bool:
    """Tell whether x is its values alone and may be computed in place, without JAX or autograd."""
    return readable(x) and not is_jax_array(x) and not getattr(x, "requires_grad", False)


def host_view(x: Array) -> np.ndarray[Any, Any] | None:
    """Return x as an array of NumPy in the same memory, where that costs nothing, else None.

    On a few numbers NumPy is several times faster than PyTorch.
    """
    if isinstance(x, np.ndarray):
        return x
    if is_torch(x) and readable(x):
        try:
            view: np.ndarray[Any, Any] = x.numpy(force=x.requires_grad)
            return view
        except RuntimeError:  # within a transform of torch.func a tensor has no memory
            return None
    return None


def scipy_linalg(x: Array) -> Any:
    """Return `scipy.linalg` where it is installed and faster for a matrix x, else None.

    NumPy converts float32 to float64 for a decomposition: twice the time. For smaller matrices the
    threads of SciPy's own OpenBLAS, which wait for those of NumPy's, cost more than that.
    """
    single = isinstance(x, np.ndarray) and x.dtype == np.float32
    return _scipy_linalg() if single and x.shape[0] >= 256 else None


@cache
def _scipy_linalg() -> Any:
    try:
        import scipy.linalg
    except ImportError:
        return None
    return scipy.linalg


def undisturbed(x: Array) -> AbstractContextManager[Any]:
    """Compute with arrays like x whatever their user has set for a network.

    PyTorch multiplies in their dtype, and makes tensors that autograd takes also within inference
    mode. NumPy does not warn of what the package looks for itself, as an overflow.
    """
    if not is_torch(x):
        return np.errstate(all="ignore")
    torch, full_precision = sys.modules["torch"], _full_precision()
    if not torch.is_inference_mode_enabled():
        return full_precision(x.device)  # type: ignore[no-any-return]
    both = ExitStack()
    both.enter_context(torch.inference_mode(False))
    both.enter_context(full_precision(x.device))
    return both


@cache
def _full_precision() -> Any:
    from directpred.torch.precision import full_precision

    return full_precision


def detached(x: Array) -> Array:
    """Return x as a constant for automatic differentiation."""
    if is_torch(x):
        return x.detach()
    return sys.modules["jax"].lax.stop_gradient(x) if is_jax_array(x) else x


def is_real_floating(x: Array) -> bool:
    """Tell whether the numbers of x are real and floating, those of ml_dtypes in NumPy too."""
    if is_torch(x):
        return bool(x.is_floating_point())
    if not isinstance(x, np.ndarray):
        return bool(array_namespace(x).isdtype(x.dtype, "real floating"))
    if x.dtype.kind == "V" and (ml_dtypes := sys.modules.get("ml_dtypes")):
        with suppress(ValueError):  # it has integers too, and NumPy has records
            return bool(ml_dtypes.finfo(x.dtype))
    return bool(x.dtype.kind == "f")


def as_features(x: Array) -> Array:
    """Return x with the operators of the standard, which subclasses of NumPy's may change."""
    return np.asarray(x) if isinstance(x, np.ndarray) else x


def is_double(x: Array) -> bool:
    """Tell whether x is of float64, in whatever order of bytes, or of more."""
    if isinstance(x, np.ndarray):
        return bool(x.dtype.itemsize >= 8)
    return bool(x.dtype == array_namespace(x).float64)


def widest(like: Array) -> Any:
    """Return the widest real dtype of the standard on the device of an array: float64 mostly.

    Some devices, and JAX as it comes, have none but float32.
    """
    xp = array_namespace(like)
    available = xp.__array_namespace_info__().dtypes(device=device(like), kind="real floating")
    return xp.float64 if "float64" in available else xp.float32


def converted(x: Array, like: Array, rule: Any) -> Array:
    """Return what a user's rule gave for `like` in its dtype, library and device.

    Raises:
        TypeError: It is no array of real numbers.
    """
    if type(x) is type(like) and x.dtype == like.dtype:
        return x
    xp = array_namespace(like)
    if not (is_torch(x) or is_array_api_obj(x)):
        raise TypeError(f"the rule {rule!r} must return an array, got {type(x).__name__}")
    if not (is_real_floating(x) or array_namespace(x).isdtype(x.dtype, ("integral", "bool"))):
        raise TypeError(f"the rule {rule!r} must return real numbers, got {x.dtype}")
    if array_namespace(x) is not xp:
        x = xp.asarray(to_numpy(x), device=device(like))
    return xp.astype(x, like.dtype)


def to_numpy(x: Any) -> np.ndarray[Any, Any]:
    """Copy an array of any library, or a number, to NumPy."""
    if is_array_api_obj(x) and not is_jax_array(x) and not on_host(x):  # JAX knows no "cpu"
        devices = array_namespace(x).__array_namespace_info__().devices()
        x = to_device(x, next((each for each in devices if "cpu" in str(each).lower()), "cpu"))
    exports = is_array_api_obj(x) and not hasattr(x, "__array__")
    return (np.from_dlpack(x) if exports else np.asarray(detached(x))).copy()


def assign(targets: Sequence[Array], values: Sequence[Array]) -> None:
    """Write arrays into others of the same shapes and of one dtype, in place."""
    pairs = [(x, y) for x, y in zip(targets, values, strict=True) if x is not y]
    if pairs and is_torch(targets[0]):
        sys.modules["torch"]._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        return
    for target, value in pairs:
        target[...] = value


def fill(target: Array, value: Array) -> None:
    """Write a number or 0-d array into a 0-d array, without a synchronisation."""
    if not is_torch(target):
        target[...] = value
    elif is_torch(value):
        target.copy_(value)
    else:
        target.fill_(value)


def changed(arrays: Sequence[Array]) -> None:
    """Tell autograd that arrays were written behind its back: a backward through them raises."""
    if is_torch(arrays[0]):
        sys.modules["torch"].autograd.graph.increment_version(arrays)
