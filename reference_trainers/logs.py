"""Losses, rates and measurements for a spreadsheet and for TensorBoard."""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from . import files
from .errors import warn


@contextmanager
def open_logs(directory: Path) -> Iterator[Logger]:
    """The logs in the directory of a run. One that cannot be written ends, with a warning."""
    before = threading.excepthook

    def leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's writer is a thread of its own; its next call tells of the error."""
        if not isinstance(failure.exc_value, OSError):
            before(failure)

    threading.excepthook = leave_to_the_main_thread
    try:
        yield _Logs(directory)
    finally:
        threading.excepthook = before


class _Logs(Logger):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.logs: dict[str, Logger] = {
            str(directory / "log"): _Rows(directory, name="", version="log"),
            str(directory / "tensorboard"): TensorBoardLogger(
                directory, name="", version="tensorboard"
            ),
        }

    name = version = ""

    def _each(self, call: Callable[[Logger], object]) -> None:
        for path, log in list(self.logs.items()):
            try:
                call(log)
            except OSError as error:
                del self.logs[path]
                warn(f"cannot write {path}: {files.reason(error)}; it ends here")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the values of a step."""
        self._each(lambda log: log.log_metrics(dict(metrics), step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe is in every checkpoint and in summary.json."""

    @rank_zero_only
    def save(self) -> None:
        """Write what was logged."""
        self._each(lambda log: log.save())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files."""
        self._each(lambda log: log.finalize(status))


class _Rows(CSVLogger):
    """Lightning's, with whole rows only."""

    @property
    def experiment(self) -> Any:
        """The writer."""
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Go on with the log of a run that is resumed, which Lightning's would delete."""
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def save(self) -> None:
        """Append the rows, or leave the file as it was."""
        path = Path(self.metrics_file_path)
        self.size = path.stat().st_size if path.exists() else 0
        try:
            super().save()
        except OSError:
            if path.exists():
                os.truncate(path, self.size)
            raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        files.write(path, text.getvalue().encode())
        self.size = path.stat().st_size
