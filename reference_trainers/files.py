"""Files that are there as a whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` at the end; an error leaves the old one.

    It is written beside ``path``, since only within a file system one file can replace another at
    once, and is on the disk before it does: after a power failure there is the old or the new one.

    Raises:
        OSError: The file cannot be written; ``filename`` names it.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    _sync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Write a file by `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def reason(error: OSError) -> str:
    """Why a file could not be written, without its name."""
    return error.strerror or str(error)


def _sync(directory: Path) -> None:
    """Put the names in a directory on the disk, where the system can do that."""
    with suppress(OSError):
        opened = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
