"""Batches: their order, their crops, and that neither depends on how a run was carried out."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("torchvision", reason="needs the train extra")

from torchvision.transforms import v2

from directpred.reference_trainers.batches import FileBatches, MemoryBatches, evaluation_batches
from directpred.reference_trainers.datasets import Files, Memory
from directpred.reference_trainers.errors import UsageError, UserError

SIZE = 16


def stream(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(stream(seed, 1, epoch))
    return torch.randperm(count, generator=generator).tolist()


def numbered(count: int) -> Memory:
    """Images that are their own number."""
    return Memory(
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), None
    )


def numbers(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Twenty images of many sizes, each of one colour: its number."""
    directory = tmp_path_factory.mktemp("coloured")
    paths = [str(directory / f"{i}.png") for i in range(20)]
    for i, path in enumerate(paths):
        Image.new("RGB", (20 + 3 * i, 70 - 2 * i), (i, i, i)).save(path)
    return Files(paths, torch.arange(20))


@pytest.fixture(scope="module")
def textured(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Ten images of noise, of two sizes."""
    directory, rng = tmp_path_factory.mktemp("textured"), np.random.default_rng(0)
    paths = [str(directory / f"{i}.png") for i in range(10)]
    for i, path in enumerate(paths):
        pixels = rng.integers(0, 256, (40 + i % 2, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return Files(paths, None)


# ---- The order


def test_memory_follows_the_permutation_of_the_epoch() -> None:
    batches = MemoryBatches(numbered(10), 3, seed=5)
    assert len(batches) == 3
    for epoch in range(3):
        seen = list(batches)
        order = permutation(10, 5, epoch)
        assert [numbers(view) for view, _ in seen] == [order[:3], order[3:6], order[6:9]]
        for view1, view2 in seen:
            assert view1 is view2
            assert view1.shape == (3, 1, 4, 4)
            assert view1.dtype == torch.uint8


def test_files_follow_the_same_permutation(coloured: Files) -> None:
    batches = FileBatches(coloured, 6, seed=5, size=SIZE)
    assert len(batches) == 3
    for epoch in range(2):
        order = permutation(20, 5, epoch)
        for i, (view1, view2) in enumerate(batches):
            assert numbers(view1) == numbers(view2) == order[6 * i : 6 * i + 6]
            assert view1.shape == view2.shape == (6, 3, SIZE, SIZE)
            assert view1.dtype == torch.uint8
            assert view1.is_contiguous()


@pytest.mark.parametrize("done", [1, 3, 4, 8])
def test_a_resumed_run_goes_on(done: int, textured: Files) -> None:
    for make in (
        lambda done: MemoryBatches(numbered(10), 3, 0, done=done),
        lambda done: FileBatches(textured, 3, 0, SIZE, done=done),
    ):
        whole = make(0)
        expected = [views for _ in range(4) for views in whole]
        resumed = make(done)
        seen = list(resumed)
        assert len(seen) == 3 - done % 3
        seen += list(resumed)
        for ours, theirs in zip(seen, expected[done:], strict=False):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_in_the_middle_goes_on(workers: int, coloured: Files) -> None:
    """Whatever the workers had prepared already."""
    for batches in (
        MemoryBatches(numbered(20), 3, 0),
        FileBatches(coloured, 3, 0, SIZE, workers=workers),
    ):
        first = [numbers(view) for (view, _), _ in zip(batches, range(2), strict=False)]
        taken = batches.order.done
        rest = [numbers(view) for view, _ in batches]
        order = permutation(20, 0, 0)
        chunks = [order[i : i + 3] for i in range(0, 18, 3)]
        assert first == chunks[:2]
        assert rest == chunks[taken:]


def test_ranks_share_every_global_batch(coloured: Files) -> None:
    order = permutation(20, 7, 0)
    for rank in range(3):
        memory = MemoryBatches(numbered(20), 2, 7, rank=rank, ranks=3)
        files = FileBatches(coloured, 2, 7, SIZE, rank=rank, ranks=3)
        expected = [order[6 * i + 2 * rank :][:2] for i in range(3)]
        assert len(memory) == len(files) == 3
        assert [numbers(view) for view, _ in memory] == expected
        assert [numbers(view) for view, _ in files] == expected


def test_too_few_images(coloured: Files) -> None:
    with pytest.raises(UsageError, match="batch_size 11 exceeds the 10 training images"):
        MemoryBatches(numbered(10), 11, 0)
    with pytest.raises(UsageError, match="batch_size 11 on 2 ranks exceeds the 20 training images"):
        FileBatches(coloured, 11, 0, SIZE, ranks=2)
    assert len(MemoryBatches(numbered(10), 5, 0, ranks=2)) == 1


def test_batches_lie_on_the_device() -> None:
    source = numbered(10)
    view, _ = next(iter(MemoryBatches(source, 5, 0, device="meta")))
    assert view.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(coloured: Files) -> None:
    memory = MemoryBatches(numbered(20), 5, 0, device="cuda")
    assert [numbers(v) for v, _ in memory] == [
        numbers(v) for v, _ in MemoryBatches(numbered(20), 5, 0)
    ]
    for workers in (0, 2):
        for view1, view2 in FileBatches(coloured, 5, 0, SIZE, workers=workers):
            assert view1.is_pinned()
            assert view2.is_pinned()


# ---- The crops


def test_crops_are_those_of_torchvision(textured: Files) -> None:
    """With a stream of random numbers for each image and epoch, the first view first."""
    peer = v2.RandomResizedCrop(SIZE, (0.2, 0.9), (0.5, 1.5), antialias=True)
    batches = FileBatches(textured, 4, 3, SIZE, scale=(0.2, 0.9), ratio=(0.5, 1.5))
    for epoch in range(2):
        seen = [torch.cat(views) for views in zip(*batches, strict=True)]
        for i, row in enumerate(permutation(10, 3, epoch)[:8]):
            pixels = torch.from_numpy(np.array(Image.open(textured.paths[row])))
            torch.manual_seed(stream(3, 3, epoch, row))
            for view in seen:
                assert torch.equal(view[i], peer(pixels.permute(2, 0, 1)))


def test_crops_differ_between_views_epochs_and_images(textured: Files) -> None:
    same = Files(textured.paths[:1] * 4, None)
    batches = FileBatches(same, 4, 0, SIZE)
    seen = torch.cat([torch.cat(views) for _ in range(2) for views in batches])
    assert len(seen.flatten(1).unique(dim=0)) == 16


def test_batches_do_not_depend_on_workers_or_ranks(textured: Files) -> None:
    def run(workers: int, rank: int = 0, ranks: int = 1) -> list[tuple[Tensor, ...]]:
        torch.manual_seed(rank)  # what else is drawn must not matter
        batches = FileBatches(
            textured, 4 // ranks, 0, SIZE, workers=workers, rank=rank, ranks=ranks
        )
        return [views for _ in range(2) for views in batches]

    alone = run(0)
    assert len(alone) == 4
    for ours, theirs in zip(run(2), alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
    for *shares, theirs in zip(run(0, 0, 2), run(1, 1, 2), alone, strict=True):
        assert all(map(torch.equal, map(torch.cat, zip(*shares, strict=True)), theirs))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_numbers_are_left_alone(workers: int, textured: Files) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in FileBatches(textured, 4, 0, SIZE, workers=workers):
        pass
    for _ in evaluation_batches(textured, SIZE, SIZE, 4, workers):
        pass
    assert torch.equal(torch.get_rng_state(), before)


# ---- What goes wrong


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "gone"])
def test_an_unreadable_image_is_named(damage: str, workers: int, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.jpg") for i in range(8)]
    for path in paths:
        Image.effect_noise((40, 40), 50).save(path)
    bad = Path(paths[5])
    match damage:
        case "cut off":
            bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
        case "empty":
            bad.write_bytes(b"")
        case "text":
            bad.write_text("not found", encoding="utf-8")
        case "gone":
            bad.unlink()
    source = Files(paths, None)
    for batches in (
        FileBatches(source, 2, 0, SIZE, workers=workers),
        evaluation_batches(source, SIZE, SIZE, 2, workers),
    ):
        with pytest.raises(UserError, match=f"cannot read the image {bad}: ") as caught:
            list(batches)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_left_to_the_main_process(number: signal.Signals, coloured: Files) -> None:
    before = set(multiprocessing.active_children())
    batches = FileBatches(coloured, 4, 0, SIZE, workers=2)
    seen = []
    for view, _ in batches:
        seen += numbers(view)
        if len(seen) == 8:  # either worker has made one, so both have started
            for worker in set(multiprocessing.active_children()) - before:
                os.kill(worker.pid, number)
    assert seen == permutation(20, 0, 0)


# ---- Evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_the_centre_of_every_image_in_order(
    workers: int, textured: Files, coloured: Files
) -> None:
    peer = v2.Compose([v2.Resize(20), v2.CenterCrop(SIZE)])
    batches = evaluation_batches(textured, SIZE, 20, 4, workers)
    assert len(batches) == 3
    seen = list(batches)
    assert [len(images) for images in seen] == [4, 4, 2]
    for image, path in zip(torch.cat(seen), textured.paths, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert torch.equal(image, peer(pixels))
    assert all(map(torch.equal, batches, seen)), "a second pass differs"

    for images in evaluation_batches(coloured, SIZE, 20, 20, workers):
        assert numbers(images) == list(range(20))


def test_evaluation_from_memory() -> None:
    source = numbered(10)
    batches = evaluation_batches(source, SIZE, 20, 4)
    assert len(batches) == 3
    assert torch.equal(torch.cat(list(batches)), source.images)
