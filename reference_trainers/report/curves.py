"""The picture of what was measured: curves over the epochs, and spectra."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..siamese import RULES
from ..style import COLOURS, LEADING, STYLE
from .directory import SPECTRA, Group

CURVES = {
    "probe": "Linear probe, held-out top-1 (%)",
    "knn": "k-NN, held-out top-1 (%)",
    "loss": "Training loss",
    "spread": "Spread (0 collapsed, 1 isotropic)",
    "effective_rank": "Effective rank",
    "alignment": "Alignment cos∠($u_j$, $Wu_j$)",
}
"""Metrics drawn over the epochs, with their titles."""

MOST_SPECTRA = 8
"""Groups whose spectra are drawn, at most: each takes a row."""
MOST_LINES = 64
"""Eigenvalues drawn, at most; of more, as many evenly by rank."""


DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)))
SHADES = ((0.0, 1.0), (0.45, 0.0), (0.5, 1.0))
"""How much of which grey (0 black, 1 white) is mixed into the colour of a predictor."""

RULE_NAMES = {
    "directpred": "Eq. 18",
    "eq18_printed": "Eq. 18 as printed",
    "directset": "DirectSet",
    "directcopy": "DirectCopy",
    "boost_scale": "BoostScale",
    "no_stopgrad": "Eq. 18",
}


def draw(groups: Sequence[Group], labels: Sequence[str]) -> bytes:
    """The picture: curves over the epochs, then the spectra of every predictor that has any.

    Args:
        groups: At least one of them with something measured.
        labels: What to call each.

    Returns:
        A PNG.
    """
    lines = [
        (group, short(label), style)
        for group, label, style in zip(groups, labels, _styles(groups), strict=True)
        if group.last_epoch is not None
    ]
    curves = [metric for metric in CURVES if any(group.series(metric) for group, *_ in lines)]
    spectra = [(group, label) for group, label, _ in lines if group.is_set][:MOST_SPECTRA]
    width = 2 if len(curves) in (2, 4) else min(3, len(curves))
    rows = [curves[start : start + width] for start in range(0, len(curves), width)]
    columns = 3 if max(len(label) for _, label, _ in lines) <= 34 else 2
    legend_rows = -(-len(lines) // columns)
    heights = [2.5] * len(rows) + [2.6] * len(spectra)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A run may be called by letters that the font lacks; the page has them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(
            figsize=(11, sum(heights) + 0.2 * legend_rows + 0.3), dpi=150, layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)
        end = max(group.last_epoch or 0 for group, *_ in lines)
        for row, metrics in enumerate(rows):
            for place, metric in enumerate(metrics):
                span = 6 // len(metrics)
                axes = figure.add_subplot(grid[row, place * span : (place + 1) * span])
                epoch_axis(axes, end)
                _curve(axes, metric, [(group, style) for group, _, style in lines])
        for row, (group, label) in enumerate(spectra, len(rows)):
            panels = [figure.add_subplot(grid[row, start : start + 2]) for start in (0, 2, 4)]
            _spectra(panels, group, label)
        figure.legend(
            [Line2D([], [], **style) for *_, style in lines],
            [label for _, label, _ in lines],
            loc="outside upper left",
            ncols=columns,
            frameon=False,
            handlelength=3,
        )
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _curve(axes: Axes, metric: str, lines: Iterable[tuple[Group, dict[str, Any]]]) -> None:
    """The mean over the seeds of every group, with a band of one standard deviation."""
    for group, style in lines:
        if (series := group.series(metric)) is None:
            continue
        epochs, values = series
        # Of a vector, the leading eigenvectors, which carry nearly all of the features.
        values = values[..., -LEADING:].mean(-1)
        centre = values.mean(0)
        axes.plot(epochs, centre, marker="o" if len(epochs) == 1 else None, markersize=4, **style)
        if len(values) > 1:
            band = values.std(0, ddof=1)
            colour = style["color"]
            axes.fill_between(
                epochs, centre - band, centre + band, color=colour, alpha=0.12, linewidth=0
            )
    axes.set_title(CURVES[metric])
    if metric in ("spread", "effective_rank"):
        axes.set_ylim(0, None)
    if metric == "alignment":
        axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.05)
        axes.set_xlabel(f"epoch (mean of the {LEADING} leading $u_j$ of F)")


def _spectra(panels: Sequence[Axes], group: Group, label: str) -> None:
    """Eigenvalues of F̂ and of W_p over the epochs, and one against the other at the last."""
    found = [group.series(metric) for metric in SPECTRA]
    (epochs, correlation), (_, weight) = (series for series in found if series is not None)
    s, p = correlation[0], weight[0]
    chosen = np.unique(np.linspace(0, s.shape[1] - 1, MOST_LINES).round().astype(int))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(chosen)))
    marker = "o" if len(epochs) == 1 else None
    for axes, values in ((panels[0], np.where(s > 0, s, np.nan)), (panels[1], p)):
        for index, colour in zip(chosen, colours, strict=True):
            axes.plot(
                epochs, values[:, index], color=colour, linewidth=0.9, marker=marker, markersize=3
            )
        epoch_axis(axes, int(epochs[-1]))
    panels[0].set_title(f"{label}\nEigenvalues $s_j$ of $\\hat{{F}}$")
    panels[0].set_yscale("log")
    panels[1].set_title("Eigenvalues $p_j$ of $W_p$")
    panels[2].set_title(f"$p_j$ against $s_j$ at epoch {epochs[-1]:.0f}")
    panels[2].scatter(s[-1, chosen], p[-1, chosen], c=colours, s=14, zorder=3)
    panels[2].set_xscale("log")
    panels[2].set_xlabel("$s_j$")
    panels[2].set_ylabel("$p_j$")
    if s.max() > 0:
        # Below this, eigenvalues of a correlation that lacks rank are rounding.
        panels[0].set_ylim(max(panels[0].get_ylim()[0], s.max() * 1e-8), None)
        panels[2].set_xlim(max(panels[2].get_xlim()[0], s[-1].max() * 1e-8), None)
    if group.predictor in RULES and group.recipe and s[-1, -1] > 0:
        eps = group.recipe.get("eps")
        rule = RULES[group.predictor](**({} if eps is None else {"eps": eps}))
        least = s[-1][s[-1] > 0].min()
        grid = np.geomspace(least, s[-1, -1], 200)
        name = f"{RULE_NAMES[group.predictor]}, ε = {getattr(rule, 'eps', eps):g}"
        panels[2].plot(grid, rule(grid), color="#444444", linewidth=1, label=name)
        panels[2].legend(loc="upper left", frameon=False, fontsize=8.5)
    for axes in panels[1:]:
        axes.set_ylim(min(0.0, float(p.min())), None)


def epoch_axis(axes: Axes, end: int) -> None:
    """Make the horizontal axis one of epochs, to the last."""
    axes.set_xlabel("epoch")
    axes.set_xlim(-0.02 * max(end, 1), 1.02 * max(end, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Each predictor has its colour; groups of the same one differ in dashes, then in shade."""
    before: dict[str, int] = {}
    styles = []
    for group in groups:
        count = before[group.predictor] = before.get(group.predictor, -1) + 1
        share, grey = SHADES[count // len(DASHES) % len(SHADES)]
        base = np.asarray(to_rgb(COLOURS.get(group.predictor, "#222222")))
        colour = tuple((1 - share) * base + share * grey)
        styles.append({"color": colour, "linestyle": DASHES[count % len(DASHES)]})
    return styles


def short(label: str) -> str:
    """For a picture: of a length that fits, and without TeX or a meaning to the legend."""
    label = label if len(label) <= 48 else f"{label[:22]}…{label[-25:]}"
    return " " * label.startswith("_") + label.replace("$", r"\$")
