"""The linear probe with augmentation, on tiny images."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from directpred.reference_trainers.imagenet_probe import ImageNetProbe

CLASSES, WIDTH, EPOCHS = 7, 12, 4


class Batches:
    """Noise with a colour for each class; the last batch is smaller."""

    def __init__(self, seed: int, count: int = 3, classes: int = CLASSES) -> None:
        random = torch.Generator().manual_seed(seed)
        colours = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(9))
        self.made: list[tuple[Tensor, Tensor]] = []
        for i in range(count):
            rows = 8 if i < count - 1 else 5
            labels = torch.randint(classes, (rows,), generator=random)
            noise = torch.randn(rows, 3, 8, 8, generator=random)
            self.made.append((3 * colours[labels] + noise, labels))

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.made)


@pytest.fixture(autouse=True)
def no_foreign_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages add some to every trainer, which print and write."""
    registry = "lightning.fabric.utilities.registry"
    monkeypatch.setattr(f"{registry}.entry_points", lambda group: (), raising=False)


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ).train()


def trainer(path: Path, epochs: int = EPOCHS, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def by_hand(encoder: nn.Module, train: Batches, lr: float) -> tuple[Tensor, Tensor]:
    """Weight and bias after Nesterov's steps, written out."""
    encoder = copy.deepcopy(encoder).eval()
    weight = 0.01 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3))
    parameters = [weight, torch.zeros(CLASSES)]
    speeds = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(EPOCHS * len(train)):
        images, labels = train.made[step % len(train)]
        with torch.no_grad():
            x = encoder(images)
        residual = (x @ parameters[0].T + parameters[1]).softmax(1) - F.one_hot(labels, CLASSES)
        gradients = residual.T @ x / len(x), residual.mean(0)
        now = lr * (1 + math.cos(math.pi * step / (EPOCHS * len(train)))) / 2
        for parameter, speed, gradient in zip(parameters, speeds, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            parameter -= now * (gradient + 0.9 * speed)
    return parameters[0], parameters[1]


def test_it_is_nesterov_written_by_hand(encoder: nn.Module, tmp_path: Path) -> None:
    train, test = Batches(1), Batches(2, count=5)
    probe = ImageNetProbe(encoder, WIDTH, CLASSES, lr=0.5, seed=3)
    trainer(tmp_path).fit(probe, train, test)
    weight, bias = by_hand(encoder, train, lr=0.5)
    torch.testing.assert_close(probe.head.weight.detach(), weight)
    torch.testing.assert_close(probe.head.bias.detach(), bias)

    assert len(probe.history) == EPOCHS  # and not one more, of the trainer's sanity check
    frozen = copy.deepcopy(encoder).eval()
    with torch.no_grad():
        ranks = torch.cat([(frozen(x) @ weight.T + bias).argsort(1, True) for x, _ in test])
    right = ranks == torch.cat([labels for _, labels in test])[:, None]
    assert probe.history[-1].top1 == pytest.approx(100 * right[:, 0].float().mean().item())
    assert probe.history[-1].top5 == pytest.approx(100 * right[:, :5].sum(1).float().mean().item())
    assert probe.history[-1].top1 > 100 / CLASSES


def test_the_encoder_stays_as_it_is(encoder: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(encoder.state_dict())
    probe = ImageNetProbe(encoder, WIDTH, CLASSES, lr=0.5)
    trainer(tmp_path).fit(probe, Batches(1), Batches(2))
    for module in (encoder, probe.encoder):
        state = module.state_dict()
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_encoder_is_in_eval_mode_whatever_the_probe_is_in(encoder: nn.Module) -> None:
    probe = ImageNetProbe(encoder, WIDTH, CLASSES, lr=0.5)
    for mode in (True, False, True):
        assert probe.train(mode).head.training is mode
        assert not any(module.training for module in probe.encoder.modules())


def test_the_start_depends_on_the_seed_alone(encoder: nn.Module) -> None:
    before = torch.get_rng_state()
    first, same, other = (
        ImageNetProbe(encoder, WIDTH, CLASSES, 0.5, seed).head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_top5_of_few_classes(encoder: nn.Module, tmp_path: Path) -> None:
    probe = ImageNetProbe(encoder, WIDTH, 3, lr=0.5)
    trainer(tmp_path, epochs=1).fit(probe, Batches(1, classes=3), Batches(2, classes=3))
    assert probe.history[-1].top5 == 100


def test_batches_without_a_length(encoder: nn.Module, tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(Batches(1))

    probe = ImageNetProbe(encoder, WIDTH, CLASSES, lr=0.5)
    with pytest.raises(ValueError, match="length"):
        trainer(tmp_path).fit(probe, Stream(), Batches(2))
