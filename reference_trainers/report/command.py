"""The command ``directpred report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import files, records
from ..errors import UserError
from ..progress import open_console
from .curves import draw
from .directory import RunDirectory, read
from .eigenspaces import draw_eigenspaces
from .page import page, title


def report(runs: Sequence[Path], out: Path | None) -> None:
    """Compare runs on one page: write report.html, which stands alone, and report.png.

    Where a run has a learned linear predictor, alignment.png shows how far it has come to be what
    DirectPred sets.

    Args:
        runs: Directories that ``directpred train`` or ``directpred compare`` wrote; a run may still
            be going on.
        out: Directory to write to. By default that of the run; of several, the working directory.

    Raises:
        UserError: A run is missing or damaged, or nothing is measured yet.
    """
    found = [read(path) for path in dict.fromkeys(runs)]
    groups = [group for run in found for group in run.groups]
    if not any(group.last_epoch is not None for group in groups):
        raise UserError(f"nothing is measured yet in {', '.join(str(run.path) for run in found)}")
    directory = out or (found[0].path if len(found) == 1 else Path())
    directory.mkdir(parents=True, exist_ok=True)
    labels = _labels(found)
    picture = draw(groups, _group_labels(found, labels))
    eigenspaces = draw_eigenspaces(groups, _group_labels(found, labels))
    pictures = {"report.png": picture}
    if eigenspaces is not None:
        pictures["alignment.png"] = eigenspaces
    for name, content in pictures.items():
        files.write(directory / name, content)
    records.write(directory / "report.html", page(found, labels, picture, eigenspaces))
    written = [str(directory / name) for name in ("report.html", *pictures)]
    open_console().print(
        f"written to {', '.join(written[:-1])} and {written[-1]}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _labels(runs: Sequence[RunDirectory]) -> list[str]:
    """How tables and pictures call each run: by the name of its directory where that is enough."""
    names = [run.path.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _group_labels(runs: Sequence[RunDirectory], labels: Sequence[str]) -> list[str]:
    if len(runs) == 1:
        return [title(group.predictor) for group in runs[0].groups]
    return [
        f"{label} ({title(group.predictor)})"
        for run, label in zip(runs, labels, strict=True)
        for group in run.groups
    ]
