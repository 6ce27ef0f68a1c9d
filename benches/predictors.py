"""The predictors that are measured, each as a closure that takes one whole step.

A step is the forward pass of the predictor on one view or two, the cosine loss to fixed targets,
the backward pass to the features, and the update: an optimizer's step, or the new weight.
`identity` has no predictor: what it costs is the loss, and nobody can be below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import directpred as dp
from benches.published import Published
from directpred.torch import DirectPredHead

NAMES = [
    "identity",
    "learned linear",
    "2-layer",
    "DirectPred, eigh",
    "DirectPred, matmul",
    "DirectCopy",
    "published",
]
REFERENCE = "DirectPred"
"""DirectPred with solver="auto": what the others are compared to."""

NO_GRAPH = "DirectPred, no graph"
"""The same where every closing launches its kernels one by one; on a GPU only."""

HIDDEN = {128: 512, 256: 4096, 2048: 512}
"""Width of the learned 2-layer predictor: of the published code, of BYOL, of SimSiam."""

Update = Callable[[], object]


def two_layer(dim: int) -> nn.Module:
    """The learned 2-layer predictor that is in use at that dim.

    In the published code its BatchNorm has no affine part, in BYOL and SimSiam it has.
    """
    hidden = HIDDEN[dim]
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden, affine=dim != 128),
        nn.ReLU(),
        nn.Linear(hidden, dim),
    )


def build(name: str, dim: int, device: str = "cpu", freq: int = 1) -> tuple[nn.Module, Update]:
    """Make the predictor of that name, and what updates it after a backward pass."""
    if name == "identity":
        return nn.Identity(), lambda: None
    if name == "published":
        published = Published(dim).to(device)
        return published, published.step
    if name.startswith("Direct"):
        rule = dp.DirectCopy() if name == "DirectCopy" else dp.Eq18()
        variant = name.partition(", ")[2]
        solver = variant if variant in ("eigh", "matmul") else "auto"
        graphs = name != NO_GRAPH
        head = DirectPredHead(
            dim, rule=rule, freq=freq, solver=solver, graphs=graphs, device=device
        )
        return head, head.step
    learned = nn.Linear(dim, dim, bias=False) if name == "learned linear" else two_layer(dim)
    learned.to(device)
    optimizer = torch.optim.SGD(learned.parameters(), lr=1e-3, momentum=0.9, weight_decay=4e-4)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return learned, update


def features(dim: int, rows: int, device: str = "cpu") -> list[Tensor]:
    """Four batches (rows, dim) with a correlation that falls off as 1 / j, as trained features do.

    More than one, so that the moving average has the rank that it has in training.
    """
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim))[0]
    scale = torch.arange(1, dim + 1) ** -0.5
    return [((torch.randn(rows, dim) * scale) @ basis).to(device) for _ in range(4)]


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of BYOL on one view: −2 cos, the mean over rows."""
    return -2 * nn.functional.cosine_similarity(prediction, target).mean()


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def step(name: str, dim: int, rows: int, device: str = "cpu", views: int = 1) -> Callable[[], None]:
    """Make the closure that takes one step of the predictor of that name.

    Args:
        name: The predictor.
        dim: Width of the features.
        rows: Of each view.
        device: Where.
        views: Forward passes in a step; one backward pass and one update follow.
    """
    batches = features(dim, rows, device)
    target = batches[-1].roll(1, dims=0)
    stream = itertools.cycle([z.requires_grad_() for z in batches])
    predictor, update = build(name, dim, device)

    def run() -> None:
        losses = []
        for z in itertools.islice(stream, views):
            z.grad = None
            losses.append(loss(predictor(z), target))
        sum(losses[1:], losses[0]).backward()
        update()
        synchronize(device)

    return run
