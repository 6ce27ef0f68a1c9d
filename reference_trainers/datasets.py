"""The data sets, read from the files in which they are published.

Small ones are held in memory as bytes; of ImageNet and folders only the paths are, and `batches`
decodes them when they are needed. Whatever is missing, cut off or unreadable is a `UserError` that
names the file.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UsageError, UserError

HELD_OUT = 450
"""How many of the digits are for testing."""

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What the name of an image ends with, in upper or lower case; other files are passed over."""


class Memory(NamedTuple):
    """Images in memory.

    Attributes:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64, indices into the classes; None where unlabelled.
        maximum: The value of white.
    """

    images: Tensor
    labels: Tensor | None
    maximum: int = 255


class Files(NamedTuple):
    """Images in files, to be read by `decode`.

    Attributes:
        paths: Of the n images.
        labels: (n,), int64, indices into the classes; None where unlabelled.
    """

    paths: Sequence[str]
    labels: Tensor | None


class Dataset(NamedTuple):
    """A data set.

    Attributes:
        name: One of those of `load`.
        classes: Their names, in the order of the labels; none where unlabelled.
        pretrain: What is trained on without labels; labels it may have are not looked at. It holds
            the images of ``train`` too, in memory as its first rows.
        train: What the linear probe is trained on; None where unlabelled.
        test: What is held out; None where there is nothing.
    """

    name: str
    classes: tuple[str, ...]
    pretrain: Memory | Files
    train: Memory | Files | None
    test: Memory | Files | None


def load(name: str, root: Path | None, download: bool = False, validation: float = 0.0) -> Dataset:
    """Read a data set, or find its files.

    Args:
        name: ``digits``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``stl10``, ``imagenet`` or
            ``folder``.
        root: The directory that holds it, as torchvision lays it out; the digits need none.
            cifar10, imagenet and folder may be folders of images: ``train/<class>/*`` and
            ``test/<class>/*`` (``val`` of imagenet, either of folder); for folder, images anywhere
            below the root will do.
        download: Download what is missing into ``root``. ImageNet and folders cannot be.
        validation: Share of the training images to hold out in place of the test images, as
            `hold_out` does; 0: none.

    Returns:
        The data set.

    Raises:
        UsageError: No root, a download of what cannot be downloaded, or no such share of the
            training images.
        UserError: Files are missing or damaged, or the download failed.
        ValueError: There is no such data set.
    """
    data = _load(name, root, download)
    return hold_out(data, validation) if validation else data


def hold_out(data: Dataset, share: float) -> Dataset:
    """Put a share of the training images in the place of the test images.

    The split is stratified by class and always the same. What is held out is not trained on.

    Args:
        data: With labelled images to train on.
        share: Between 0 and 1.

    Returns:
        A data set without the test images of the given one.

    Raises:
        UsageError: The training images have no labels, or are too few to be split so.
    """
    from sklearn.model_selection import train_test_split

    if data.train is None or data.train.labels is None:
        raise UsageError(f"validation {share} needs labelled images, and {data.name} has none here")
    everything = np.arange(len(data.train.labels))
    try:
        kept, held = train_test_split(
            everything, test_size=share, stratify=data.train.labels.numpy(), random_state=0
        )
    except ValueError as error:
        raise UsageError(
            f"validation {share} of {len(everything)} training images in {len(data.classes)} "
            f"classes: {_one_line(error)}"
        ) from error
    kept, held = np.sort(kept), np.sort(held)
    train, test = _rows(data.train, kept), _rows(data.train, held)
    if data.pretrain is data.train:
        return data._replace(pretrain=train, train=train, test=test)
    if isinstance(data.pretrain, Files):
        assert isinstance(test, Files)
        out = set(test.paths)
        rest = np.array([n for n, path in enumerate(data.pretrain.paths) if path not in out])
    else:
        rest = np.append(kept, np.arange(len(everything), len(data.pretrain.images)))
    return data._replace(pretrain=_rows(data.pretrain, rest), train=train, test=test)


def _rows(source: Memory | Files, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Memory | Files:
    """Some of the images, with their labels where they have any."""
    labels = None if source.labels is None else source.labels[rows]
    if isinstance(source, Files):
        return Files([source.paths[row] for row in rows], labels)
    return Memory(source.images[rows], labels, source.maximum)


def _load(name: str, root: Path | None, download: bool) -> Dataset:
    if name == "digits":
        return _digits()
    if name not in (*_ARCHIVES, "imagenet", "folder"):
        raise ValueError(f"unknown data set {name!r}")
    if root is None:
        raise UsageError(f"{name} is read from files: --data says which directory holds it")
    if download and name not in _ARCHIVES:
        raise UsageError(f"{name} cannot be downloaded; expected is {_layout(name, root)}")
    match name:
        case "imagenet":
            return _imagenet(root)
        case "folder":
            return _folder(root)
        case "cifar10" if (root / "train").is_dir() and not _in_archive(name, root):
            return _cifar10_images(root)
    directory = _locate(name, root, download)
    match name:
        case "fashion_mnist":
            return _fashion_mnist(directory)
        case "stl10":
            return _stl10(directory)
    return _cifar(name, directory)


def decode(path: str) -> Tensor:
    """Read an image: greyscale, palettes, CMYK and 16 bits become RGB of 8 bits, alpha is dropped.

    An orientation in the EXIF data is not looked at, as in torchvision's ImageFolder.

    Args:
        path: Of the file.

    Returns:
        (3, height, width), uint8.

    Raises:
        UserError: The file is missing, cut off or no image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            image.load()
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            image.info.pop("transparency", None)  # Pillow warns of what is dropped
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's readers raise all sorts on damaged files
        raise UserError(f"cannot read the image {path}: {_one_line(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _one_line(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


# ---- Where the archives lie

_FASHION_MNIST = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_CIFAR10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_STL10 = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin")

_ARCHIVES = {
    "fashion_mnist": ("FashionMNIST/raw", _FASHION_MNIST),
    "cifar10": ("cifar-10-batches-py", _CIFAR10),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
    "stl10": ("stl10_binary", _STL10),
}
"""Of what can be downloaded: the folder below the root, and the files in it."""


def _layout(name: str, root: Path) -> str:
    """What is expected, in words."""
    folders = f"{root}/train/<class>/<image>.jpg and {root}/{{}}/<class>/<image>.jpg"
    match name:
        case "imagenet":
            return folders.format("val")
        case "folder":
            return f"images anywhere below {root}"
    folder, files = _ARCHIVES[name]
    text = f"{root}/{folder} (or {root} itself) with {', '.join(files)}"
    if name == "fashion_mnist":
        text += ", each of them as it is or with .gz"
    if name == "cifar10":
        text += f"; or images, {folders.format('test')}"
    return text


def _in_archive(name: str, root: Path) -> bool:
    """Whether a file of the archive is there."""
    folder, files = _ARCHIVES[name]
    return any(_packed(d / file).is_file() for d in (root / folder, root) for file in files)


def _packed(path: Path) -> Path:
    """The path, or that of its gzipped form where only that exists; for IDX files."""
    gzipped = path.with_name(path.name + ".gz")
    idx = path.name.endswith("-ubyte")
    return gzipped if idx and gzipped.is_file() and not path.is_file() else path


def _locate(name: str, root: Path, download: bool) -> Path:
    """The directory that holds all files of an archive.

    Raises:
        UserError: There is none, and it was not or could not be downloaded.
    """
    folder, files = _ARCHIVES[name]
    looked_at = (root / folder, root)
    for directory in looked_at:
        if all(_packed(directory / file).is_file() for file in files):
            return directory
    if download:
        _download(name, root)
        return root / folder
    for directory in looked_at:
        missing = [file for file in files if not _packed(directory / file).is_file()]
        if len(missing) < len(files):
            raise UserError(f"{name} is not complete: {directory / missing[0]} is missing")
    raise UserError(f"no {name} in {root}: expected is {_layout(name, root)}")


def _download(name: str, root: Path) -> None:
    """Download and unpack an archive; torchvision checks it.

    Raises:
        UserError: That failed.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        if name == "fashion_mnist":
            datasets.FashionMNIST(root, download=True)
        else:
            kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
            kind = kinds.get(name, datasets.STL10)
            download_and_extract_archive(
                kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5
            )
    except (OSError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{name} could not be downloaded ({_one_line(error)}); expected is "
            f"{_layout(name, root)}"
        ) from error


# ---- The archives


def _digits() -> Dataset:
    """The 1,797 hand-written digits that scikit-learn ships: 1,347 to train on, 450 held out.

    The split is stratified by class and the same for every seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.reshape(-1, 1, 8, 8).astype(np.uint8),
        labels.astype(np.int64),
        test_size=HELD_OUT,
        stratify=labels,
        random_state=0,
    )
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    train, test = Memory(x_train, y_train, maximum=16), Memory(x_test, y_test, maximum=16)
    return Dataset("digits", tuple("0123456789"), train, train, test)


def _labels(values: Any, path: Path, images: int, classes: Sequence[str]) -> Tensor:
    """Labels, checked: as many as images, and each of a class."""
    labels = torch.as_tensor(values, dtype=torch.int64)
    if len(labels) != images:
        raise UserError(f"{path} has {len(labels)} labels for {images} images")
    if wrong := labels[(labels < 0) | (labels >= len(classes))].tolist():
        raise UserError(f"{path} has a label {wrong[0]}, but there are {len(classes)} classes")
    return labels


def _fashion_mnist(directory: Path) -> Dataset:
    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    parts = []
    for part in ("train", "t10k"):
        images = _idx(_packed(directory / f"{part}-images-idx3-ubyte"), axes=3)
        path = _packed(directory / f"{part}-labels-idx1-ubyte")
        labels = _labels(_idx(path, axes=1), path, len(images), classes)
        parts.append(Memory(images.unsqueeze(1), labels))
    train, test = parts
    return Dataset("fashion_mnist", classes, train, train, test)


def _idx(path: Path, axes: int) -> Tensor:
    """The bytes in an IDX file, gzipped or not.

    The format: two zeros, 8 for unsigned bytes, the number of axes, the length of each as a
    big-endian 32-bit integer, then the bytes in C order.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = bytearray(file.read())
    except Exception as error:  # gzip raises EOFError, zlib.error and OSError on damaged files
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error
    start = 4 + 4 * axes
    if len(content) < start or content[:4] != bytes((0, 0, 8, axes)):
        raise UserError(f"{path} is not an IDX file of bytes with {axes} axes")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    if len(content) != start + math.prod(shape) or 0 in shape:
        raise UserError(
            f"{path} should have {math.prod(shape)} bytes {shape} after its head, and at least "
            f"one; it has {len(content) - start}"
        )
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)


def _cifar(name: str, directory: Path) -> Dataset:
    if name == "cifar10":
        *train_files, test_file, meta = _CIFAR10
        label_key, class_key = "labels", "label_names"
    else:
        train_files, test_file, meta = ["train"], "test", "meta"
        label_key, class_key = "fine_labels", "fine_label_names"
    names = _unpickle(directory / meta).get(class_key)
    if not isinstance(names, list) or not all(isinstance(n, (bytes, str)) for n in names):
        raise UserError(f"{directory / meta} is not a file of {name}: it has no {class_key}")
    classes = tuple(n.decode() if isinstance(n, bytes) else n for n in names)

    def read(files: Sequence[str]) -> Memory:
        images, labels = [], []
        for path in (directory / file for file in files):
            content = _unpickle(path)
            pixels, values = content.get("data"), content.get(label_key)
            if not isinstance(pixels, _PickledArray) or not isinstance(values, list):
                raise UserError(f"{path} is not a file of {name}: it has no data or {label_key}")
            if not values:
                raise UserError(f"{path} has no images")
            try:
                images.append(pixels.array().reshape(-1, 3, 32, 32))
                labels.append(_labels(values, path, len(images[-1]), classes))
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{path} is not a file of {name}: {_one_line(error)}") from error
        return Memory(torch.from_numpy(np.concatenate(images)), torch.cat(labels))

    train = read(train_files)
    return Dataset(name, classes, train, train, read([test_file]))


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: content[key] for key in content}
    except Exception as error:  # what damaged pickles raise is not limited
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


class _Unpickler(pickle.Unpickler):
    """Reads plain values and arrays of bytes; nothing that the file names is executed."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _PickledArray
            case ("numpy", "ndarray" | "dtype"):
                return _Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of CIFAR")


class _Ignored:
    """Stands for ``numpy.ndarray`` and a ``numpy.dtype``."""

    def __init__(self, name: bytes | str = "", *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class _PickledArray:
    """Stands for an array, with what ``ndarray.__reduce__`` writes about it."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The array, of the shape that it was written with; or ValueError or TypeError."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _Ignored) or dtype.name not in (b"u1", "u1"):
            raise TypeError("its data are not bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _stl10(directory: Path) -> Dataset:
    classes = (
        *("airplane", "bird", "car", "cat", "deer"),
        *("dog", "horse", "monkey", "ship", "truck"),
    )

    def labelled(images: Tensor, file: str) -> Memory:
        path = directory / file
        labels = np.fromfile(path, np.uint8).astype(np.int64) - 1  # the file counts from 1
        return Memory(images, _labels(labels, path, len(images), classes))

    train, unlabelled = directory / "train_X.bin", directory / "unlabeled_X.bin"
    images = _stl10_images(train, unlabelled)
    return Dataset(
        "stl10",
        classes,
        Memory(images, None),
        labelled(images[: _stl10_count(train)], "train_y.bin"),
        labelled(_stl10_images(directory / "test_X.bin"), "test_y.bin"),
    )


def _stl10_count(path: Path) -> int:
    """How many images a file holds: of 3 channels with 96 columns of 96 bytes."""
    count, rest = divmod(path.stat().st_size, 3 * 96 * 96)
    if rest or not count:
        raise UserError(f"{path} should hold whole images of 27648 bytes, and at least one")
    return count


def _stl10_images(*paths: Path) -> Tensor:
    """The images of the files, one after the other, (n, 3, 96, 96)."""
    counts = [_stl10_count(path) for path in paths]
    images = torch.empty((sum(counts), 3, 96, 96), dtype=torch.uint8)
    for part, path in zip(images.split(counts), paths, strict=True):
        # Mapped, not read: the 2.8 GB of unlabelled images are in memory only once.
        content = torch.from_file(str(path), size=part.numel(), dtype=torch.uint8)
        part.copy_(content.view(part.shape).mT)  # the file goes down the columns
    return images


# ---- Folders of images


def _cifar10_images(root: Path) -> Dataset:
    train, classes = _class_folders(root / "train")
    test, _ = _class_folders(root / "test", classes)
    memory = _read(train)
    return Dataset("cifar10", classes, memory, memory, _read(test))


def _imagenet(root: Path) -> Dataset:
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"no {root / part}: expected is {_layout('imagenet', root)}")
    train, classes = _class_folders(root / "train")
    test, _ = _class_folders(root / "val", classes)
    return Dataset("imagenet", classes, train, train, test)


def _folder(root: Path) -> Dataset:
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; expected is {_layout('folder', root)}")
    top = root / "train" if (root / "train").is_dir() else root
    paths = _images(str(top))
    if not paths:
        raise UserError(f"no images in {top}; their names end with {', '.join(EXTENSIONS)}")
    pretrain = Files(paths, None)
    if top is root or len(_entries(str(top))[0]) < 2:
        return Dataset("folder", (), pretrain, None, None)
    train, classes = _class_folders(top)
    held_out = [root / part for part in ("test", "val") if (root / part).is_dir()]
    test = _class_folders(held_out[0], classes)[0] if held_out else None
    return Dataset("folder", classes, pretrain, train, test)


def _class_folders(
    top: Path, classes: tuple[str, ...] | None = None
) -> tuple[Files, tuple[str, ...]]:
    """The images in folders named by their classes, ordered by class and path.

    Args:
        top: The directory of the folders.
        classes: Those that are expected, sorted; by default whichever there are.

    Returns:
        The images, and the classes.

    Raises:
        UserError: Other folders than expected, or one without images.
    """
    if not top.is_dir():
        raise UserError(f"no directory {top}; expected is {top}/<class>/<image>.jpg")
    found = tuple(_entries(str(top))[0])
    if not found:
        raise UserError(f"no folders in {top}; expected is {top}/<class>/<image>.jpg")
    if classes is not None and (wrong := sorted({*found} ^ {*classes})):
        state = "is one too many" if wrong[0] in found else "is missing"
        raise UserError(f"the classes in {top} are not those to train on: {wrong[0]} {state}")
    folders = [_images(f"{top}/{name}") for name in found]
    if not all(folders):
        raise UserError(f"no images in {top / found[folders.index([])]}")
    counts = torch.tensor([len(folder) for folder in folders])
    paths = [path for folder in folders for path in folder]
    return Files(paths, torch.arange(len(found)).repeat_interleave(counts)), found


def _entries(directory: str) -> tuple[list[str], list[str]]:
    """The sorted names of the folders and of the images in a directory, without hidden ones."""
    folders, images = [], []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _images(directory: str) -> list[str]:
    """The paths of all images in a directory and below it, in an order that is always the same."""
    folders, images = _entries(directory)
    paths = [f"{directory}/{name}" for name in images]
    for name in folders:
        paths += _images(f"{directory}/{name}")
    return paths


def _read(files: Files) -> Memory:
    """Images, all of one size, from their files into memory."""
    paths = files.paths
    images = torch.empty((len(paths), *decode(paths[0]).shape), dtype=torch.uint8)

    def put(row: int) -> None:
        image = decode(paths[row])
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{paths[row]} has {tuple(image.shape[1:])} pixels, but {paths[0]} has "
                f"{tuple(images.shape[2:])}"
            )
        images[row] = image

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for _ in pool.map(put, range(len(paths))):
            pass
    return Memory(images, files.labels)
