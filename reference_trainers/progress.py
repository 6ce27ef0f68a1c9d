"""Progress: live bars on a terminal, sober lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from .monitor import Measurement


def open_console() -> Console:
    """Standard output; where it is no terminal, tables may be 100 characters wide."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


class Progress:
    """A bar over all epochs of all runs and, where there are several, one for each that is active.

    Args:
        console: Where to show it. Where that is no terminal, only the printed lines appear.
        total: Epochs of all runs together.
    """

    def __init__(self, console: Console, total: int) -> None:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=36),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bars = Bars(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.overall = self.bars.add_task("all runs", total=total)
        self.active: dict[str, TaskID] = {}
        self.done: dict[str, int] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def advance(self, run: str, epoch: int, epochs: int) -> None:
        """A run has done ``epoch`` of its ``epochs``."""
        self.done[run] = epoch
        if run not in self.active:
            self.active[run] = self.bars.add_task(run, total=epochs)
        self.bars.update(self.active[run], completed=epoch, visible=epoch < epochs)
        self.bars.update(self.overall, completed=sum(self.done.values()))

    def print(self, line: str) -> None:
        """Print a line above the bars."""
        self.bars.console.print(line, highlight=False, markup=False, soft_wrap=True)


def one_line(measured: Measurement) -> str:
    """The main numbers of a measurement."""
    parts = {
        "probe": "linear probe {:6.2f} %",
        "knn": "k-NN {:6.2f} %",
        "spread": "spread {:.3f}",
        "effective_rank": "effective rank {:.2f}",
    }
    return "  ".join(
        form.format(measured[name]) for name, form in parts.items() if name in measured
    )
