"""The pictures of ``directpred dynamics``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..style import STYLE
from .claim import Panel, Result

# Okabe and Ito's palette, as in `plot`; what is predicted is black and dashed.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#8FCBB5")
PREDICTED = "#111111"
SHADES = LinearSegmentedColormap.from_list("collapse", ["#F0C9AE", "#FBF6F2", "#C9E0EF", "#7FB8DB"])


def draw(result: Result, path: Path) -> None:
    """Draw the panels of a claim, three in a row at most.

    Args:
        result: Of the claim.
        path: The PNG to write.
    """
    count = len(result.panels)
    _figure(result.panels, count if count <= 3 else math.ceil(count / 2), path, width=4.6)


def overview(results: Sequence[Result], path: Path) -> None:
    """Draw the first panel of every claim, four in a row.

    Args:
        results: Of the claims.
        path: The PNG to write.
    """
    _figure([result.panels[0] for result in results], 4, path, width=3.7)


def _figure(panels: Sequence[Panel], columns: int, path: Path, width: float) -> None:
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        # Not by pyplot, which would look for a display and keep the figure.
        figure = Figure(
            figsize=(width * columns, 0.8 * width * rows), dpi=150, layout="constrained"
        )
        FigureCanvasAgg(figure)
        places: Any = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(places.flat, panels, strict=True):
            _panel(axes, panel)
        figure.savefig(path)


def _panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    if panel.cells:
        cells = panel.cells
        axes.pcolormesh(cells.x, cells.y, cells.values, cmap=SHADES, shading="nearest")
        axes.grid(visible=False)
    named: set[str] = set()
    # What is predicted comes last, in the drawing and in the legend.
    for curve in sorted(panel.curves, key=lambda curve: curve.predicted):
        style: dict[str, Any] = {"color": PALETTE[curve.colour]}
        if curve.predicted:
            style = {"color": PREDICTED, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        elif curve.dots:
            style |= {"marker": "o", "markersize": 4, "linestyle": "none"}
        elif curve.y.ndim > 1:
            style |= {"linewidth": 1.1}
        first, *_ = axes.plot(curve.x, curve.y, **style)
        first.set_label("_" if curve.label in named else curve.label)
        named.add(curve.label)
    axes.set_xscale("log" if "x" in panel.log else "linear")
    axes.set_yscale("log" if "y" in panel.log else "linear")
    axes.set(xlim=panel.xlim, ylim=panel.ylim)
    for x, y, text in panel.texts:
        axes.text(x, y, text, color="#333333", fontsize=10)
    loc: Any = panel.legend
    axes.legend(loc=loc, framealpha=0.85, edgecolor="none", fontsize=7.5)
