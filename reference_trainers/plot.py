"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .recipe import LABELS, PREDICTORS
from .style import COLOURS, LEADING, STYLE

if TYPE_CHECKING:
    from .train import Run

CURVES = {
    "probe": "Linear probe, top-1 (%)",
    "knn": "20 nearest neighbours, top-1 (%)",
    "spread": "Spread (0 collapsed, 1 isotropic)",
}
"""The curves over the epochs, those that are measured; their names stand beside the last."""

SMALL_PRINT = "#555555"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw accuracies and spread of all predictors, the spectra of DirectPred, and alignment.

    Args:
        runs: Of one comparison, at least one.
        path: The PNG to write.
    """
    by_predictor = {
        name: [run for run in runs if run.recipe.predictor == name]
        for name in PREDICTORS
        if any(run.recipe.predictor == name for run in runs)
    }
    with matplotlib.rc_context(STYLE):
        # Not by pyplot, which would look for a display and keep the figure.
        figure = Figure(figsize=(10, 6.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        rows: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.03)
        top, bottom = rows
        curves = {metric: title for metric, title in CURVES.items() if metric in runs[0].history[0]}
        (drawn,) = top.subplots(1, len(curves), squeeze=False)
        for axes, (metric, title) in zip(drawn, curves.items(), strict=True):
            _curves(axes, by_predictor, metric, title)
        _names(drawn[-1], by_predictor, [*curves][-1])
        top.suptitle(_about(runs), x=0.01, ha="left", fontsize=8, color=SMALL_PRINT)
        correlation, weight, alignment = bottom.subplots(1, 3)
        heads = by_predictor.get("directpred", [])
        _spectrum(correlation, heads, "correlation_eigenvalues", "DirectPred: eigenvalues of F̂")
        correlation.set_yscale("log")
        _spectrum(weight, heads, "weight_eigenvalues", "DirectPred: eigenvalues of $W_p$")
        weight.set_ylim(0, None)
        _alignment(alignment, by_predictor)
        for axes in (*drawn, correlation, weight, alignment):
            axes.set_xlabel("epoch")
            axes.set_xlim(0, runs[0].recipe.epochs)
        figure.savefig(path)


def _series(runs: Sequence[Run], metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The evaluated epochs, and the values of a metric, (seeds, epochs) or (seeds, epochs, d)."""
    measured = [[point for point in run.history if metric in point] for run in runs]
    epochs = np.asarray([point["epoch"] for point in measured[0]], dtype=float)
    return epochs, np.asarray([[point[metric] for point in run] for run in measured])


def _curves(axes: Axes, by_predictor: dict[str, list[Run]], metric: str, title: str) -> None:
    """The mean of every predictor with a band of one standard deviation."""
    for name, runs in by_predictor.items():
        epochs, values = _series(runs, metric)
        centre, band = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0
        axes.plot(epochs, centre, color=COLOURS[name])
        axes.fill_between(
            epochs, centre - band, centre + band, color=COLOURS[name], alpha=0.12, linewidth=0
        )
    axes.set_title(title)
    if metric == "spread":
        axes.set_ylim(0, None)


def _names(axes: Axes, by_predictor: dict[str, list[Run]], metric: str) -> None:
    """The name of every predictor, beside the end of its curve."""
    ends = {name: _series(runs, metric)[1].mean(0)[-1] for name, runs in by_predictor.items()}
    low, high = axes.get_ylim()
    places = _apart(list(ends.values()), gap=(high - low) * 0.075)
    for (name, end), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            LABELS[name],
            (1, end),
            xytext=(1.06, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=COLOURS[name],
            va="center",
            fontsize=8.5,
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[name],
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def _apart(values: Sequence[float], gap: float) -> NDArray[np.float64]:
    """Places for labels near the values, at least a gap apart and in their order."""
    order = np.argsort(values, kind="stable")
    places = np.asarray(values, dtype=float)[order]
    for _ in range(200):
        short = gap - np.diff(places)
        if (short <= gap * 1e-3).all():
            break
        push = np.where(short > 0, short / 2, 0)
        places[:-1] -= push
        places[1:] += push
    apart = np.empty_like(places)
    apart[order] = places
    return apart


def _spectrum(axes: Axes, runs: Sequence[Run], metric: str, title: str) -> None:
    """Every eigenvalue over the epochs, of the first seed, from dark (the least) to light."""
    axes.set_title(title)
    if not runs:
        _note(axes, "DirectPred is not in this comparison")
        return
    epochs, values = _series(runs[:1], metric)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, values.shape[-1]))
    for index, colour in enumerate(colours):
        # Before the first step there is no spectrum: F̂ is zero and W_p the identity.
        axes.plot(epochs[1:], values[0, 1:, index], color=colour, linewidth=0.8)


def _alignment(axes: Axes, by_predictor: dict[str, list[Run]]) -> None:
    """How far the predictors that are a matrix keep the leading eigenvectors of F in place."""
    axes.set_title("Alignment cos∠($u_j$, $Wu_j$)")
    axes.set_ylim(-0.05, 1.05)
    for name, label, below in (
        ("directpred", "DirectPred, by construction", True),
        ("linear", LABELS["linear"], False),
    ):
        if name not in by_predictor:
            continue
        epochs, values = _series(by_predictor[name], "alignment")
        curve = values[..., -LEADING:].mean((0, 2))
        axes.plot(epochs, curve, color=COLOURS[name])
        axes.annotate(
            label,
            (epochs[-1], curve[-1]),
            xytext=(-3, -5 if below else 6),
            textcoords="offset points",
            ha="right",
            va="top" if below else "bottom",
            color=COLOURS[name],
            fontsize=8.5,
        )
    _note(axes, f"mean over the {LEADING} leading\neigenvectors $u_j$ of F")


def _about(runs: Sequence[Run]) -> str:
    seeds = len({run.recipe.seed for run in runs})
    return f"{runs[0].recipe.images}, " + (
        "1 seed" if seeds == 1 else f"mean ± std of {seeds} seeds"
    )


def _note(axes: Axes, text: str) -> None:
    """Small print in the lower right corner."""
    axes.text(
        *(0.985, 0.02),
        text,
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        color=SMALL_PRINT,
        fontsize=8,
        linespacing=1.25,
    )
