from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the train extra")

from directpred.reference_trainers.cli import main

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Start:
    """Starts the command in a process group of its own, as a terminal does."""

    def start(*arguments: str | Path) -> subprocess.Popen[str]:
        # A shell has its background jobs ignore Ctrl-C, and so would these, were pytest one.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from directpred.reference_trainers.cli import main; sys.exit(main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short comparison of all predictors."""
    out = tmp_path_factory.mktemp("runs")
    arguments = ["--epochs", "4", "--seeds", "1", "--out", str(out), "--name", "all"]
    assert main(["compare", *arguments]) == 0
    return out / "all"
