"""Batches of the data sets: pairs of images to make two views of, and images to evaluate on.

Both are bytes. What is in memory lies on the device as it is, and all of the augmentation is done
there; what is in files is decoded by workers, which also take the two random crops of it, since
images of different sizes make no batch. The order depends on the seed and the epoch only, a crop
on the image besides, so that a resumed run, or one with another number of workers, sees the same.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from .datasets import Files, Memory, decode
from .errors import UsageError, UserError
from .seeds import Use, seed_of

_PREFETCH = 4

Pair = tuple[Tensor, Tensor]
T = TypeVar("T")


class Order:
    """Which images come in which batch.

    An epoch is a permutation that depends on the seed and its number. It is cut into global
    batches, an incomplete last one is left out, and each into equal shares of the ranks.

    Args:
        images: How many there are.
        batch_size: Images in the share of a rank.
        seed: Decides the permutations.
        rank: Whose share.
        ranks: How many share a global batch.
        done: Global batches that a resumed run has had already.

    Attributes:
        done: Batches taken. The user of the order counts it up.

    Raises:
        UsageError: There are fewer images than in a global batch.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, done: int = 0
    ) -> None:
        if images < batch_size * ranks:
            on = f" on {ranks} ranks" if ranks > 1 else ""
            raise UsageError(f"batch_size {batch_size}{on} exceeds the {images} training images")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.ranks, self.done = rank, ranks, done

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.images // (self.batch_size * self.ranks)

    def rest(self) -> tuple[int, Tensor]:
        """What is left of the current epoch, or the next one where that is done.

        Returns:
            The number of the epoch, and the images of each of its batches, (batches, batch_size).
        """
        epoch, first = divmod(self.done, len(self))
        shuffle = torch.Generator().manual_seed(seed_of(self.seed, Use.ORDER, epoch))
        order = torch.randperm(self.images, generator=shuffle)
        whole = order[: len(self) * self.ranks * self.batch_size]
        return epoch, whole.view(-1, self.ranks, self.batch_size)[first:, self.rank]


class MemoryBatches:
    """Shuffled batches of images in memory, one epoch an iteration.

    Each is a pair of one and the same tensor (batch_size, channels, height, width), uint8, on the
    device.

    Args:
        source: The images.
        batch_size: Images a batch and rank.
        seed: Decides the order, together with the number of the epoch.
        device: Where the images are put, once.
        rank: Of this process.
        ranks: Processes that share a global batch, ``batch_size`` images each.
        done: Batches that a resumed run has had already; it goes on with the next one.

    Raises:
        UsageError: There are fewer images than in a global batch.
    """

    def __init__(
        self,
        source: Memory,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        done: int = 0,
    ) -> None:
        self.order = Order(len(source.images), batch_size, seed, rank, ranks, done)
        self.images = source.images.to(device)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Pair]:
        """The rest of the current epoch, or the next one where that is done."""
        _, batches = self.order.rest()
        for rows in batches.to(self.images.device):
            self.order.done += 1
            images = self.images.index_select(0, rows)
            yield images, images


class FileBatches:
    """Shuffled batches of crops of images in files, one epoch an iteration.

    Each is a pair of tensors (batch_size, 3, size, size), uint8, of two random resized crops of
    the same images; in pinned memory where there is a CUDA device. Iterations must not overlap.

    Args:
        source: The images.
        batch_size: Images a batch and rank.
        seed: Decides the order, together with the number of the epoch, and the crops, together
            with that and the image.
        size: Of a crop, in pixels.
        scale: Least and largest part of the image's area that a crop covers.
        ratio: Least and largest ratio of its width to its height.
        workers: Processes that decode; with 0, this one does.
        rank: Of this process.
        ranks: Processes that share a global batch, ``batch_size`` images each.
        done: Batches that a resumed run has had already; it goes on with the next one.

    Raises:
        UsageError: There are fewer images than in a global batch.
        UserError: In the iteration: an image cannot be read.
    """

    def __init__(
        self,
        source: Files,
        batch_size: int,
        seed: int,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        done: int = 0,
    ) -> None:
        self.order = Order(len(source.paths), batch_size, seed, rank, ranks, done)
        self._loader = _loader(_Crops(size, scale, ratio), _Keys(source.paths, self.order), workers)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Pair]:
        """The rest of the current epoch, or the next one where that is done."""
        for batch in self._loader:
            view1, view2 = _unless_failed(batch)
            self.order.done += 1
            yield view1, view2


class ImageBatches(Protocol):
    """Batches of images (n, channels, height, width), uint8, in the order of their source."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


def evaluation_batches(
    source: Memory | Files, size: int, resize: int, batch_size: int, workers: int = 0
) -> ImageBatches:
    """All images of a source, in its order; the last batch may be smaller.

    Args:
        source: The images. Those in memory come as they are.
        size: Of the centre crop of an image in a file, in pixels.
        resize: To which its shorter side is resized before that.
        batch_size: Images a batch.
        workers: Processes that decode; with 0, this one does.

    Returns:
        The batches; the iteration raises `UserError` where an image cannot be read.
    """
    if isinstance(source, Memory):
        batches: tuple[Tensor, ...] = source.images.split(batch_size)
        return batches
    return _CentreCrops(source, size, resize, batch_size, workers)


class _CentreCrops:
    """`evaluation_batches` of files."""

    def __init__(
        self, source: Files, size: int, resize: int, batch_size: int, workers: int
    ) -> None:
        paths = source.paths
        self._keys = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
        self._dataset, self._workers = _Centres(size, resize), workers

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in _loader(self._dataset, self._keys, self._workers, persistent=False):
            yield _unless_failed(batch)


# ---- In the workers. A worker holds no list of images: a key says which files make up a batch. It
# ---- returns an error instead of raising it, to which the loader would add a traceback.


class _Keys:
    """For the rest of an epoch: the path and the seed of the crops of every image of a batch."""

    def __init__(self, paths: Sequence[str], order: Order) -> None:
        self.paths, self.order = paths, order

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        epoch, batches = self.order.rest()
        for rows in batches:
            yield [(self.paths[row], self._seed(epoch, row)) for row in rows.tolist()]

    def _seed(self, epoch: int, row: int) -> int:
        entropy = np.random.SeedSequence((self.order.seed, Use.CROPS, epoch, row))
        return int(entropy.generate_state(1, np.uint64)[0])


class _Crops(TorchDataset["Pair | UserError"]):
    """From a key to two random crops of each of its images."""

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        self.crop = v2.RandomResizedCrop(size, scale, ratio, antialias=True)

    def __getitem__(self, key: list[tuple[str, int]]) -> Pair | UserError:
        views: tuple[list[Tensor], list[Tensor]] = [], []
        try:
            with torch.random.fork_rng(devices=[]):
                for path, seed in key:
                    image = decode(path)
                    # Not torch.manual_seed, which is for all devices and slow.
                    torch.default_generator.manual_seed(seed)
                    for view in views:
                        view.append(self.crop(image))
        except UserError as error:
            return error
        return torch.stack(views[0]), torch.stack(views[1])


class _Centres(TorchDataset["Tensor | UserError"]):
    """From the paths of a batch to the resized centres of the images."""

    def __init__(self, size: int, resize: int) -> None:
        self.crop = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])

    def __getitem__(self, paths: Sequence[str]) -> Tensor | UserError:
        try:
            return torch.stack([self.crop(decode(path)) for path in paths])
        except UserError as error:
            return error


def _loader(
    dataset: TorchDataset[Any], keys: Iterable[Any], workers: int, persistent: bool = True
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,  # the keys are of whole batches
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # or it would draw from the one that others draw from
        prefetch_factor=_PREFETCH if workers else None,
        persistent_workers=persistent and workers > 0,
    )


def _as_it_is(batch: T) -> T:
    return batch


def _outlive_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, where they are sent to all processes, to the main one.

    It may take a while to save the run, for which it needs its workers to the end of a step; and
    SIGTERM is also how it ends them itself should they hang.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def _unless_failed(batch: T | UserError) -> T:
    if isinstance(batch, UserError):
        raise batch
    return batch
