"""A whole training step of BYOL on CIFAR-sized images: what the predictor adds to it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benches.conftest import Bench, difference
from benches.predictors import NO_GRAPH, build, loss, step, synchronize

DIM = 128


def training_step(name: str, device: str, images: int, size: int) -> Callable[[], None]:
    """The published small-image recipe: ResNet-18 with the CIFAR stem, projector 512-512-128."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    online = models.resnet18()
    online.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    online.maxpool = nn.Identity()
    online.fc = nn.Sequential(
        nn.Linear(512, 512), nn.BatchNorm1d(512, affine=False), nn.ReLU(), nn.Linear(512, DIM)
    )
    online.to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    predictor, update = build(name, DIM, device)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.03, momentum=0.9, weight_decay=4e-4)
    views = torch.randn(2, images, 3, size, size, device=device)

    def run() -> None:
        total = torch.zeros((), device=device)
        for view, other in (views, views.flip(0)):
            with torch.no_grad():
                wanted = target(other)
            total = total + loss(predictor(online(view)), wanted)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        update()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 0.004)
        synchronize(device)

    return run


@pytest.mark.parametrize("name", ["DirectPred", NO_GRAPH, "DirectCopy", "2-layer"])
def test_training_step(bench: Bench, device: str, name: str) -> None:
    if name == NO_GRAPH and device == "cpu":
        pytest.skip("a recorded closing is one on a GPU")
    images, size, rounds = (128 if device == "cuda" else 16), 32, 50
    if bench.rehearsal:
        images, size, rounds = 2, 8, 2
    # A share of one in a hundred wants many rounds.
    bench.seconds *= 30 if device == "cuda" else 15
    # A step of the network takes seconds on a CPU, and its noise hides what the predictor adds.
    alone = difference(
        step(name, DIM, images, device, 2), step("identity", DIM, images, device, 2), rounds
    )
    bench.time(
        training_step(name, device, images, size),
        training_step("identity", device, images, size),
        "identity",
        group="training",
        name=name,
        dim=DIM,
        rows=images,
        alone_s=alone,
    )
