"""Ctrl-C and SIGTERM: a wish to stop, and how a command ends by it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

from .errors import Terminated

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None
STOPPING = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether to stop, to be asked for between two steps.

    Attributes:
        number: The signal that asked; SIGTERM where it was another rank's.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number is not None


@contextmanager
def stop_on_signals() -> Iterator[Wish]:
    """Turn Ctrl-C and SIGTERM into a wish; a second one interrupts at once."""
    wish = Wish()

    def ask(number: int, frame: FrameType | None) -> None:
        wish.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminate)

    with _handled(ask):
        yield wish


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, as Ctrl-C raises KeyboardInterrupt."""
    with _handled(_terminate, (signal.SIGTERM,)):
        yield


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Have the processes that are started meanwhile leave the signals to this one.

    A terminal sends Ctrl-C, and a batch system may send SIGTERM, to every process of a command. The
    processes inherit that the two are blocked; this one has them after, should one come meanwhile.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], Any] | int | None,
    numbers: tuple[int, ...] = STOPPING,
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
