"""DirectPredHead: DirectPred as a `torch.nn.Module` that stands where the learned predictor stood.

The order of events in a step is the published one: the forward passes apply the weight of the
step before and gather statistics; backward; optimizer step; then the new weight is set.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import array_api_compat.torch  # noqa: F401 - which dynamo expects to be there
import torch
import torch.distributed as dist
from torch import Tensor, nn

from directpred.array import assign, on_host
from directpred.correlation import Moments, is_finite, merge, moments
from directpred.features import check_dim, check_features, describe_nonfinite
from directpred.method import NonFinite, Options, advance
from directpred.recorded import Recorder, written
from directpred.solvers import SolverName
from directpred.spectrum import Eq18, Rule
from directpred.state import State, from_dict, initial_state, moved, to_dict, to_numpy
from directpred.torch.closing import Attached, Pending, attached, close_by_hand
from directpred.torch.graph import capturing, record
from directpred.torch.precision import full_precision
from directpred.torch.ranks import several


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
        freq: Set the weight every freq-th step, whatever the steps held.
        between: What happens to the weight from one setting to the next: "hold" it (it is a buffer
            and the head has no parameters), or "train" it (it is a parameter, for an optimizer).
        center: Whether the weight comes from the centred correlation; its precision is that of
            `directpred.DirectPred`.
        solver: As `directpred.DirectPred`.
        nonfinite: "skip" a step with features that are not finite and count it in `skipped`, which
            on a GPU needs no synchronisation with the host; or "raise" a `ValueError` in the
            forward pass, and with several ranks when the step is closed.
        process_group: The ranks to merge over; by default all.
        graphs: Whether, on a GPU, the head records a CUDA graph of the closing of a step, after two
            of them, and replays it from then on. The environment variable ``DIRECTPRED_GRAPHS=0``
            turns it off too. A rule that needs an eigendecomposition cannot be recorded.
        device: Of the state.
        dtype: Of the state, float32 (the default) or float64.

    Attributes:
        weight: W_p, (dim, dim), the identity until the first step is closed.
        correlation: F̂ of Eq. 19, (dim, dim), uncentred.
        mean: Moving average of the features' mean, (dim,).
        step_count: Number of steps that entered F̂, 0-d int64.
        skipped: Number of steps left out because they were not finite, 0-d int64.
        closings: Number of steps closed, whatever they held, on which freq counts, 0-d int64.

    Raises:
        TypeError, ValueError: An option is of the wrong type or out of range.
    """

    weight: Tensor
    correlation: Tensor
    mean: Tensor
    step_count: Tensor
    skipped: Tensor
    closings: Tensor

    def __init__(
        self,
        dim: int,
        rule: Rule = Eq18(),  # noqa: B008 - frozen
        *,
        rho: float = 0.3,
        freq: int = 1,
        between: Literal["hold", "train"] = "hold",
        center: bool = False,
        solver: SolverName = "auto",
        nonfinite: NonFinite = "skip",
        process_group: dist.ProcessGroup | None = None,
        graphs: bool = True,
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
            counts = isinstance(value, int)
            tensor = torch.as_tensor(
                value, device=device, dtype=torch.int64 if counts else dtype or torch.float32
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
        self._recorder = Recorder(record if graphs else None)
        # `closings`, known without a synchronisation; None where only the device knows.
        self._closed: int | None = 0

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
        close_by_hand([self])

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
        attached.setdefault(optimizer, Attached()).add(self, optimizer)
        self._optimizer = weakref.ref(optimizer)

    def detach(self) -> None:
        """Undo `attach`; without effect where there is no attachment."""
        if self._optimizer is not None and (optimizer := self._optimizer()) is not None:
            attached[optimizer].remove(self)
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
                Pending([self]).close()
        elif all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            self._drop()

    @torch.no_grad()
    def _gather(self, z: Tensor) -> None:
        with full_precision(z.device):
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
    def _close(self, batch: Moments, skipped: Tensor | None) -> None:
        """Close the step; where `skipped` (0-d bool) holds, the batch does not enter."""
        self._drop()
        if hasattr(self.weight, "full_tensor"):  # a DTensor
            raise TypeError(
                "fully_shard has sharded the weight of a head with between='train': take 'hold', "
                "with which it is a buffer"
            )
        # Of all ranks, which may have no rows.
        counts: Any = batch.rows > 0 if isinstance(batch.rows, Tensor) else True
        if skipped is not None:
            counts = ~skipped & counts
        state = self._state()
        # Nobody is there to decide or to raise when it runs.
        unattended = torch.compiler.is_compiling() or capturing(self.weight)
        with full_precision(self.weight.device):
            if unattended and self.options.nonfinite == "skip":
                self._closed = None
                written(state, advance(state, batch, self.options, False, counts))
            elif on_host(self.weight):
                numbers = {name: int(getattr(state, name)) for name in State._fields[3:]}
                after = advance(state._replace(**numbers), batch, self.options, True, counts)
                assign(state[:3], after[:3])  # in place: references to the buffers stay valid
                for count, value in zip(state[3:], after[3:], strict=True):
                    count.fill_(value)
                self._closed = after.closings
            else:
                closed = int(self.closings) if self._closed is None else self._closed
                self._recorder.close(state, batch, self.options, counts, closed)
                self._closed = closed + 1

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
        entries = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        expected = [*to_dict(self._state(), None)]
        if to_numpy(entries.get("version")).tolist() in (1, 2):
            expected.remove("closings")
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
        self._closed = state.closings
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


def _in_backward() -> bool:
    """Tell whether this runs within a backward pass, as `torch.utils.checkpoint` tells it."""
    return bool(torch._C._current_graph_task_id() != -1)
