"""DirectPredHead: DirectPred as a `torch.nn.Module` that stands where the learned predictor stood.

The order of events in a step is the published one: the forward passes apply the weight of the
step before and gather statistics; backward; optimizer step; then the new weight is set.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, TypeAlias

import array_api_compat
import array_api_compat.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from directpred.array import on_host
from directpred.correlation import (
    Moments,
    check_features,
    describe_nonfinite,
    is_finite,
    merge,
    moments,
)
from directpred.predictor import NonFinite, Options, advance, check_dim
from directpred.ranks import several, sum_over_ranks
from directpred.spectrum import Eq18, Rule
from directpred.state import State, from_dict, initial_state, moved, to_dict

__all__ = ["DirectPredHead", "step"]


class DirectPredHead(nn.Module):
    """A predictor head without trained parameters, for BYOL, SimSiam and their like.

    In training mode `head(z)` is z @ weight and gathers the statistics of z, without grad and in
    float32 or better also under autocast; gradient flows through to z. A *step* ends with the new
    weight, and is closed by one of three:

    - `attach(optimizer)`, once: after every `optimizer.step()`. Micro-batches are merged.
    - `step()`, called by the training loop after `optimizer.step()`.
    - nothing: a head that has never been closed by one of these closes the step by itself, at the
      first forward after a backward. With gradient accumulation, or under `torch.compile`, choose
      one of the others.

    In evaluation mode the weight is applied and nothing is gathered. As for `nn.BatchNorm1d`, it is
    the mode that counts: a pass under `torch.no_grad` in training mode is gathered too. A forward
    that activation checkpointing runs again is not.

    Statistics are merged over the ranks of the process group where `torch.distributed` is
    initialised, so every rank has the weight of the global batch; every rank must close the step,
    one without rows too. Features that are not finite on one rank are treated alike on all: the
    step is skipped, or with nonfinite="raise" raises on every rank when it is closed.

    Example:
        >>> import torch
        >>> encoder = torch.nn.Linear(8, 4)
        >>> head = DirectPredHead(4)
        >>> optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03)
        >>> head.attach(optimizer)
        >>> head(encoder(torch.randn(16, 8))).square().mean().backward()
        >>> optimizer.step()
        >>> int(head.step_count)
        1

    Args:
        dim: Width of the features.
        rule: Spectral rule, one of `directpred.spectrum` or any callable s -> p.
        rho: Weight of the old correlation in the moving average, in [0, 1).
        freq: Set the weight every freq-th step.
        between: What happens to the weight from one setting to the next: "hold" it (it is a buffer
            and the head has no parameters), or "train" it (it is a parameter, for an optimizer).
        center: Whether the weight comes from the centred correlation; its precision is that of
            `directpred.DirectPred`.
        solver: As `directpred.DirectPred`.
        nonfinite: "skip" a step with features that are not finite and count it in `skipped`, which
            on a GPU needs no synchronisation with the host; or "raise" a `ValueError` in the
            forward pass, and with several ranks when the step is closed.
        process_group: The ranks to merge over; by default all.
        device: Of the state.
        dtype: Of the state, float32 (the default) or float64.

    Attributes:
        weight: W_p, (dim, dim), the identity until the first step is closed.
        correlation: F̂ of Eq. 19, (dim, dim), uncentred.
        mean: Moving average of the features' mean, (dim,).
        step_count: Number of steps that entered F̂, 0-d int64.
        skipped: Number of steps left out because they were not finite, 0-d int64.

    Raises:
        TypeError, ValueError: An option is of the wrong type or out of range.
    """

    weight: Tensor
    correlation: Tensor
    mean: Tensor
    step_count: Tensor
    skipped: Tensor

    def __init__(
        self,
        dim: int,
        rule: Rule = Eq18(),  # noqa: B008 - frozen
        rho: float = 0.3,
        freq: int = 1,
        between: Literal["hold", "train"] = "hold",
        center: bool = False,
        solver: str = "auto",
        nonfinite: NonFinite = "skip",
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_dim(dim)
        self.options = Options(rule, rho, freq, center, solver, nonfinite).validate()
        if between not in ("hold", "train"):
            raise ValueError(f"between must be 'hold' or 'train', got {between!r}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.between = between
        self.process_group = process_group
        for name, value in initial_state(dim)._asdict().items():
            floating = name not in ("step_count", "skipped")
            tensor = torch.as_tensor(
                value, device=device, dtype=(dtype or torch.float32) if floating else torch.int64
            )
            if name == "weight" and between == "train":
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        # Not a buffer: DistributedDataParallel would overwrite it with that of rank 0.
        self._gathered: Moments | None = None
        self._backward_seen = False
        self._stepped_by_hand = False
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Predict: z @ weight; in training mode also gather the statistics of z.

        Args:
            z: Features, (..., n, dim), any floating dtype.

        Returns:
            The prediction, in the shape and dtype of z (of autocast where that is on).

        Raises:
            TypeError: z is not a floating tensor.
            ValueError: z is of another width or device, has no rows, or, with nonfinite="raise",
                is not finite. Nothing of it has then been gathered.
        """
        if not isinstance(z, Tensor):
            raise TypeError(f"features must be a torch.Tensor, got {type(z).__name__}")
        check_features(z, self.dim)
        if z.device != self.weight.device:
            raise ValueError(f"expected features on {self.weight.device}, got some on {z.device}")
        if not self.training:
            return z @ self.weight.to(z.dtype)
        eager = not torch.compiler.is_compiling()
        if eager and _in_backward():  # activation checkpointing runs a forward again
            self._backward_seen = True
            return z @ self.weight.to(z.dtype)
        if eager and self._backward_seen:
            self._settle()
        prediction = z @ self.weight.to(z.dtype)
        self._gather(z.detach())
        if eager and prediction.requires_grad:
            prediction.register_hook(self._see_backward)
        return prediction

    def step(self) -> None:
        """Close the step: merge over ranks, move the correlation, set the weight where due.

        Call it after `optimizer.step()`, and not after one that a gradient scaler skipped. Does
        nothing where nothing was gathered since the last step. The function `step` closes all heads
        of a model with one collective.

        Raises:
            TypeError: The weight is a parameter (between="train") that `fully_shard` has sharded.
            ValueError: The rule gave a weight that is not finite (where that can be told without
                a synchronisation), or, with nonfinite="raise", the features of another rank are
                not finite or the correlation overflows. The step is dropped on every rank: what
                was gathered for it is gone, and the state is as it was.
            RuntimeError: A rank is gone, or did not close the step within the timeout of the
                process group.
        """
        _close_by_hand([self])

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Close a step after every `optimizer.step()`; replaces an earlier attachment.

        All heads that one optimizer closes share one collective over the ranks; where the forward
        passes come before `optimizer.step()`, and not in a closure, it runs beside the optimizer's
        own work.

        A step that a gradient scaler skips is no step: what was gathered for it is dropped, once
        its gradients are None, as `zero_grad()` leaves them by default.

        Args:
            optimizer: The optimizer of the model in front of the head.

        Raises:
            TypeError: Not a `torch.optim.Optimizer`.
        """
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.detach()
        _closings.setdefault(optimizer, _Closing()).add(self, optimizer)
        self._optimizer = weakref.ref(optimizer)

    def detach(self) -> None:
        """Undo `attach`; without effect where there is no attachment."""
        if self._optimizer is not None and (optimizer := self._optimizer()) is not None:
            _closings[optimizer].remove(self)
        self._optimizer = None

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"{self.dim}, between={self.between!r}, {options}"

    def _see_backward(self, grad: Tensor) -> None:
        self._backward_seen = True

    def _settle(self) -> None:
        """Close or drop what went through a backward, before the next forward gathers."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is None:
            if not self._stepped_by_hand:
                _close(*_merge([self]))
        elif all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            self._drop()

    @torch.no_grad()
    def _gather(self, z: Tensor) -> None:
        with _full_precision(z.device):
            gathered = moments(z, self.correlation.dtype)
        # Among ranks the step raises, on all of them: one that raised here would leave the others
        # waiting for it.
        alone = not several(self.process_group)
        if self.options.nonfinite == "raise" and alone and not is_finite(gathered):
            raise ValueError(describe_nonfinite(z))
        self._gathered = gathered if self._gathered is None else merge(self._gathered, gathered)

    def _nothing(self) -> Moments:
        return Moments(torch.zeros_like(self.correlation), torch.zeros_like(self.mean), 0)

    def _drop(self) -> None:
        self._gathered, self._backward_seen = None, False

    @torch.no_grad()
    def _advance(self, batch: Moments, abandoned: Tensor | None) -> None:
        """Close the step; where `abandoned` (0-d bool) holds, without any change to the state."""
        self._drop()
        if hasattr(self.weight, "full_tensor"):  # a DTensor
            raise TypeError(
                "fully_shard has sharded the weight of a head with between='train': take 'hold', "
                "with which it is a buffer"
            )
        if isinstance(batch.rows, Tensor):  # of all ranks, which may have none
            empty = batch.rows == 0
            abandoned = empty if abandoned is None else abandoned | empty
        # On the host the values are known, and what is not due need not be computed.
        known = self.options.nonfinite == "raise" or (
            on_host(self.weight) and not torch.compiler.is_compiling()
        )
        before = self._state()
        if known:
            if abandoned:
                return
            if self.options.nonfinite == "raise" and not is_finite(batch):
                raise ValueError("the features of the step, or their correlation, are not finite")
            before = before._replace(step_count=int(self.step_count), skipped=int(self.skipped))
        with _full_precision(self.weight.device):
            after = advance(before, batch, self.options, known)
        for name, value in after._asdict().items():
            old = getattr(self, name)
            new = torch.as_tensor(value, device=old.device)
            # In place, so that a captured CUDA graph and references to the buffer stay valid.
            old.copy_(new if known or abandoned is None else torch.where(abandoned, old, new))

    def _state(self) -> State:
        return State(*(getattr(self, name).detach() for name in State._fields))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DirectPredHead:
        """Move the state, in float32 or better also where the model goes to half precision."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return x.to(moved.device) if narrow else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if self._gathered is not None:
            outer, total, rows = self._gathered
            self._gathered = Moments(move(outer), move(total), rows)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in to_dict(self._state(), self._gathered).items():
            destination.setdefault(prefix + name, torch.as_tensor(value))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load all or nothing: where an entry is missing or wrong, the head stays as it was."""
        expected = to_dict(self._state(), None).keys()
        entries = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        missing = [prefix + name for name in expected if name not in entries]
        unexpected = [n for n in entries if n not in expected and not n.startswith("accumulated_")]
        missing_keys += missing
        unexpected_keys += [prefix + name for name in unexpected]
        if missing or (strict and unexpected):
            return
        try:
            state, gathered = from_dict(
                {name: x for name, x in entries.items() if name not in unexpected}, self.dim
            )
            state = moved(state, self.mean, self.mean.dtype)
            gathered = gathered and moved(gathered, self.mean, self.mean.dtype)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
            return
        with torch.no_grad():
            for name, value in state._asdict().items():
                getattr(self, name).copy_(torch.as_tensor(value))
        self._gathered = gathered
        self._backward_seen = False

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "a DirectPredHead cannot be replicated by nn.DataParallel, whose copies forget what "
            "they gather: take torch.nn.parallel.DistributedDataParallel"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: an optimizer's hook belongs to the original."""
        return {**self.__dict__, "_optimizer": None}


def step(model: nn.Module) -> None:
    """Close the step of every head in a model, with one collective over the ranks for all of them.

    For a training loop that attaches its heads to no optimizer; see `DirectPredHead.step`.

    Args:
        model: A module with heads anywhere in it.

    Raises:
        ValueError: There is no head in the model; or as `DirectPredHead.step`.
        RuntimeError: As `DirectPredHead.step`.
    """
    heads = [module for module in model.modules() if isinstance(module, DirectPredHead)]
    if not heads:
        raise ValueError(f"there is no DirectPredHead in {type(model).__name__}")
    _close_by_hand(heads)


def _close_by_hand(heads: Sequence[DirectPredHead]) -> None:
    for head in heads:
        head._stepped_by_hand = True
    _close(*_merge(heads))


Merging: TypeAlias = Callable[[], Sequence[Moments | None]]
"""Waits for what each of some heads has gathered on all ranks; None for nothing."""


def _merge(heads: Sequence[DirectPredHead]) -> tuple[Sequence[DirectPredHead], Merging]:
    """Start to merge what heads have gathered over the ranks, those without rows included."""
    gathered = [head._gathered for head in heads]
    apart = [i for i, head in enumerate(heads) if several(head.process_group)]
    if not apart:
        return heads, lambda: gathered
    with torch.no_grad():
        wait = sum_over_ranks(
            [gathered[i] or heads[i]._nothing() for i in apart],
            [heads[i].process_group for i in apart],
        )

    def merged() -> Sequence[Moments | None]:
        sums = dict(zip(apart, wait(), strict=True))
        return [sums.get(i, batch) for i, batch in enumerate(gathered)]

    return heads, merged


def _close(
    heads: Sequence[DirectPredHead], merging: Merging, abandoned: Tensor | None = None
) -> None:
    """Close the step of all the heads; one that raises does not keep the others from it."""
    error: ValueError | None = None
    for head, batch in zip(heads, merging(), strict=True):
        try:
            if batch is not None:
                head._advance(batch, abandoned)
        except ValueError as raised:
            error = error or raised
    if error is not None:
        raise error


class _Closing:
    """The hooks of one optimizer that close the step of the heads attached to it."""

    def __init__(self) -> None:
        self.heads: list[weakref.ref[DirectPredHead]] = []
        self.underway: tuple[Sequence[DirectPredHead], Merging] | None = None
        self.handles: list[RemovableHandle] = []

    def add(self, head: DirectPredHead, optimizer: torch.optim.Optimizer) -> None:
        self.heads.append(weakref.ref(head))
        if not self.handles:
            self.handles = [
                optimizer.register_step_pre_hook(self.before),
                optimizer.register_step_post_hook(self.after),
            ]

    def remove(self, head: DirectPredHead) -> None:
        self.heads = [each for each in self.heads if each() not in (None, head)]
        if not self.heads:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:  # a closure's forward passes are still to come
            self.underway = self.merge()

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        heads, merging = self.underway or self.merge()
        self.underway = None
        # Set by a gradient scaler on optimizers that do the skipping themselves (fused).
        found_inf = getattr(optimizer, "found_inf", None)
        _close(heads, merging, None if found_inf is None else found_inf.any())

    def merge(self) -> tuple[Sequence[DirectPredHead], Merging]:
        return _merge([head for each in self.heads if (head := each()) is not None])


_closings: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Closing] = weakref.WeakKeyDictionary()


def _in_backward() -> bool:
    """Tell whether this runs within a backward pass, as `torch.utils.checkpoint` tells it."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 as float32: neither in autocast's dtype nor in TF32 or bfloat16.

    Code being compiled keeps the precision that the user has set, which dynamo cannot change.
    """
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():
            yield
            return
        before = [(matmul, matmul.fp32_precision) for matmul in _MATMULS]
        for matmul in _MATMULS:
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            for matmul, precision in before:
                matmul.fp32_precision = precision


_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def _as_constants() -> None:
    """Tell dynamo what array-api-compat finds out about tensors, by caches it warns about."""

    def namespace(*xs: Tensor, **kwargs: Any) -> Any:
        return array_api_compat.torch

    for original, known in (
        (array_api_compat.array_namespace, namespace),
        (array_api_compat.is_array_api_obj, lambda x: isinstance(x, Tensor)),
        (array_api_compat.device, lambda x: x.device),
    ):
        torch.compiler.substitute_in_graph(original, skip_signature_check=True)(known)


_as_constants()
