"""DirectPredHead: DirectPred as a `torch.nn.Module` that stands where the learned predictor stood.

The order of events in a step is the published one: the forward passes apply the weight of the
step before and gather statistics; backward; optimizer step; then the new weight is set.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import array_api_compat.torch  # noqa: F401 - which dynamo expects to be there
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.hooks import unserializable_hook

from directpred.array import assign, on_host, widest
from directpred.correlation import Moments, cast, is_finite, merge_finite, moments
from directpred.features import check_dim, check_features, describe_nonfinite
from directpred.method import NonFinite, Options, advance
from directpred.metrics import diagnostics
from directpred.prediction import predict
from directpred.recorded import Recorder, written
from directpred.solvers import SolverName
from directpred.spectrum import Eq18, Rule
from directpred.state import VERSION, State, from_dict, initial_state, moved, to_numpy
from directpred.torch.closing import (
    Attached,
    Pending,
    Watch,
    after_backward,
    attached,
    close_by_hand,
    in_backward,
)
from directpred.torch.graph import capturing, record
from directpred.torch.owner import LONG, Leaves, leaves, register, search
from directpred.torch.precision import full_precision
from directpred.torch.ranks import Kept, several, version
from directpred.torch.wrappers import unwrapped

MANY = 16
"""Forward passes of a step from which on they are summed in float64: rounding adds up."""


class DirectPredHead(nn.Module):
    """A predictor head without trained parameters, for BYOL, SimSiam and their like.

    In training mode `head(z)` is z @ weight and gathers the statistics of z, without grad and in
    float32 or better also under autocast; gradient flows through to z. The rows of z belong to a
    step once a gradient has reached `head(z)`: a forward pass without a backward pass (validation,
    logging, a batch that the loop leaves out) never enters.

    A *step* ends with the new weight. The head closes it after the step of the optimizer that holds
    the parameters in front of it, however many forward and backward passes came before. It finds
    this optimizer by itself; `attach(optimizer)` names it. A loop may also call `head.step()` after
    every `optimizer.step()`. Where no optimizer of PyTorch holds the parameters, the head says so
    once, and closes a step at the first forward pass after a backward pass.

    - A gradient scaler that leaves out a step leaves its rows for the next one, but those that are
      not finite. With fused optimizers, which leave out the step themselves, they are dropped.
    - Code that autograd's hooks cannot see gathers at once: `torch.compile` and `torch.func`.
    - In evaluation mode the weight is applied and nothing is gathered.

    Statistics are merged over the ranks of the process group where `torch.distributed` is
    initialised, so every rank has the weight of the global batch; every rank must close the step,
    one without rows too. If that may be so in the very first step, attach the head. Features that
    are not finite on one rank are treated alike on all: the step is skipped, or with
    nonfinite="raise" raises on every rank when it is closed.

    Example:
        >>> import torch
        >>> encoder = torch.nn.Linear(8, 4)
        >>> head = DirectPredHead(4)
        >>> optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03)
        >>> head(encoder(torch.randn(16, 8))).square().mean().backward()
        >>> optimizer.step()
        >>> int(head.step_count)
        1

    Args:
        dim: Width of the features.
        rule: Spectral rule, one of `directpred.spectrum` or any callable s -> p.
        rho: Weight of the old correlation in the moving average, in [0, 1).
        freq: Set the weight every freq-th step, whatever the steps held. With several ranks on a
            GPU a step in which no rank had rows counts too, which none of them knows.
        between: What happens to the weight from one setting to the next: "hold" it (it is a buffer
            and the head has no parameters), or "train" it (it is a parameter, for an optimizer).
        center: Whether the weight comes from the centred correlation; its precision is that of
            `directpred.DirectPred`.
        solver: As `directpred.DirectPred`.
        nonfinite: "skip" forward passes with features that are not finite, and count a step that
            has no others in `skipped`, which on a GPU needs no synchronisation with the host; or
            "raise" a `ValueError` in the forward pass, and with several ranks when the step is
            closed.
        channel_dim: The axis of the features, of which all others are rows: 1 for the maps
            (n, c, h, w) of convolutions. By default the last, of at most three.
        process_group: The ranks to merge over; by default all. With a group the state is that of
            the group's own rows, also where DistributedDataParallel broadcasts the buffers.
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
    version: Tensor
    accumulated_outer: Tensor
    accumulated_total: Tensor
    accumulated_rows: Tensor

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
        channel_dim: int | None = None,
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
        if channel_dim is not None and type(channel_dim) is not int:
            raise TypeError(f"channel_dim must be an integer or None, got {channel_dim!r}")
        self.between = between
        self.channel_dim = channel_dim
        self.process_group = process_group
        device = torch.get_default_device() if device is None else device
        for name, value in _initial_buffers(self.dim).items():
            dtype_ = dtype if value.is_floating_point() else None
            tensor = value.to(device, dtype_, copy=True)
            if name == "weight" and between == "train":
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self._recorder = Recorder(record if graphs else None)
        # What is gathered is no buffer: DistributedDataParallel would overwrite it with that of
        # rank 0. The buffers of that name are its picture in `state_dict`, whose keys are constant.
        self._watch = Watch()
        self._kept = Kept()
        register(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to the state before the first step; for modules made on the meta device."""
        for name, value in _initial_buffers(self.dim).items():
            getattr(self, name).copy_(value)
        self._watch.drop()
        self._wrote(0)

    def forward(self, z: Tensor) -> Tensor:
        """Predict: z @ weight; in training mode also gather the statistics of z.

        Args:
            z: Features, (n, dim) or (m, n, dim), any floating dtype; with `channel_dim` of any
                shape with that axis of width dim. No rows give no predictions; in evaluation mode
                one row may also be (dim,).

        Returns:
            The prediction, in the shape and dtype of z (of autocast where that is on).

        Raises:
            TypeError: z is not a floating tensor.
            ValueError: z is of another width or device, it is not clear which axis holds the
                features, or, with nonfinite="raise", z is not finite. Nothing of it has then been
                gathered.
        """
        if isinstance(z, torch.fx.Proxy):
            return _traced(self, z)
        rows, axis = self._rows(z), self.channel_dim
        prediction = self._predict(rows)
        return prediction if rows is z or axis is None else prediction.movedim(-1, axis)

    def step(self) -> None:
        """Close the step: merge over ranks, move the correlation, set the weight where due.

        Call it after `optimizer.step()`, and not after one that a gradient scaler skipped. Does
        nothing where no gradient has reached the head since the last step. The function `step`
        closes all heads of a model with one collective.

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

    def discard(self) -> None:
        """Drop the rows that wait for the end of the step, such as those of a step left out.

        With several ranks call it on all of them, or on none.
        """
        self._watch.drop()

    @torch.no_grad()
    def gather(self, z: Tensor) -> None:
        """Gather the statistics of features for the coming step, whatever becomes of them.

        For code in which no gradient reaches the head by autograd; `forward` does it elsewhere.

        Args:
            z: Features, as for `forward`; at least one row.

        Raises:
            TypeError, ValueError: As `forward`. Nothing has then been gathered.
        """
        if (rows := self._rows(z)).numel():
            self._enter(self._moments(rows.detach().reshape(-1, self.dim)))

    def diagnostics(self) -> dict[str, float]:
        """Return what tells whether the features collapse; see `directpred.metrics.diagnostics`.

        It waits for the device.
        """
        return diagnostics(self.weight, self.correlation, self.mean)

    def attach(self, optimizer: Any) -> None:
        """Close a step after every `optimizer.step()`; replaces an earlier attachment.

        Without it a head finds the optimizer by itself. It looks through wrappers, as those of
        accelerate, Lightning, LARC or SAM; `directpred.torch.wrappers.unwrapped` says how. All
        heads that one optimizer closes share one collective over the ranks; where the forward
        passes come before `optimizer.step()`, and not in a closure, it runs beside the optimizer's
        own work.

        Args:
            optimizer: The optimizer of the model in front of the head, or a wrapper around it.

        Raises:
            TypeError: No `torch.optim.Optimizer`, and none is in it, or several.
        """
        self._follow(unwrapped(optimizer))
        self._watch.attached = True
        self._watch.by_hand = False

    def detach(self) -> None:
        """Undo `attach`; without effect where there is no attachment."""
        watch = self._watch
        if (optimizer := watch.followed()) is not None:
            attached[optimizer].remove(self)
        watch.optimizer, watch.attached = None, False

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"{self.dim}, between={self.between!r}, {options}"

    def _rows(self, z: Tensor) -> Tensor:
        """Check features, and return them with their axis last: z itself where it is."""
        if not isinstance(z, Tensor):
            raise TypeError(f"features must be a torch.Tensor, got {type(z).__name__}")
        one, axis = z.ndim == 1 and not self.training, self.channel_dim
        rows = z
        if axis is not None and not one:
            if not -z.ndim <= axis < z.ndim or z.ndim < 2:
                raise ValueError(f"expected features along axis {axis}, got {tuple(z.shape)}")
            rows = z if axis in (-1, z.ndim - 1) else z.movedim(axis, -1)
        check_features(rows[None] if one else rows, self.dim, empty=True)
        if axis is None and (z.ndim > 3 or (z.ndim == 3 and z.shape[1] == self.dim)):
            raise ValueError(
                f"which axis of {tuple(z.shape)} holds the features? Take channel_dim=1 for maps "
                "(n, c, h, w) of a convolution, channel_dim=-1 where the last axis is theirs"
            )
        if z.device != self.weight.device:
            raise ValueError(f"expected features on {self.weight.device}, got some on {z.device}")
        return rows

    def _predict(self, z: Tensor) -> Tensor:
        self._restore()
        weight = self.weight
        prediction: Tensor
        compiling = torch.compiler.is_compiling()
        exporting = not compiling and torch._C._is_tracing()
        if z.is_meta or (not compiling and isinstance(z, FakeTensor)):  # no values
            return z @ weight.to(z.dtype)
        if not self.training or exporting or not z.numel():
            prediction = predict(z, weight)
            if prediction.requires_grad and not (compiling or exporting):
                self._notice_unused()
            return prediction
        hidden = compiling or torch._C._functorch.is_functorch_wrapped_tensor(z)
        if not hidden and self._watch.holds_rows() and not in_backward():
            self._settle(z)
        prediction = predict(z, weight)
        if hidden or prediction.requires_grad:
            with torch.no_grad():
                batch = self._moments(z.detach() if compiling else _without_transforms(z).detach())
            if hidden:  # from hooks
                self._enter(batch)
                if not compiling and self._watch.passes >= LONG:
                    self._say_long()
            else:
                node = z.grad_fn if z.grad_fn is not None else z
                prediction.register_hook(_Rows(self, batch, node))
        elif torch.is_grad_enabled():
            self._notice_unused()
        return prediction

    def _settle(self, z: Tensor) -> None:
        """Decide what becomes of rows that are there at the next forward pass, of z."""
        watch = self._watch
        if watch.by_hand:
            return
        if watch.followed() is None:
            watch.looks += 1
            if watch.looks & (watch.looks - 1) == 0:  # ever more seldom, since it takes time
                start = watch.node if watch.node is not None else z.grad_fn
                watch.found = search(None if start is None else leaves(start, self.weight))
            if watch.found == "none":
                self._say(
                    "alone",
                    "closes a step at every forward pass after a backward pass, since no "
                    "torch.optim.Optimizer holds the parameters in front of it. Call head.step() "
                    "after every update, or head.attach(optimizer)",
                )
                Pending([self]).close()
                return
            if watch.found == "others" and watch.stepped:
                self._say(
                    "others",
                    "does not know which optimizer steps the parameters in front of it, and closes "
                    "a step at the first forward pass after the step of any. Call "
                    "head.attach(optimizer)",
                )
                Pending([self]).close()
                return
        if watch.backwards >= LONG and not watch.foreign:
            self._say_long()
            watch.found = watch.found if watch.found == "owner" else "none"

    def _say_long(self) -> None:
        self._say(
            "long",
            f"has seen {LONG} backward passes and no step of its optimizer. If that is more than "
            "you accumulate, call head.attach(optimizer) with the optimizer whose step() runs, or "
            "head.step() after every update",
        )

    def _notice_idle(self, idle: bool) -> None:
        """Count a step of the optimizer that found no rows; say so where they are many."""
        watch = self._watch
        watch.idle = watch.idle + 1 if idle else 0
        if watch.idle == LONG and not (self.training and several(self.process_group)):
            cause = (
                "no gradient reaches what it returns in training mode"
                if self.training
                else "it is in evaluation mode: call model.train()"
            )
            self._say("idle", f"has gathered nothing in {LONG} steps of its optimizer: {cause}")

    def _notice_unused(self) -> None:
        """Count a pass of a head, attached to nothing, that never had rows but should have some."""
        watch = self._watch
        watch.unused += 1
        if watch.unused == LONG and not (watch.attached or watch.used):
            cause = (
                "what enters it takes no gradient"
                if self.training
                else "it is in evaluation mode: call model.train()"
            )
            self._say("idle", f"has gathered nothing in {LONG} forward passes: {cause}")

    def _say(self, key: str, what: str) -> None:
        """Warn of something, once."""
        if key not in self._watch.said:
            self._watch.said.add(key)
            warnings.warn(f"a {type(self).__name__}({self.dim}) {what}", stacklevel=3)

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Close a step after every step of an optimizer."""
        self.detach()
        attached.setdefault(optimizer, Attached()).add(self, optimizer)
        self._watch.optimizer = weakref.ref(optimizer)

    def _reached(self) -> Leaves | None:
        """The leaves that the last gradient reached, where autograd has shown them."""
        node = self._watch.node
        return None if node is None else leaves(node, self.weight)

    def _moments(self, z: Tensor) -> Moments:
        with full_precision(z.device):
            gathered = moments(z, self.correlation.dtype)
        # Among ranks the step raises, on all of them: one that raised here would leave the others
        # waiting for it.
        alone = not several(self.process_group)
        if self.options.nonfinite == "raise" and alone and not is_finite(gathered):
            raise ValueError(describe_nonfinite(z))
        return gathered

    def _enter(self, batch: Moments) -> None:
        """Let rows belong to the step."""
        watch = self._watch
        watch.used = True
        if torch.compiler.is_compiling():
            before, watch.passes = watch.gathered, 1
            watch.gathered = batch if before is None else merge_finite(before, batch)
            return
        with watch.lock:
            watch.passes += 1
            if watch.gathered is None:
                watch.gathered = batch
                return
            if watch.passes == MANY:
                watch.gathered = cast(watch.gathered, widest(batch.outer))
            watch.gathered = merge_finite(watch.gathered, cast(batch, watch.gathered.outer.dtype))

    def _nothing(self) -> Moments:
        return Moments(torch.zeros_like(self.correlation), torch.zeros_like(self.mean), 0)

    @torch.no_grad()
    def _close(self, batch: Moments, skipped: Tensor | None) -> None:
        """Close the step; where `skipped` (0-d bool) holds, the batch does not enter."""
        watch = self._watch
        watch.drop()
        self._restore()
        self._kept.keeps = True
        state = self._state()
        if self.between == "train" and hasattr(state.weight, "full_tensor"):  # a DTensor
            raise TypeError(
                "fully_shard has sharded the weight of a head with between='train': take 'hold', "
                "with which it is a buffer"
            )
        # Of all ranks, which may have no rows.
        counts: Any = batch.rows > 0 if isinstance(batch.rows, Tensor) else True
        if skipped is not None:
            counts = ~skipped & counts
        # Nobody is there to decide or to raise when it runs.
        unattended = torch.compiler.is_compiling() or capturing(state.weight)
        with full_precision(state.weight.device):
            if unattended and self.options.nonfinite == "skip":
                watch.closed = None
                written(state, advance(state, batch, self.options, False, counts))
            elif on_host(state.weight):
                if not int(batch.rows):
                    return
                before = State(*state[:3], *map(int, state[3:]))
                after = advance(before, batch, self.options, True, counts)
                assign(state[:3], after[:3])  # in place: references to the buffers stay valid
                for count, old, new in zip(state[3:], before[3:], after[3:], strict=True):
                    if new != old:
                        count.fill_(new)
                self._wrote(after.closings)
            else:
                closed = self._closings()
                self._recorder.close(state, batch, self.options, counts, closed)
                self._wrote(closed + 1)

    def _closings(self) -> int:
        """`closings`, without a synchronisation from the second on that this head has written.

        Before the first, another rank may have loaded them, and broadcast them to this one.
        """
        if self.options.freq == 1 or self.mean.is_meta:
            return 0  # it does not matter
        closed = self._watch.closed
        if closed is not None and closed[1] == version(self.closings):
            return closed[0]
        return int(self.closings)

    def _state(self) -> State:
        return State(*(getattr(self, name).detach() for name in State._fields))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DirectPredHead:
        """Move the state: counts stay integers, and what is float32 never becomes narrower."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            wide = x.is_floating_point() and moved.dtype in (torch.float32, torch.float64)
            return moved if wide or moved.dtype == x.dtype else x.to(moved.device)

        deferred = self.mean.is_meta
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if deferred and not self.mean.is_meta:
            self.reset_parameters()  # `to_empty` leaves what was in memory
        if self._watch.holds_rows() and (gathered := self._watch.gathered) is not None:
            outer, total, rows = gathered
            rows = rows.to(self.mean.device) if isinstance(rows, Tensor) else rows
            self._watch.gathered = Moments(move(outer), move(total), rows)
        self._wrote(self._closings())
        return self

    def _wrote(self, closings: int) -> None:
        """Remember that the state is as this head wrote it."""
        if self._watch.closed is not None and self.options.freq > 1:
            self._watch.closed = closings, version(self.closings)
        if self.process_group is not None and self._kept.keeps:
            self._kept.keep(self._own())

    def _own(self) -> list[Tensor]:
        return [getattr(self, name) for name in State._fields if name in self._buffers]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        gathered = (self._watch.holds_rows() and self._watch.gathered) or self._nothing()
        with torch.no_grad():
            for name, value in gathered._asdict().items():
                picture = getattr(self, f"accumulated_{name}")
                picture.copy_(value) if isinstance(value, Tensor) else picture.fill_(value)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _restore(self) -> None:
        """Undo what DistributedDataParallel has broadcast into the state of another group."""
        if self.process_group is not None and not torch.compiler.is_compiling():
            self._kept.restore(self._own())

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
        report = strict, missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *report)
        entries = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        place = prefix.removesuffix(".") or type(self).__name__
        if entries and "version" not in entries:
            warnings.warn(
                f"{place}: the checkpoint holds {', '.join(sorted(entries))}, a learned predictor, "
                "where the model has a DirectPredHead: load it before the predictor is replaced, "
                "or pass strict=False, which leaves the head as it is",
                stacklevel=2,
            )
        required = [*State._fields, "version"]
        if to_numpy(entries.get("version")).tolist() in (1, 2):
            required.remove("closings")
        missing = [prefix + name for name in required if name not in entries]
        unexpected = [name for name in entries if name not in self._buffer_names()]
        missing_keys += missing
        unexpected_keys += [prefix + name for name in unexpected]
        if missing or (strict and unexpected):
            return
        assigns = local_metadata.get("assign_to_params_buffers", False)
        if self.mean.is_meta and not assigns:
            warnings.warn(
                f"{place} is on the meta device, which holds no values: nothing is loaded. Pass "
                "assign=True",
                stacklevel=2,
            )
            return
        try:
            known = {name: _wide(x) for name, x in entries.items() if name not in unexpected}
            like = known["mean"] if assigns else self.mean
            state, gathered = from_dict(known, self.dim)
            state = moved(state, like, like.dtype)
            gathered = gathered and moved(gathered, like, like.dtype)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{place}: {error}")
            return
        if assigns:
            self._assign(like)
        with torch.no_grad():
            for name, value in state._asdict().items():
                getattr(self, name).copy_(torch.as_tensor(value, device=like.device))
        self._watch.drop()
        self._watch.used = True
        self._watch.gathered = gathered
        self._wrote(state.closings)

    def _buffer_names(self) -> list[str]:
        return [*State._fields, "version", *(f"accumulated_{x}" for x in Moments._fields)]

    def _assign(self, like: Tensor) -> None:
        """Put new tensors, on the device and in the dtype of another, in the place of all."""
        for name in self._buffer_names():
            before = getattr(self, name)
            dtype = like.dtype if before.is_floating_point() else before.dtype
            tensor = torch.zeros(before.shape, dtype=dtype, device=like.device)
            if isinstance(before, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
            setattr(self, name, tensor)
        self.version.fill_(VERSION)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "a DirectPredHead cannot be replicated by nn.DataParallel, whose copies forget what "
            "they gather: take torch.nn.parallel.DistributedDataParallel"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DirectPredHead:
        memo[id(self.process_group)] = self.process_group  # of which there is one
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def __copy__(self) -> DirectPredHead:
        copied = type(self).__new__(type(self))
        copied.__setstate__({**self.__dict__, "_watch": Watch()})
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "a DirectPredHead with a process_group cannot be pickled: save its state_dict()"
            )
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        made_since: dict[str, Any] = {"_watch": Watch(), "_kept": Kept(), "channel_dim": None}
        super().__setstate__(made_since | state)  # type: ignore[no-untyped-call]
        register(self)


@unserializable_hook
class _Rows:
    """The hook of a prediction: once a gradient has reached it, its rows belong to the step.

    They do when the backward pass is over: one that fails leaves nothing behind.
    """

    def __init__(self, head: DirectPredHead, batch: Moments, node: Any) -> None:
        self._head = head
        self._node = node  # in front of the head: that of the prediction holds this hook
        self._batch: Moments | None = batch

    def __call__(self, grad: Tensor) -> None:
        watch, task = self._head._watch, torch._C._current_graph_task_id()
        watch.backwards += task != watch.task
        watch.task, watch.node = task, self._node
        after_backward(self._enter)

    def _enter(self) -> None:
        batch, self._batch = self._batch, None  # a graph may be used twice
        if batch is not None:
            self._head._enter(batch)


def _without_transforms(z: Tensor) -> Tensor:
    """The tensor that transforms of `torch.func` have wrapped, with all rows of a vmap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(z):
        z = torch._C._functorch.get_unwrapped(z)
    return z


def _initial_buffers(dim: int) -> dict[str, Tensor]:
    """The state before the first step, and what stands beside it in `state_dict`, on the CPU."""
    values = initial_state(dim)._asdict() | {"version": VERSION, "accumulated_rows": 0}
    values |= {"accumulated_outer": values["correlation"], "accumulated_total": values["mean"]}
    return {
        name: torch.tensor(x, dtype=torch.int64, device="cpu")
        if isinstance(x, int)
        else torch.from_numpy(x)
        for name, x in values.items()
    }


def _wide(x: Any) -> Any:
    """An entry of a checkpoint, in float32 where it is narrower."""
    narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4
    return x.float() if narrow else x


def _traced(head: DirectPredHead, z: Any) -> Any:
    """Stand in a traced graph as a module that is called, as the modules of `torch.nn` do."""
    place = z.tracer.path_of_module(head)
    if not place:  # it is what is traced
        axis = -1 if head.channel_dim is None else head.channel_dim
        return (z.movedim(axis, -1) @ head.weight).movedim(-1, axis)
    return z.tracer.create_proxy("call_module", place, (z,), {})
