"""What all pictures have in common."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, told apart also by the colour-blind; yellow is too pale on white.
COLOURS = {
    "directpred": "#0072B2",
    "eq18_printed": "#882288",
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
