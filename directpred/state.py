"""The state of a predictor, and its way between array libraries and into checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from directpred.array import Array, array_namespace, device
from directpred.array import to_numpy as to_numpy  # also the name by which others have it
from directpred.correlation import UNIT, Moments

VERSION = 3
"""Since 3 `closings` are saved; a state from before has closed step_count + skipped steps. Since 2
`accumulated_outer` is in the unit of `Moments`; in 1 it is the plain sum Σ z zᵀ."""


class State(NamedTuple):
    """All that a predictor remembers from step to step.

    Attributes:
        correlation: F̂ of Eq. 19, uncentred, (dim, dim).
        mean: Mean of the features under the same moving average, (dim,).
        weight: W_p, (dim, dim).
        step_count: Number of steps that entered F̂; a number, or a 0-d array on a device.
        skipped: Number of steps left out because they were not finite; likewise.
        closings: Number of steps closed, whatever they held, on which `freq` counts; likewise.
    """

    correlation: Array
    mean: Array
    weight: Array
    step_count: Array
    skipped: Array
    closings: Array


Arrays = TypeVar("Arrays", State, Moments)


def initial_state(dim: int) -> State:
    """The state before the first step, in float32 NumPy arrays: the weight is the identity."""
    eye = np.eye(dim, dtype=np.float32)
    return State(np.zeros_like(eye), np.zeros_like(eye[0]), eye, 0, 0, 0)


def moved(arrays: Arrays, like: Array, dtype: Any, held: Any = None) -> Arrays:
    """Copy a state or moments in NumPy to the library and device of `like`; counts stay numbers.

    Args:
        arrays: What to copy.
        like: An array of the library, on the device.
        dtype: The dtype that the numbers must fit.
        held: The dtype to hold them in, by default the same.

    Raises:
        ValueError: A number is beyond the dtype, in which it would be infinite.
    """
    xp = array_namespace(like)
    info = xp.finfo(dtype)

    def move(name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        top = float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0))
        if top > float(info.max):
            raise ValueError(f"{name} must fit {info.dtype}, got up to {top:.3g}")
        return xp.asarray(x, dtype=held or dtype, device=device(like), copy=True)

    return type(arrays)(*(move(name, x) for name, x in arrays._asdict().items()))


def to_dict(state: State, accumulated: Moments | None) -> dict[str, Any]:
    """The entries of a saved state: arrays under plain names, the numbers as 0-d arrays of NumPy.

    Formats that hold nothing but arrays (npz, safetensors) so take them as they are.
    """
    entries: dict[str, Any] = {"version": VERSION, **state._asdict()}
    if accumulated is not None:
        entries |= {f"accumulated_{name}": x for name, x in accumulated._asdict().items()}
    return {name: np.asarray(x) if isinstance(x, int) else x for name, x in entries.items()}


def from_dict(entries: Mapping[str, Any], dim: int) -> tuple[State, Moments | None]:
    """Check a saved state and copy it to NumPy arrays and Python numbers.

    Args:
        entries: What `to_dict` made, with arrays of any library.
        dim: The width expected.

    Raises:
        TypeError: There are no entries.
        ValueError: An entry is missing or unknown, of another shape, not finite, or no correlation;
            or the version is not one that this release knows.
    """
    if not isinstance(entries, Mapping):
        raise TypeError(f"expected what state_dict() gave, got {type(entries).__name__}")
    version = to_numpy(entries.get("version")).tolist()
    if isinstance(version, float) and math.isfinite(version):
        version = round(version)  # of an average of states
    if version not in range(1, VERSION + 1):
        raise ValueError(f"expected a DirectPred state of version 1 to {VERSION}, got {version!r}")
    shapes = {
        "correlation": (dim, dim),
        "mean": (dim,),
        "weight": (dim, dim),
        "step_count": (),
        "skipped": (),
    } | ({"closings": ()} if version >= 3 else {})
    if any(name.startswith("accumulated_") for name in entries):
        shapes |= {
            "accumulated_outer": (dim, dim),
            "accumulated_total": (dim,),
            "accumulated_rows": (),
        }
    if set(shapes) != (names := set(entries) - {"version"}):
        missing, unknown = sorted(set(shapes) - names), sorted(names - set(shapes))
        raise ValueError(f"not a DirectPred state: missing {missing}, unknown {unknown}")
    arrays = {name: to_numpy(entries[name]) for name in shapes}
    for name, x in arrays.items():
        if x.shape != shapes[name]:
            raise ValueError(f"{name} must be of shape {shapes[name]}, got {x.shape}")
        # What was accumulated may hold NaN: with nonfinite="skip" it is judged at the step.
        if x.dtype.kind not in "fiu" or not (np.isfinite(x).all() or "accumulated" in name):
            raise ValueError(f"{name} must hold finite numbers, got {x.dtype} {x}")
        if not shapes[name] and not 0 <= x < math.inf:
            raise ValueError(f"{name} must be a number ≥ 0, got {x}")
        if name == "correlation" and not _is_symmetric(x):
            raise ValueError(f"{name} must be symmetric, with a diagonal ≥ 0")
    if version == 1 and "accumulated_outer" in arrays:
        arrays["accumulated_outer"] = arrays["accumulated_outer"] * UNIT
    # Counts of an average of states are rounded.
    values = {name: x if x.ndim else round(float(x)) for name, x in arrays.items()}
    if version < 3:
        values["closings"] = values["step_count"] + values["skipped"]
    state = State(**{name: values.pop(name) for name in State._fields})
    accumulated = Moments(*values.values()) if values else None
    return state, accumulated if accumulated and accumulated.rows else None


def _is_symmetric(x: np.ndarray[Any, Any]) -> bool:
    """Tell whether a matrix is a correlation's, but for rounding in whatever it was stored in."""
    wide = x.astype(np.float64)
    rounding = 1e-3 * np.abs(wide).max()
    return bool(np.abs(wide - wide.T).max() <= rounding and wide.diagonal().min() >= -rounding)
