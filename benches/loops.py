"""Training loops with something odd at random moments: does F̂ hold what it should?

Each loop trains a small encoder for some steps of one to four micro-batches, with a head that is
attached, closed by hand, or left to find its optimizer. It keeps the features that a gradient
reached; F̂ has to be their moving average, computed here in float64.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from directpred.torch import DirectPredHead

STEPS, DIM, RHO = 12, 6, 0.3


class Loop:
    """One training loop, drawn at random.

    Args:
        seed: Of everything.
        make: Makes the optimizer.
    """

    def __init__(self, seed: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.head = DirectPredHead(DIM, rho=RHO)
        self.optimizer = make([*self.encoder.parameters()])
        self.closes = self.random.choice(["found", "attached", "by hand"])
        if self.closes == "attached":
            self.head.attach(self.optimizer)
        self.waiting: list[Tensor] = []
        self.correlation: np.ndarray | None = None  # type: ignore[type-arg]

    def forward(self, scale: float = 1.0, counts: bool = True) -> Tensor:
        """Pass a batch of random size; its rows are due to enter, if it counts."""
        z = self.encoder(scale * torch.randn(self.random.randint(2, 32), 8))
        if counts:
            self.waiting.append(z.detach().double())
        return self.head(z).square().mean()  # type: ignore[no-any-return]

    def micro_batches(self) -> None:
        """Forward and backward passes of a step."""
        for _ in range(self.random.randint(1, 4)):
            self.forward().backward()

    def step(self) -> None:
        """End a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.closes == "by hand":
            self.head.step()
        self.closed()

    def closed(self) -> None:
        """What waited has entered."""
        rows = torch.cat(self.waiting).numpy()
        batch = rows.T @ rows / len(rows)
        old = batch if self.correlation is None else self.correlation
        self.correlation = RHO * old + (1 - RHO) * batch
        self.waiting = []

    def holds(self) -> bool:
        """Tell whether F̂ is what it should be."""
        error = np.abs(self.head.correlation.double().numpy() - self.correlation).max()
        return bool(error <= 1e-4 * np.abs(self.correlation).max())


def nothing(loop: Loop) -> None:
    """Nothing odd."""


def left_out(loop: Loop) -> None:
    """A batch that the loop leaves out: its loss is NaN, or it is an outlier."""
    loop.forward(loop.random.choice([math.nan, 1e3]), counts=False)


def looked_at(loop: Loop) -> None:
    """A pass for validation, under `no_grad` or not, in training mode."""
    with torch.set_grad_enabled(loop.random.random() < 0.5):
        loop.forward(30.0, counts=False)


def spoilt(loop: Loop) -> None:
    """A micro-batch of rows that are not finite."""
    loop.forward(math.inf, counts=False).backward()
    for p in loop.encoder.parameters():
        p.grad = None


def failed(loop: Loop) -> None:
    """An exception in the loss, between forward and backward."""
    try:
        loop.forward(counts=False)
        raise ArithmeticError
    except ArithmeticError:
        pass


def moved(loop: Loop) -> None:
    """A micro-batch whose gradients go elsewhere, as with master weights: none is left."""
    torch.autograd.grad(loop.forward(), [*loop.encoder.parameters()])


def skipped(loop: Loop) -> None:
    """A step that a gradient scaler leaves out; its rows join the next."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(loop.forward() * math.inf).backward()
    scaler.step(loop.optimizer)
    scaler.update()
    loop.optimizer.zero_grad()


def twice(loop: Loop) -> None:
    """Two backward passes through one forward pass."""
    loss = loop.forward()
    loss.backward(retain_graph=True)
    loss.backward()


class TwoSteps(torch.optim.Optimizer):
    """An optimizer as SAM's: the loop never calls its `step`."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.05)

    def step(self, closure: object = None) -> None:
        """Take the second of the two steps."""
        raise NotImplementedError


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make a plain optimizer."""
    return torch.optim.SGD(parameters, lr=0.05)


EVENTS = (nothing, left_out, looked_at, spoilt, failed, moved, skipped, twice)


def broken(event: Callable[[Loop], None], seed: int) -> bool:
    """Train with an event at random moments; tell whether F̂ held."""
    loop = Loop(seed, sgd)
    for _ in range(STEPS):
        for _ in range(loop.random.randint(0, 2)):
            event(loop)
        loop.micro_batches()
        if loop.random.random() < 0.5:
            event(loop)
        loop.step()
    return loop.holds()


def two_steps(seed: int) -> bool:
    """Train as with SAM, the head found or attached to the optimizer that never steps."""
    loop = Loop(seed, TwoSteps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer attached to never steps
        for _ in range(STEPS):
            loop.micro_batches()
            loop.optimizer.zero_grad()
            loop.micro_batches()
            loop.optimizer.base.step()  # type: ignore[attr-defined]
            if loop.closes == "by hand":
                loop.head.step()
            loop.closed()
    return loop.holds()


def made_anew(seed: int) -> bool:
    """Train in stages, each with a new optimizer, while the old ones are kept."""
    loop, old = Loop(seed, sgd), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        for step in range(STEPS):
            if step % 4 == 0:
                old.append(loop.optimizer)
                loop.optimizer = sgd([*loop.encoder.parameters()])
            loop.micro_batches()
            loop.step()
    return loop.holds()


def rows(loops: int) -> Iterator[tuple[str, int, str]]:
    """Run so many loops of each kind: what is odd, how many held, and what has to hold."""
    for event in EVENTS:
        held = sum(broken(event, seed) for seed in range(loops))
        yield f"loops: {_name(event)}", held, "F̂ is of the rows that a gradient reached"
    for kind in (two_steps, made_anew):
        held = sum(kind(seed) for seed in range(loops))
        yield f"loops: {_name(kind)}", held, "the same"


def _name(kind: Callable[..., object]) -> str:
    text = str(kind.__doc__).rstrip(".")
    return text[0].lower() + text[1:]
