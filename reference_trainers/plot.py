"""The pictures of comparisons and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .recipe import LABELS, PREDICTORS

if TYPE_CHECKING:
    from .train import Run

# Okabe and Ito's palette, told apart also by the colour-blind; yellow is too pale on white.
COLOURS = {
    "directpred": "#0072B2",
    "directset": "#332288",
    "directcopy": "#56B4E9",
    "boost_scale": "#882255",
    "mlp": "#009E73",
    "linear": "#D55E00",
    "none": "#7F7F7F",
    "no_stopgrad": "#CC79A7",
}
LEADING = 16
"""So many eigenvectors of F carry nearly all of the features; the others are mostly noise."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
}


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw accuracy and spread of all predictors, the spectra of DirectPred, and alignment.

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
        figure = Figure(figsize=(9, 6.6), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        rows: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.03)
        top, bottom = rows
        accuracy, spread = top.subplots(1, 2)
        _curves(accuracy, by_predictor, "probe", "Linear probe, held-out top-1 (%)")
        _curves(spread, by_predictor, "spread", "Spread of the outputs (0 collapsed, 1 isotropic)")
        _note(accuracy, _about(runs))
        correlation, weight, alignment = bottom.subplots(1, 3)
        heads = by_predictor.get("directpred", [])
        _spectrum(correlation, heads, "correlation_eigenvalues", "DirectPred: eigenvalues of F̂")
        correlation.set_yscale("log")
        _spectrum(weight, heads, "weight_eigenvalues", "DirectPred: eigenvalues of $W_p$")
        weight.set_ylim(0, None)
        _alignment(alignment, by_predictor)
        for axes in (accuracy, spread, correlation, weight, alignment):
            axes.set_xlabel("epoch")
            axes.set_xlim(0, runs[0].recipe.epochs)
        figure.savefig(path)


def _series(runs: Sequence[Run], metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The evaluated epochs, and the values of a metric, (seeds, epochs) or (seeds, epochs, d)."""
    measured = [[point for point in run.history if metric in point] for run in runs]
    epochs = np.asarray([point["epoch"] for point in measured[0]], dtype=float)
    return epochs, np.asarray([[point[metric] for point in run] for run in measured])


def _curves(axes: Axes, by_predictor: dict[str, list[Run]], metric: str, title: str) -> None:
    """The mean of every predictor with a band of one standard deviation, named at its end."""
    ends = {}
    for name, runs in by_predictor.items():
        epochs, values = _series(runs, metric)
        centre, band = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0
        axes.plot(epochs, centre, color=COLOURS[name])
        axes.fill_between(
            epochs, centre - band, centre + band, color=COLOURS[name], alpha=0.12, linewidth=0
        )
        ends[name] = centre[-1]
    axes.set_title(title)
    if metric == "spread":
        axes.set_ylim(0, None)
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
    return f"{runs[0].recipe.dataset}, " + (
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
        color="#555555",
        fontsize=8,
        linespacing=1.25,
    )


@dataclass(frozen=True)
class Panels:
    """What a sweep has measured on a grid.

    Attributes:
        title: What is asked.
        vary: The values of every option that varies, the last one fastest.
        values: By metric, for each point of the grid the values of the seeds; NaN where there are
            none.
    """

    title: str
    vary: Mapping[str, Sequence[Any]]
    values: Mapping[str, Sequence[Sequence[float]]]


SWEPT = {
    "probe": ("Linear probe (%)", ".1f"),
    "spread": ("Spread (0 collapsed)", ".2f"),
    "effective_rank": ("Effective rank", ".1f"),
    "alignment": ("Alignment of $W_p$", ".2f"),
}
"""Metrics of a sweep that are drawn, with title and format."""


def plot_grids(grids: Sequence[Panels], about: str, path: Path) -> None:
    """Draw a row for each grid: heat maps for two options that vary, lines for one.

    A grid of more options is left out. The same metric has one scale of colours in all rows.

    Args:
        grids: Of one sweep.
        about: What all have in common.
        path: The PNG to write; none is where there is nothing to draw.
    """
    drawn = [grid for grid in grids if len(grid.vary) <= 2]
    if not drawn:
        return
    # An array of means for each grid and metric, NaN where nothing was measured.
    means = [
        {metric: _means(grid.values[metric]) for metric in SWEPT if metric in grid.values}
        for grid in drawn
    ]
    metrics = [m for m in SWEPT if any(np.isfinite(of.get(m, np.nan)).any() for of in means)]
    heights = [
        0.95 + (0.3 * len(next(iter(grid.vary.values()))) if len(grid.vary) == 2 else 1.7)
        for grid in drawn
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(2.95 * len(metrics), sum(heights) + 0.35), dpi=150, layout="constrained"
        )
        FigureCanvasAgg(figure)
        figure.suptitle(about, x=0.01, ha="left", fontsize=9, color="#555555")
        rows: Any = figure.subfigures(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
        for row, grid, of in zip(rows, drawn, means, strict=True):
            row.suptitle(grid.title, x=0.01, ha="left", fontsize=10, fontweight="bold")
            for place, metric in enumerate(metrics):
                axes = row.add_subplot(1, len(metrics), place + 1)
                title, form = SWEPT[metric]
                axes.set_title(title, fontweight="normal")
                if len(grid.vary) == 2:
                    everywhere = np.concatenate([other[metric] for other in means])
                    limits = np.nanmin(everywhere), np.nanmax(everywhere)
                    _heat(axes, grid.vary, of[metric], form, limits, labelled=place == 0)
                else:
                    _line(axes, grid.vary, grid.values[metric])
        figure.savefig(path)


def _means(points: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.asarray([np.mean(values) for values in points], dtype=float)


def _heat(
    axes: Axes,
    vary: Mapping[str, Sequence[Any]],
    means: NDArray[np.float64],
    form: str,
    limits: tuple[float, float],
    labelled: bool,
) -> None:
    """The mean at each point of two options: the first downwards, the second across."""
    (down, rows), (across, columns) = vary.items()
    table = means.reshape(len(rows), len(columns))
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#F0F0F0")
    axes.imshow(table, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.grid(visible=False)
    for (row, column), value in np.ndenumerate(table):
        known = bool(np.isfinite(value))
        bright = known and (value - limits[0]) > 0.6 * (limits[1] - limits[0])
        axes.text(
            *(column, row),
            format(value, form) if known else "–",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if bright or not known else "white",
        )
    axes.set_xticks(range(len(columns)), [spelled(x) for x in columns])
    axes.set_yticks(range(len(rows)), [spelled(y) for y in rows] if labelled else [])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(across)
    if labelled:
        axes.set_ylabel(down)


def _line(axes: Axes, vary: Mapping[str, Sequence[Any]], points: Sequence[Sequence[float]]) -> None:
    """Mean and standard deviation over the seeds at each value of one option, evenly apart."""
    ((name, values),) = vary.items()
    deviations = np.asarray([np.std(of, ddof=1) if len(of) > 1 else 0.0 for of in points])
    style: dict[str, Any] = {"color": COLOURS["directpred"], "marker": "o", "markersize": 4}
    axes.errorbar(range(len(values)), _means(points), deviations, capsize=3, **style)
    axes.set_xticks(range(len(values)), [spelled(x) for x in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(name)


def spelled(value: Any) -> str:
    """An option's value, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
