"""The images in memory, their batches, and the random views of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from directpred.reference_trainers.recipe import Recipe

HELD_OUT = 450


class Split(NamedTuple):
    """Labelled inputs.

    Attributes:
        inputs: Images (n, channels, height, width), float32 in [0, 1], or features (n, d) of them.
        labels: (n,), int64.
    """

    inputs: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A data set: what is trained on, and what is held out for evaluation."""

    train: Split
    test: Split


def digits() -> Data:
    """The 1,797 hand-written digits that scikit-learn ships: 1,347 to train on, 450 held out.

    The split is stratified by class and the same for every seed.
    """
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32),
        labels.astype(np.int64),
        test_size=HELD_OUT,
        stratify=labels,
        random_state=0,
    )
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Data(Split(x_train, y_train), Split(x_test, y_test))


def load(name: str) -> Data:
    """The data set of that name, one of `recipe.DATASETS`."""
    match name:
        case "digits":
            return digits()
    raise ValueError(f"unknown data set {name!r}")


class Use(IntEnum):
    """What random numbers are drawn for."""

    WEIGHTS = 0
    ORDER = 1
    VIEWS = 2


def seed_of(seed: int, use: Use, count: int = 0) -> int:
    """The seed of one stream of random numbers, such as that of the views of step ``count``.

    With a stream for every step, a resumed run needs no state of a random generator to go on as
    if it had never stopped, and no run depends on what ran before it.
    """
    return int(np.random.SeedSequence((seed, use, count)).generate_state(1, np.uint64)[0])


class Batches:
    """Shuffled batches of images in memory, one epoch an iteration.

    Args:
        images: (n, ...) images.
        batch_size: Images a batch; an incomplete last one of an epoch is left out.
        seed: Decides the order, together with the number of the epoch.
        done: Batches that a resumed run has had already; it goes on with the next one.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int, done: int = 0) -> None:
        self.images, self.batch_size, self.seed, self.done = images, batch_size, seed, done

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """The rest of the current epoch, or the next one where that is done."""
        epoch, first = divmod(self.done, len(self))
        shuffle = torch.Generator().manual_seed(seed_of(self.seed, Use.ORDER, epoch))
        order = torch.randperm(len(self.images), generator=shuffle)
        for batch in range(first, len(self)):
            self.done += 1
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.images[rows]


def views(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """The random augmentation: from images (n, c, h, w) to views of them, each drawn for itself."""
    augment = nn.Sequential(
        K.RandomAffine(
            degrees=recipe.rotate,
            translate=(recipe.shift, recipe.shift),
            scale=(1 - recipe.zoom, 1 + recipe.zoom),
            p=1.0,
        ),
        K.RandomBrightness((1 - recipe.brightness, 1 + recipe.brightness), p=1.0),
        K.RandomGaussianNoise(std=recipe.noise, p=1.0),
    )
    return augment.forward  # not the module: what it keeps does not belong into checkpoints
