"""The errors that a user can cause; the command prints each as one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: a missing file, a broken checkpoint. Exit status 1."""


class UsageError(UserError):
    """A command line or config that makes no sense. Exit status 2."""


class Interrupted(Exception):
    """The user asked to stop; the message says what was kept. Exit status 130."""
