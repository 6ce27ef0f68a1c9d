"""The data sets, from tiny files in the formats in which the real ones are published."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from directpred.reference_trainers.datasets import Dataset, Files, Memory, decode, hold_out, load
from directpred.reference_trainers.errors import UsageError, UserError

torchvision = pytest.importorskip("torchvision", reason="needs the train extra")

# ---- The digits


def test_digits() -> None:
    data = load("digits", None)
    assert data.pretrain is data.train
    assert data.classes == tuple("0123456789")
    for part, count in ((data.train, 1347), (data.test, 450)):
        assert isinstance(part, Memory)
        assert part.images.shape == (count, 1, 8, 8)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.images.max() == part.maximum == 16
    assert data.test.labels.bincount().min() >= 43

    images, labels = load_digits(return_X_y=True)
    ours = torch.cat([part.images.flatten(1) for part in (data.train, data.test)]).numpy()
    rows = np.c_[ours, torch.cat([data.train.labels, data.test.labels])]
    assert sorted(map(tuple, rows)) == sorted(map(tuple, np.c_[images, labels].astype(int)))


# ---- A share of the training images in place of the test images


def rows(part: Memory | Files | None) -> list[Any]:
    """The images of a part, each as something that can be sorted."""
    assert part is not None
    return (
        list(part.paths) if isinstance(part, Files) else [x.tobytes() for x in part.images.numpy()]
    )


def test_held_out_digits_are_a_share_of_every_class_and_always_the_same() -> None:
    whole, data = load("digits", None), load("digits", None, validation=0.2)
    assert data.pretrain is data.train
    assert isinstance(data.test, Memory)
    assert isinstance(whole.train, Memory)
    assert len(data.test.images) == 270
    assert data.test.maximum == 16
    assert sorted(rows(data.train) + rows(data.test)) == sorted(rows(whole.train))
    assert whole.train.labels is not None
    assert data.test.labels is not None
    shares = data.test.labels.bincount() / whole.train.labels.bincount()
    assert shares.sub(0.2).abs().max() < 0.01

    # An image has kept its label.
    label = dict(zip(rows(whole.train), whole.train.labels.tolist(), strict=True))
    assert [label[image] for image in rows(data.test)] == data.test.labels.tolist()
    again = load("digits", None, validation=0.2)
    assert rows(again.test) == rows(data.test)
    assert rows(again.train) == rows(data.train)


def test_held_out_images_are_not_trained_on_without_labels_either(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    train = Memory(torch.arange(20).view(20, 1, 1, 1).byte(), torch.arange(20) % 2)
    everything = Memory(torch.arange(30).view(30, 1, 1, 1).byte(), None)  # as STL-10's
    data = hold_out(Dataset("stl10", ("a", "b"), everything, train, train), 0.3)
    assert len(rows(data.test)) == 6
    assert sorted(rows(data.train) + rows(data.test)) == rows(train)
    assert sorted(rows(data.pretrain) + rows(data.test)) == rows(everything)
    assert data.pretrain.labels is None

    for place in ("a/0", "a/1", "b/0", "b/1", "b/deep/2", "stray"):
        save(tmp_path / "train" / f"{place}.png", 0)
    data = load("folder", tmp_path, validation=0.5)  # has no test images of its own
    assert len(rows(data.test)) == 3
    assert len(rows(data.pretrain)) == len(rows(data.train)) + 1 == 3  # the stray one
    assert not {*rows(data.pretrain)} & {*rows(data.test)}


def test_a_share_that_cannot_be_held_out_is_told(tmp_path: Path) -> None:
    save(tmp_path / "0.png", 0)
    with pytest.raises(UsageError, match=r"validation 0\.2 needs labelled images"):
        load("folder", tmp_path, validation=0.2)
    for place in ("a/0", "a/1", "b/0"):
        save(tmp_path / "labelled" / "train" / f"{place}.png", 0)
    with pytest.raises(UsageError, match=r"validation 0\.5 of 3 training images in 2 classes: .+"):
        load("folder", tmp_path / "labelled", validation=0.5)
    with pytest.raises(UsageError, match=r"validation 0\.001 of 1347 .* in 10 classes: .+"):
        load("digits", None, validation=0.001)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100", "stl10", "imagenet"])
def test_what_is_not_there_is_described(name: str, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as caught:
            load(name, root)
        assert str(root) in str(caught.value)
        assert "expected is " in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--data says"):
        load(name, None)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        load("mnist", tmp_path)


# ---- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    """http://yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, the axes, their lengths, the bytes."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def fashion_mnist(directory: Path, rng: np.random.Generator, packed: bool) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(12) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(5)[::-1],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if packed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (directory / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "."])
def test_fashion_mnist(folder: str, packed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = fashion_mnist(tmp_path / folder, rng, packed)
    data = load("fashion_mnist", tmp_path)
    assert len(data.classes) == 10
    assert data.pretrain is data.train
    for name, part in (("train", data.train), ("t10k", data.test)):
        images, labels = part.images, part.labels
        assert images.dtype == torch.uint8
        assert np.array_equal(images.squeeze(1), arrays[f"{name}-images-idx3-ubyte"])
        assert images.shape[1:] == (1, 28, 28)
        assert np.array_equal(labels, arrays[f"{name}-labels-idx1-ubyte"])


def test_fashion_mnist_agrees_with_torchvision(tmp_path: Path, rng: np.random.Generator) -> None:
    fashion_mnist(tmp_path / "FashionMNIST" / "raw", rng, packed=False)
    peer = torchvision.datasets.FashionMNIST(tmp_path, train=False)
    data = load("fashion_mnist", tmp_path)
    assert torch.equal(data.test.images.squeeze(1), peer.data)
    assert torch.equal(data.test.labels, peer.targets)
    assert data.classes == tuple(peer.classes)


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"should have 9408 bytes \(12, 28, 28\)"),
        ("train-images-idx3-ubyte", lambda b: b + b"\0", "it has 9409"),
        ("t10k-images-idx3-ubyte", lambda b: b[:7], "not an IDX file"),
        ("t10k-images-idx3-ubyte", lambda b: b"", "not an IDX file"),
        ("t10k-images-idx3-ubyte", lambda b: idx(np.zeros((0, 28, 28))), "at least one"),
        ("t10k-images-idx3-ubyte", lambda b: b"<html>" + b, "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda b: idx(np.arange(4)), "4 labels for 5 images"),
        ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10, but .* 10 classes"),
    ],
)
def test_damaged_idx_files(
    name: str,
    damage: Callable[[bytes], bytes],
    expected: str,
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    fashion_mnist(tmp_path, rng, packed=False)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match=f"{tmp_path / name} .*{expected}"):
        load("fashion_mnist", tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:20] + b])
def test_damaged_gzip(
    damage: Callable[[bytes], bytes], tmp_path: Path, rng: np.random.Generator
) -> None:
    fashion_mnist(tmp_path, rng, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"cannot read {path}: "):
        load("fashion_mnist", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_missing_file_is_named(packed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    fashion_mnist(tmp_path, rng, packed)
    for path in tmp_path.glob("t10k-labels*"):
        path.unlink()
    with pytest.raises(UserError, match=f"{tmp_path}/t10k-labels-idx1-ubyte is missing"):
        load("fashion_mnist", tmp_path)


# ---- CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes bytes as the strings of Python 2, in which the CIFAR files were written."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_str2(self, text: bytes) -> None:
        short = len(text) < 256
        self.write(
            pickle.SHORT_BINSTRING + struct.pack("<B", len(text))
            if short
            else pickle.BINSTRING + struct.pack("<i", len(text))
        )
        self.write(text)
        self.memoize(text)

    dispatch[bytes] = save_str2
    dispatch[str] = lambda self, text: self.save_str2(text.encode("ascii"))


def python2_pickle(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batch(rng: np.random.Generator, count: int, **labels: list[int]) -> dict[bytes, Any]:
    return {
        b"batch_label": b"a batch",
        **{key.encode(): value for key, value in labels.items()},
        b"data": rng.integers(0, 256, (count, 3072)).astype(np.uint8),
        b"filenames": [b"%d.png" % i for i in range(count)],
    }


def cifar10(directory: Path, rng: np.random.Generator) -> dict[str, dict[bytes, Any]]:
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    files = {
        **{f"data_batch_{i}": batch(rng, 4, labels=[i, 9, 0, 3]) for i in range(1, 6)},
        "test_batch": batch(rng, 3, labels=[7, 1, 2]),
        "batches.meta": {b"num_cases_per_batch": 4, b"label_names": names, b"num_vis": 3072},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(python2_pickle(content))
    return files


def cifar100(directory: Path, rng: np.random.Generator) -> dict[str, dict[bytes, Any]]:
    files = {
        "train": batch(rng, 6, fine_labels=[99, 1, 2, 3, 50, 0], coarse_labels=[19, 0, 0, 0, 0, 0]),
        "test": batch(rng, 2, fine_labels=[98, 5], coarse_labels=[1, 2]),
        "meta": {
            b"fine_label_names": [b"fine%d" % i for i in range(100)],
            b"coarse_label_names": [b"coarse%d" % i for i in range(20)],
        },
    }
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(python2_pickle(content))
    return files


def pixel(row: np.ndarray, c: int, y: int, x: int) -> int:
    """https://www.cs.toronto.edu/~kriz/cifar.html: 1024 of red, green, blue; row by row."""
    return int(row[c * 1024 + y * 32 + x])


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_cifar10(folder: str, tmp_path: Path, rng: np.random.Generator) -> None:
    files = cifar10(tmp_path / folder, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns of its old module names
        data = load("cifar10", tmp_path)
    assert data.classes[:2] == ("airplane", "automobile")
    assert data.pretrain is data.train
    assert data.train.images.shape == (20, 3, 32, 32)
    assert data.train.labels.tolist() == [n for i in range(1, 6) for n in (i, 9, 0, 3)]
    assert data.test.labels.tolist() == [7, 1, 2]
    for part, index, row in (
        (data.train, 5, files["data_batch_2"][b"data"][1]),
        (data.test, 2, files["test_batch"][b"data"][2]),
    ):
        for c, y, x in ((0, 0, 1), (1, 30, 4), (2, 5, 31)):
            assert part.images[index, c, y, x] == pixel(row, c, y, x)


def test_the_pickles_are_those_that_others_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """The published way to read them gives what was written: the test writes the format."""
    files = cifar10(tmp_path, rng)
    with (tmp_path / "test_batch").open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = pickle.load(file, encoding="bytes")
    assert content.keys() == files["test_batch"].keys()
    assert np.array_equal(content[b"data"], files["test_batch"][b"data"])
    assert content[b"filenames"] == [b"0.png", b"1.png", b"2.png"]


def test_cifar100(tmp_path: Path, rng: np.random.Generator) -> None:
    files = cifar100(tmp_path / "cifar-100-python", rng)
    data = load("cifar100", tmp_path)
    assert data.classes[99] == "fine99"
    assert len(data.classes) == 100
    assert data.train.labels.tolist() == [99, 1, 2, 3, 50, 0]
    assert np.array_equal(data.test.images.flatten(1), files["test"][b"data"])


@pytest.mark.parametrize("protocol", [3, pickle.HIGHEST_PROTOCOL])
def test_cifar_pickled_again_by_python_3(
    protocol: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    files = cifar10(tmp_path, rng)
    content = {
        key.decode(): np.asfortranarray(value) if key == b"data" else value
        for key, value in files["test_batch"].items()
    }
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol > 4:  # another way to write arrays
        with pytest.raises(UserError, match="no part of CIFAR"):
            load("cifar10", tmp_path)
    else:
        images = load("cifar10", tmp_path).test.images
        assert np.array_equal(images.flatten(1), files["test_batch"][b"data"])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("where", ["data_batch_3", "batches.meta"])
def test_a_pickle_executes_nothing(
    where: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    crater = tmp_path / "crater"
    monkeypatch.setenv("BOMB", str(crater))
    content = cifar10(tmp_path, rng)[where]
    (tmp_path / where).write_bytes(pickle.dumps(content | {b"filenames": Bomb()}, protocol=2))
    with pytest.raises(UserError, match=f"cannot read {tmp_path / where}: it asks for "):
        load("cifar10", tmp_path)
    assert not crater.exists()


ARRAY = np.zeros((3, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot read"),
        (b"hello", "cannot read"),
        (python2_pickle({b"data": ARRAY, b"labels": [0, 1, 2]})[:-100], "cannot read"),
        (python2_pickle([1, 2]), "cannot read"),
        (python2_pickle({b"data": [1], b"labels": [0]}), "no data or labels"),
        (python2_pickle({b"data": ARRAY}), "no data or labels"),
        (python2_pickle({b"data": ARRAY, b"fine_labels": [1, 2, 3]}), "no data or labels"),
        (python2_pickle({b"data": ARRAY, b"labels": [1, 2]}), "2 labels for 3 images"),
        (python2_pickle({b"data": ARRAY, b"labels": [1, 2, 10]}), "a label 10"),
        (python2_pickle({b"data": ARRAY, b"labels": [1, 2, -1]}), "a label -1"),
        (python2_pickle({b"data": ARRAY, b"labels": [1, 2, b"x"]}), "not a file of cifar10"),
        (python2_pickle({b"data": ARRAY[:, 1:], b"labels": [1, 2, 3]}), "not a file of cifar10"),
        (python2_pickle({b"data": ARRAY[:0], b"labels": []}), "no images"),
        (python2_pickle({b"data": ARRAY.astype("f4"), b"labels": [1, 2, 3]}), "are not bytes"),
    ],
)
def test_damaged_cifar_files(
    content: bytes, expected: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    cifar10(tmp_path, rng)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load("cifar10", tmp_path)
    assert str(tmp_path / "test_batch") in str(caught.value)


def test_a_missing_cifar_file_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    cifar10(tmp_path / "cifar-10-batches-py", rng)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match="cifar-10-batches-py/data_batch_4 is missing"):
        load("cifar10", tmp_path)


# ---- STL-10


def stl10(directory: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """https://cs.stanford.edu/~acoates/stl10: (channel, column, row), labels from 1 to 10."""
    arrays = {
        "train_X.bin": rng.integers(0, 256, (3, 3, 96, 96)).astype(np.uint8),
        "train_y.bin": np.array([10, 1, 2], np.uint8),
        "test_X.bin": rng.integers(0, 256, (2, 3, 96, 96)).astype(np.uint8),
        "test_y.bin": np.array([5, 5], np.uint8),
        "unlabeled_X.bin": rng.integers(0, 256, (4, 3, 96, 96)).astype(np.uint8),
    }
    directory.mkdir(parents=True)
    for name, array in arrays.items():
        (directory / name).write_bytes(array.tobytes())
    return arrays


def test_stl10(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = stl10(tmp_path / "stl10_binary", rng)
    data = load("stl10", tmp_path)
    assert data.classes[9] == "truck"
    assert data.train.labels.tolist() == [9, 0, 1]
    assert data.test.labels.tolist() == [4, 4]
    assert data.pretrain.labels is None
    assert data.pretrain.images.shape == (7, 3, 96, 96)
    assert data.pretrain.images.is_contiguous()
    assert data.train.images.data_ptr() == data.pretrain.images.data_ptr(), "a copy"
    for part, index, name, stored in (
        (data.train, 2, "train_X.bin", 2),
        (data.pretrain, 5, "unlabeled_X.bin", 2),
        (data.test, 1, "test_X.bin", 1),
    ):
        for c, y, x in ((0, 1, 0), (1, 90, 3), (2, 7, 95)):
            assert part.images[index, c, y, x] == arrays[name][stored, c, x, y]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train_X.bin", bytes(27647), "whole images of 27648 bytes"),
        ("unlabeled_X.bin", b"", "at least one"),
        ("test_y.bin", bytes([1]), "1 labels for 2 images"),
        ("test_y.bin", bytes([0, 1]), "a label -1"),
        ("test_y.bin", bytes([1, 11]), "a label 10"),
        ("unlabeled_X.bin", None, "is missing"),
    ],
)
def test_damaged_stl10(
    name: str, content: bytes | None, expected: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    directory = tmp_path / "stl10_binary"
    stl10(directory, rng)
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{directory / name} .*{expected}"):
        load("stl10", tmp_path)


# ---- Downloads


def test_a_download_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for name in ("fashion_mnist", "cifar10", "cifar100", "stl10"):
        with pytest.raises(UserError, match=f"{name} could not be downloaded .*expected is "):
            load(name, tmp_path / name, download=True)
    for name in ("imagenet", "folder"):
        with pytest.raises(UsageError, match=f"{name} cannot be downloaded"):
            load(name, tmp_path, download=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in ``site``."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_download_is_checked_and_unpacked(
    name: str, site: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, kind = {
        "cifar10": (cifar10, torchvision.datasets.CIFAR10),
        "cifar100": (cifar100, torchvision.datasets.CIFAR100),
        "stl10": (stl10, torchvision.datasets.STL10),
    }[name]
    write(tmp_path / "site" / kind.base_folder, rng)
    archive = tmp_path / "site" / kind.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "site" / kind.base_folder, kind.base_folder)
    monkeypatch.setattr(kind, "url", site + kind.filename)
    with pytest.raises(UserError, match="could not be downloaded"):  # another md5
        load(name, tmp_path / "data", download=True)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    expected = load(name, tmp_path / "site")
    assert torch.equal(
        load(name, tmp_path / "data", download=True).test.images, expected.test.images
    )
    archive.unlink()
    load(name, tmp_path / "data", download=True)  # what is there is not downloaded again


def test_a_download_of_fashion_mnist(
    site: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fashion_mnist(tmp_path / "site", rng, packed=True)
    kind = torchvision.datasets.FashionMNIST
    md5 = [
        (name, hashlib.md5((tmp_path / "site" / name).read_bytes()).hexdigest())
        for name, _ in kind.resources
    ]
    monkeypatch.setattr(kind, "mirrors", [site])
    monkeypatch.setattr(kind, "resources", md5)
    assert len(load("fashion_mnist", tmp_path / "data", download=True).train.images) == 12


# ---- Folders


def save(path: Path, colour: int | tuple[int, ...], size: tuple[int, int] = (32, 32)) -> str:
    """An image of one colour, losslessly whatever the name says; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (colour,) * 3 if isinstance(colour, int) else colour
    Image.new("RGB", size, colour).save(path, format="PNG")
    return str(path)


def test_cifar10_from_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, name in enumerate(("dog", "cat", "bird")):
            for i in (10, 2, 1):
                save(tmp_path / part / name / f"{i:04}.png", 10 * label + i)
    data = load("cifar10", tmp_path)
    assert data.classes == ("bird", "cat", "dog")
    assert data.pretrain is data.train
    for part in (data.train, data.test):
        assert part.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert part.images[:, 1, 3, 5].tolist() == [21, 22, 30, 11, 12, 20, 1, 2, 10]
        assert part.images.is_contiguous()


def test_images_of_another_size_are_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / part / name / "0.png", 0)
    wrong = save(tmp_path / "train" / "b" / "1.png", 0, (32, 31))
    with pytest.raises(UserError, match=rf"{wrong} has \(31, 32\) pixels, but .*\(32, 32\)"):
        load("cifar10", tmp_path)
    Path(wrong).write_bytes(b"")
    with pytest.raises(UserError, match=wrong):
        load("cifar10", tmp_path)


def imagenet(root: Path) -> None:
    for part, suffix in (("train", "7_{}.JPEG"), ("val", "ILSVRC2012_val_{}.JPEG")):
        for name in ("n02", "n01", "n10"):
            for i in (3, 1):
                save(root / part / name / suffix.format(i), i)


def test_imagenet(tmp_path: Path) -> None:
    imagenet(tmp_path)
    peer = torchvision.datasets.ImageFolder(tmp_path / "train")
    (tmp_path / "train" / "n01" / "readme.txt").touch()
    (tmp_path / "train" / ".cache").mkdir()
    data = load("imagenet", tmp_path)
    assert data.classes == ("n01", "n02", "n10")
    assert isinstance(data.train, Files)
    assert data.pretrain is data.train
    names = [path.removeprefix(f"{tmp_path}/train/") for path in data.train.paths]
    assert names == [f"{c}/7_{i}.JPEG" for c in data.classes for i in (1, 3)]
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert decode(data.test.paths[1])[0, 0, 0] == 3
    assert peer.samples == list(zip(data.train.paths, data.train.labels.tolist(), strict=True))


def test_mistakes_in_folders(tmp_path: Path) -> None:
    imagenet(tmp_path)
    (tmp_path / "train" / "n00").mkdir()
    with pytest.raises(UserError, match=f"no images in {tmp_path}/train/n00"):
        load("imagenet", tmp_path)
    save(tmp_path / "train" / "n00" / "x.jpg", 0)
    with pytest.raises(UserError, match="val are not those to train on: n00 is missing"):
        load("imagenet", tmp_path)
    save(tmp_path / "val" / "n00" / "x.jpg", 0)
    save(tmp_path / "val" / "n11" / "x.jpg", 0)
    with pytest.raises(UserError, match="val are not those to train on: n11 is one too many"):
        load("imagenet", tmp_path)

    flat = tmp_path / "flat"
    save(flat / "train" / "n01" / "x.jpg", 0)
    save(flat / "val" / "x.jpg", 0)
    with pytest.raises(UserError, match=f"no folders in {flat}/val"):
        load("imagenet", flat)


def test_folder_of_anything(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", "deep/d.png", ".hidden/e.png", "f.txt"):
        save(tmp_path / name, 0)
    data = load("folder", tmp_path)
    names = [path.removeprefix(f"{tmp_path}/") for path in data.pretrain.paths]
    assert names == ["a.jpg", "b.PNG", "deep/d.png", "deep/er/c.webp"]
    assert data.pretrain.labels is None
    assert data.classes == ()
    assert data.train is None
    assert data.test is None


@pytest.mark.parametrize("held_out", ["test", "val", None])
def test_folder_with_classes(held_out: str | None, tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/more/1.png", "ant/0.png", "loose.png"):
        save(tmp_path / "train" / name, 0)
    if held_out:
        for name in ("ant/0.png", "cat/0.png"):
            save(tmp_path / held_out / name, 0)
    data = load("folder", tmp_path)
    assert data.classes == ("ant", "cat")
    assert len(data.pretrain.paths) == 4
    assert data.train.labels.tolist() == [0, 1, 1]
    if held_out:
        assert data.test.labels.tolist() == [0, 1]
    else:
        assert data.test is None


def test_folder_with_train_but_without_classes(tmp_path: Path) -> None:
    save(tmp_path / "train" / "images" / "0.png", 0)
    save(tmp_path / "elsewhere" / "0.png", 0)
    data = load("folder", tmp_path)
    assert data.pretrain.paths == [f"{tmp_path}/train/images/0.png"]
    assert data.train is None


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no images in {tmp_path}"):
        load("folder", tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        load("folder", tmp_path / "nowhere")


# ---- Single images


def test_every_kind_of_image_becomes_rgb(tmp_path: Path, rng: np.random.Generator) -> None:
    grey = rng.integers(0, 256, (5, 7)).astype(np.uint8)
    rgb = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    alpha = np.full((5, 7, 1), 9, np.uint8)
    deep = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
    deep.flat[:3] = 0, 65535, 257
    palette = Image.fromarray(rgb).quantize(35)
    kinds = {
        "rgb": (Image.fromarray(rgb), rgb),
        "rgba": (Image.fromarray(np.concatenate([rgb, alpha], axis=2)), rgb),
        "grey": (Image.fromarray(grey), grey),
        "grey and alpha": (Image.merge("LA", [Image.fromarray(grey)] * 2), grey),
        "16 bits": (Image.fromarray(deep), deep // 257),
        "palette": (palette, np.asarray(palette.convert("RGB"))),
        "bits": (Image.fromarray(grey > 99), (grey > 99) * np.uint8(255)),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / f"{name}.png")
        seen = decode(str(tmp_path / f"{name}.png"))
        assert seen.shape == (3, 5, 7)
        assert seen.dtype == torch.uint8
        expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=2)
        assert np.array_equal(seen.permute(1, 2, 0), expected), name

    palette.save(tmp_path / "transparent.png", transparency=bytes(range(35)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = decode(str(tmp_path / "transparent.png"))
    assert np.array_equal(seen.permute(1, 2, 0), palette.convert("RGB"))

    Image.new("CMYK", (7, 5), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert decode(str(tmp_path / "cmyk.jpg"))[:, 0, 0].tolist() == pytest.approx(
        [0, 255, 255], abs=3
    )


def test_orientation_is_left_as_torchvision_leaves_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (7, 5)).save(tmp_path / "x.jpg", exif=exif)
    assert decode(str(tmp_path / "x.jpg")).shape == (3, 5, 7)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_images_cut_off(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path, format=kind)
    content = path.read_bytes()
    decode(str(path))
    for count in (0, 1, 10, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:count])
        with pytest.raises(UserError, match=f"cannot read the image {path}: .+") as caught:
            decode(str(path))
        assert "\n" not in str(caught.value)


def test_no_images(tmp_path: Path) -> None:
    for content in (b"just text, called an image\n" * 100, b"<html>404</html>"):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(UserError, match=f"{tmp_path}/x.jpg: cannot identify"):
            decode(str(tmp_path / "x.jpg"))
    with pytest.raises(UserError, match=r"nowhere.jpg: No such file"):
        decode(str(tmp_path / "nowhere.jpg"))
    with pytest.raises(UserError, match="Is a directory"):
        decode(str(tmp_path))


# ---- The real thing


def archive() -> Path:
    beside = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("DIRECTPRED_DATA", beside)) / "cifar10-images.tar.xz"
    if not path.is_file():
        pytest.skip(f"no {path}; DIRECTPRED_DATA can name the directory that holds it")
    return path


def test_cifar10_of_real_images(tmp_path: Path) -> None:
    """The first ten images of each class and part."""
    with tarfile.open(archive()) as file:
        few = [m for m in file if m.name.rpartition("/")[2].startswith("000")]
        file.extractall(tmp_path, few, filter="data")
    data = load("cifar10", tmp_path)
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    for part in (data.train, data.test):
        assert part.images.shape == (100, 3, 32, 32)
        assert part.labels.bincount().tolist() == [10] * 10
        # Mean and deviation of CIFAR-10 are 0.47 and 0.25.
        pixels = part.images / 255
        assert pixels.mean().item() == pytest.approx(0.47, abs=0.05)
        assert pixels.std().item() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(data.train.images, data.test.images)
    files = load("folder", tmp_path)
    assert torch.equal(files.train.labels, data.train.labels)
    assert torch.equal(decode(files.train.paths[42]), data.train.images[42])
