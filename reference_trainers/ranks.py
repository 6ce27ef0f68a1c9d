"""What can befall one of several processes, and how the others learn of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from unittest import mock

from .errors import Lost

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: it has to outlast an evaluation, which the first rank does
while the others wait. A rank that died is noticed at once where its connections tell (gloo), and
by the process that started it, else after this time."""

GRACE = 10.0
"""Seconds in which the ranks of a machine have to end by themselves once one of them has."""

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.+)")
_SOURCE = re.compile(r"^\[\S+\] ")
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|timed out|timeout|process group", re.IGNORECASE
)


def explained(error: Exception) -> Exception:
    """The error, or what is behind it where it is torch's way of saying that a process died."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return error
    if found := _WORKER.search(text):
        pids, how = found.groups()
        how = how.partition(". ")[0].rstrip(".")
        return Lost(f"a process that decodes images (pid {pids}) {how}; was memory short?")
    if _LOST.search(text):
        return Lost(
            f"another process of this run has ended or hangs ({_SOURCE.sub('', text)[:80]})"
        )
    return error


@contextmanager
def deaths_explained() -> Iterator[None]:
    """Raise what `explained` says."""
    try:
        yield
    except Exception as error:
        if (cause := explained(error)) is error:
            raise
        raise cause from error


@contextmanager
def watched() -> Iterator[None]:
    """Let the ranks that Lightning starts on this machine end together.

    Lightning's own observer kills this process, without a word and maybe in the middle of a save,
    within seconds of another rank's end with an error, be that an interruption.
    """
    processes: list[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def launch(started: list[subprocess.Popen[bytes]]) -> None:
        processes.extend(started)
        threading.Thread(target=watch, daemon=True).start()

    def watch() -> None:
        while not over.wait(1):
            for rank, process in enumerate(processes, 1):
                if process.poll() and not over.wait(GRACE):
                    how = f"process {rank} of this machine ended with status {process.returncode}"
                    print(f"directpred: {how}; ending the others", file=sys.stderr, flush=True)
                    _end(processes, 0)
                    os._exit(1)  # this thread's main one may wait for the device for ever

    launchers = "lightning.pytorch.strategies.launchers.subprocess_script"
    with mock.patch(f"{launchers}._launch_process_observer", launch, create=True):
        try:
            yield
        finally:
            over.set()
            _end(processes, GRACE)


@contextmanager
def without_signal_handlers() -> Iterator[None]:
    """Keep Lightning from handling SIGTERM, of which it also tells the ranks at every step."""
    loops = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
    connector = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"
    with ExitStack() as stack:
        for name in (f"{connector}.register_signal_handlers", f"{loops}._broadcast_sigterm_tensor"):
            stack.enter_context(mock.patch(name, create=True))
        yield


def _end(processes: list[subprocess.Popen[bytes]], grace: float) -> None:
    until = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
