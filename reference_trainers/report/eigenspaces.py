"""The picture of what learned linear predictors make of the eigenvectors of F."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..siamese import RULES
from ..style import COLOURS, STYLE
from .curves import MOST_LINES, short
from .directory import Group, Values

MOST_LEARNED = 4
"""Learned linear predictors that are drawn, at most: each takes a row."""


def draw_eigenspaces(groups: Sequence[Group], labels: Sequence[str]) -> bytes | None:
    """The picture of what learned linear predictors make of the eigenvectors u_j of F.

    A row for each, of its first seed: the alignment of every u_j over the epochs; u_jᵀ W_p u_j
    against s_j, both over their greatest, with the parabola of the theory and Eq. 18; and
    ‖W_p u_j‖² / α_p against ‖Wᵀ u_j‖² of the projector's last layer, which Theorem 1 makes equal in
    the long run.

    Args:
        groups: Those of learned linear predictors are drawn, at most `MOST_LEARNED`.
        labels: What to call each.

    Returns:
        A PNG, or None where there is no such group.
    """
    learned = [
        (group, short(label))
        for group, label in zip(groups, labels, strict=True)
        if group.series("weight_diagonal") is not None
    ][:MOST_LEARNED]
    if not learned:
        return None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(11, 3.1 * len(learned)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        rows: Any = figure.subplots(len(learned), 3, squeeze=False)
        for panels, (group, label) in zip(rows, learned, strict=True):
            _learned(panels, group, label)
        bar = figure.colorbar(
            ScalarMappable(Normalize(-1, 1), "RdBu"), ax=rows, shrink=0.6 / len(learned), pad=0.01
        )
        bar.set_label("cos∠($u_j$, $W_pu_j$)")
        bar.outline.set_visible(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _learned(panels: Sequence[Axes], group: Group, label: str) -> None:
    """A row of `draw_eigenspaces`."""

    def of_first_seed(metric: str) -> tuple[Values, Values] | None:
        series = group.series(metric)
        return series and (series[0], series[1][0, :, -MOST_LINES:])

    aligned, s, p = map(of_first_seed, ("alignment", "correlation_eigenvalues", "weight_diagonal"))
    assert aligned is not None
    assert s is not None
    assert p is not None
    epochs, cosines = aligned
    edges = np.concatenate([epochs[:1], (epochs[1:] + epochs[:-1]) / 2, epochs[-1:]])
    if len(epochs) == 1:
        edges = epochs[0] + np.asarray([-0.5, 0.5])
    rank = np.arange(cosines.shape[1] + 1) + 0.5
    panels[0].pcolormesh(edges, rank, cosines.T[::-1], cmap="RdBu", vmin=-1, vmax=1)
    panels[0].invert_yaxis()
    panels[0].grid(visible=False)
    panels[0].set_title(f"{label}\nAlignment of $u_j$, the leading one on top")
    panels[0].set_xlabel("epoch")
    panels[0].set_ylabel("rank of $s_j$")

    share, weight = s[1][-1] / s[1][-1].max(), p[1][-1] / np.abs(p[1][-1]).max()
    known = share > 1e-8  # below, eigenvalues of a correlation that lacks rank are rounding
    dots: dict[str, Any] = {"cmap": "RdBu", "vmin": -1, "vmax": 1, "edgecolors": "#222222"}
    dots |= {"s": 20, "linewidths": 0.6, "zorder": 3}
    panels[1].scatter(share[known], weight[known], c=cosines[-1, known], **dots)
    grid = np.geomspace(share[known].min(), 1, 200)
    eq18 = RULES["directpred"]()(s[1][-1].max() * grid)
    panels[1].plot(
        grid, np.sqrt(grid), "--", color="#444444", linewidth=1, label="parabola, p ∝ √s"
    )
    panels[1].plot(
        grid, eq18 / eq18[-1], color=COLOURS["directpred"], linewidth=1, label="Eq. 18, ε = 0.1"
    )
    panels[1].set_xscale("log")
    panels[1].set_xlabel("$s_j$ / max $s$")
    panels[1].set_ylabel("$p_j=u_j^TW_pu_j$ / max |$p$|")
    panels[1].set_title(f"$p_j$ against $s_j$ at epoch {epochs[-1]:.0f}")
    panels[1].legend(loc="upper left", frameon=False, fontsize=8.5)

    norms, projector = of_first_seed("weight_norms"), of_first_seed("projector_norms")
    if norms is None or projector is None:
        panels[2].set_axis_off()
        return
    rate = float(group.recipe.get("predictor_lr", 1.0)) or 1.0
    x, y = projector[1] ** 2, norms[1] ** 2 / rate
    panels[2].scatter(x[0], y[0], s=14, facecolors="none", edgecolors="#999999", label="epoch 0")
    panels[2].scatter(x[-1], y[-1], c=cosines[-1], label=f"epoch {epochs[-1]:.0f}", **dots)
    both = np.concatenate([x[0], y[0], x[-1], y[-1]])
    ends = both[both > 0].min(), both.max()
    panels[2].plot(ends, ends, "--", color="#444444", linewidth=1, label="Theorem 1, in the end")
    panels[2].set_xscale("log")
    panels[2].set_yscale("log")
    panels[2].set_xlabel("$\\|W^Tu_j\\|^2$ of the projector's last layer")
    panels[2].set_ylabel("$\\|W_pu_j\\|^2/\\alpha_p$")
    panels[2].set_title("Balance of projector and predictor")
    panels[2].legend(loc="upper left", frameon=False, fontsize=8.5)
