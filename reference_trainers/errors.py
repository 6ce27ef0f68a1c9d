"""What a user is told in one line: errors, warnings, and that a run was stopped."""

from __future__ import annotations

import signal
import sys


class UserError(Exception):
    """Something the user can put right: a missing file, a broken checkpoint. Exit status 1."""


class UsageError(UserError):
    """A command line or config that makes no sense. Exit status 2."""


class Lost(UserError):
    """Another process of the command has died; a run can go on from its last checkpoint."""


class Interrupted(Exception):
    """The user or the system asked to stop; the message says what was kept.

    Attributes:
        number: The signal that asked. The exit status is 128 more, as a shell has it.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Terminated(KeyboardInterrupt):
    """SIGTERM came, and ends the command as Ctrl-C does."""


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind it."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


def warn(message: str) -> None:
    """Tell the user of something that the run survives."""
    print(f"directpred: warning: {message}", file=sys.stderr, flush=True)
