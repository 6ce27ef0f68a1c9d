"""CollapseMonitor: watch the outputs of a model in training, and warn when they collapse."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from array_api_compat import is_array_api_obj

from directpred.array import (
    Array,
    array_namespace,
    as_features,
    detached,
    device,
    is_real_floating,
    is_torch,
)
from directpred.metrics import diagnose

__all__ = ["CollapseMonitor", "CollapseWarning"]

SPREAD = 0.2
RANK = 1.3
"""Outputs with less of either count as collapsed: docs/rules.md has the runs this comes from."""
PATIENCE = 3
"""Readings in a row that have to agree, before a warning and before a recovery."""
START = 10
"""The same for outputs that never were healthy, as those of an untrained network need not be."""
RISE = 1.1
"""What has grown by this factor over these readings is on its way out of a collapse."""
ROWS = 32
"""Rows that a reading needs, of one pass or of several in a row."""
MOST_ROWS = 4096
"""Rows of a pass that are read, evenly spaced where it has more."""


class CollapseWarning(UserWarning):
    """The outputs of a watched module have collapsed."""


class CollapseMonitor:
    """Read the outputs of a module every so often, and warn once when they collapse.

    For any model, with or without DirectPred. Watch what the loss compares: the projector's output,
    which enters the predictor. The encoder's output in front of it can look healthy all along.

    The warning comes when three readings in a row say so and do not grow: that all rows are nearly
    alike (spread < 0.2), or nearly on one line (effective rank < 1.3). Outputs that have been like
    that from the start, as an untrained network's may be, are given ten. The next warning comes
    only after three healthy readings. It is a `CollapseWarning`: ``warnings.simplefilter("error",
    CollapseWarning)`` lets it stop the training.

    It reads passes in training mode with gradients enabled, and none of a copy of the module, such
    as a target network. Between two readings a pass costs a comparison of numbers. A reading waits
    for the device, and is left out on all ranks but the first. Passes of fewer than 32 rows are
    read several together.

    A module inside a compiled one breaks the graph there, which raises with ``fullgraph=True``:
    watch the compiled module itself, or call the monitor. What a CUDA graph replays calls no hook.
    `torch.jit.script` takes no hooks: `remove` it before.

    Example:
        >>> import torch
        >>> projector = torch.nn.Linear(8, 4)
        >>> monitor = CollapseMonitor(projector, every=50, log=print)  # or log=wandb.log
        >>> loss = projector(torch.randn(64, 8)).square().mean()
        {'spread': ..., 'effective_rank': ..., 'leading_share': ..., 'norm': ...}

    Without a module, in any loop of any array library, call it with the outputs:

        >>> monitor = CollapseMonitor()
        >>> figures = monitor(torch.randn(64, 8))

    Args:
        module: A `torch.nn.Module` whose outputs to watch, (..., dim). Wrapped or not by
            DistributedDataParallel and its like. The hook is all that holds the monitor.
        every: Read every so many passes (a step of BYOL has two), the first one included; None to
            read only after `look`.
        log: Called with the figures of every reading, those of `directpred.metrics.diagnose`.
        select: From the output of the module to the array to watch, where it is a tuple or a dict.
        channel_dim: Axis of the features. Of four axes and more it has to be said: 1 for feature
            maps (n, channels, height, width), whose rows are the pixels.

    Attributes:
        latest: Figures of the last reading; empty before the first.
        passes: Number of passes seen.

    Raises:
        TypeError: module is no `torch.nn.Module`, or every no integer.
        ValueError: every is not positive.
    """

    def __init__(
        self,
        module: Any = None,
        *,
        every: int | None = 50,
        log: Callable[[dict[str, float]], object] | None = None,
        select: Callable[[Any], Array] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        self.every = None if every is None else check_every(every)
        self.log, self.select, self.channel_dim = log, select, channel_dim
        self.latest: dict[str, float] = {}
        self._name = "the model"
        self.passes = 0
        self._due = False
        self._rows: list[Array] = []
        self._health: list[float] = []  # of the last readings; below 1 is collapsed
        self._was_healthy = self._warned = False
        self._not_finite = 0  # readings in a row
        self._handle: Any = None
        if module is not None:
            self.watch(module)

    def __call__(self, output: Any) -> dict[str, float] | None:
        """Count a pass, and read its output where it is due.

        Args:
            output: Of a pass, as the module gives it.

        Returns:
            The figures of a reading, else None.

        Raises:
            TypeError: The output, after `select`, is no real floating array.
            ValueError: It is of another shape than (..., dim) with dim ≥ 2, or of more than three
                axes without `channel_dim`.
        """
        first, self._due = self.passes == 0, self._due or self._falls_due()
        self.passes += 1
        if not (self._due or first) or not _on_first_rank():
            return None
        rows = _as_rows(output if self.select is None else self.select(output), self.channel_dim)
        if not self._due or not _can_be_read(rows):
            return None
        alike = [x.shape[1] == rows.shape[1] and device(x) == device(rows) for x in self._rows]
        if not all(alike):
            self._rows = []
        few = rows.shape[0] < ROWS
        self._rows.append(array_namespace(rows).asarray(rows, copy=True) if few else rows)
        if sum(part.shape[0] for part in self._rows) < ROWS:
            return None
        return self._read()

    def look(self) -> None:
        """Read the next pass, whatever `every` says."""
        self._due = True

    def watch(self, module: Any, name: str | None = None) -> None:
        """Watch a module, in place of another.

        Args:
            module: A `torch.nn.Module`.
            name: What warnings call it; by default its class.

        Raises:
            TypeError: It is none.
        """
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.remove()
        self._name = name or type(module).__name__
        self._handle = module.register_forward_hook(_Hook(self))

    def remove(self) -> None:
        """Stop watching the module."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._rows = None, []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the module out: a copy, or what was pickled, watches nothing."""
        return self.__dict__ | {"_handle": None, "_rows": []}

    def _falls_due(self) -> bool:
        return self.every is not None and self.passes % self.every == 0

    def _read(self) -> dict[str, float] | None:
        parts, self._rows, self._due = self._rows, [], False
        z = parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts)
        try:
            figures = diagnose(z)
        except ValueError:  # NaN or infinity: a gradient scaler may be about to skip the step
            self._not_finite += 1
            if self._not_finite == PATIENCE:
                self._warn(f"hold NaN or infinity, {PATIENCE} readings in a row")
            return None
        self._not_finite = 0
        self.latest = figures
        self._judge(figures, z.shape[1])
        if self.log is not None:
            self.log(dict(figures))
        return dict(figures)

    def _judge(self, figures: dict[str, float], dim: int) -> None:
        """Warn where this reading makes the last ones a collapse, once until they recover."""
        spread, rank = figures["spread"], figures["effective_rank"]
        self._health = [*self._health, min(spread / SPREAD, rank / RANK)][-START:]
        self._was_healthy |= self._health[-1] >= 1
        if self._warned:
            self._warned = not all(health >= 1 for health in self._health[-PATIENCE:])
            return
        needed = PATIENCE if self._was_healthy else START
        last = self._health[-needed:]
        if len(last) < needed or max(last) >= 1 or last[-1] > RISE * last[0]:
            return
        self._warned = True
        self._warn(
            f"have collapsed, {'all rows alike' if spread < SPREAD else 'all on one line'} (spread "
            f"{spread:.2f}, effective rank {rank:.1f} of {dim}, {needed} readings in a row), which "
            "usually comes of too large a learning rate, of a projector without batch "
            "normalisation, of no predictor or a learned linear one (take a 2-layer MLP, or "
            "directpred.torch.DirectPredHead), of a target that takes a gradient, or of "
            "Eq18(normalize=False) or a large eps (docs/rules.md)"
        )

    def _warn(self, what: str) -> None:
        warnings.warn(f"the outputs of {self._name} {what}", CollapseWarning, stacklevel=2)


def check_every(every: int) -> int:
    """Return every, or raise where it is no positive integer."""
    if not isinstance(every, int) or isinstance(every, bool):
        raise TypeError(f"every must be an integer, got {every!r}")
    if every < 1:
        raise ValueError(f"every must be ≥ 1, got {every}")
    return every


class _Hook:
    """What a module holds of its monitor; in a copy or a pickle of the module, nothing."""

    def __init__(self, monitor: CollapseMonitor) -> None:
        torch = sys.modules["torch"]
        self.grad_enabled, self.tracing = torch.is_grad_enabled, torch.jit.is_tracing
        self.proxy = torch.fx.Proxy
        self.observe = torch.compiler.disable(monitor.__call__)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        """Hand the output of a training pass to the monitor."""
        traced = isinstance(output, self.proxy) or self.tracing()
        if module.training and self.grad_enabled() and not traced:
            self.observe(output)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[[Any, Any, Any], None]:
    return _watch_nothing


def _watch_nothing(module: Any, args: Any, output: Any) -> None:
    pass


def _as_rows(z: Any, channel_dim: int | None) -> Array:
    """Outputs as rows (n, dim), without gradient: all, or evenly spaced ones."""
    plain = is_torch(z) or is_array_api_obj(z)
    if not plain or hasattr(z, "full_tensor"):  # a DTensor
        raise TypeError(
            f"expected outputs as one plain array, got {type(z).__name__}: say which part of them "
            "to watch, as in CollapseMonitor(module, select=lambda output: output[0])"
        )
    xp, shape = array_namespace(z), tuple(z.shape)
    if not is_real_floating(z):
        raise TypeError(f"expected outputs of a real floating dtype, got {z.dtype}")
    if channel_dim is None and z.ndim > 3:
        raise ValueError(
            f"outputs of shape {shape}: say which axis holds the features, channel_dim=1 for "
            "feature maps (n, channels, height, width), channel_dim=-1 for (..., dim)"
        )
    axis = -1 if channel_dim is None else channel_dim
    if z.ndim < 2 or not -z.ndim <= axis < z.ndim or shape[axis] < 2:
        raise ValueError(
            f"expected outputs of two axes or more, two features or more, got shape {shape} with "
            f"the features along axis {axis}"
        )
    rows = xp.reshape(xp.moveaxis(detached(as_features(z)), axis, -1), (-1, shape[axis]))
    return rows[:: max(1, -(-rows.shape[0] // MOST_ROWS)), :]


def _can_be_read(z: Array) -> bool:
    """Tell whether z has values that may be read: not while a transform or a tracer runs."""
    if not is_torch(z):
        return True
    torch = sys.modules["torch"]
    captured = z.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or z.is_meta:
        return False
    try:
        z.data_ptr()
    except RuntimeError:
        return False
    return True


def _on_first_rank() -> bool:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is None or not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )
