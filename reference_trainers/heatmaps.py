"""The picture of a sweep: heat maps of its grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .recipe import spelled
from .style import COLOURS, STYLE


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
    axes.set_xticks(range(len(columns)), [short(x) for x in columns])
    axes.set_yticks(range(len(rows)), [short(y) for y in rows] if labelled else [])
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
    axes.set_xticks(range(len(values)), [short(x) for x in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(name)


def short(value: Any) -> str:
    """An option's value in six digits."""
    return f"{value:g}" if isinstance(value, float) else spelled(value)
