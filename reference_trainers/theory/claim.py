"""What an experiment on the equations comes to: findings for the table, panels for the figure."""

from __future__ import annotations

from dataclasses import dataclass

from .equations import Array


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        what: The quantity.
        measured: On the integrated equations.
        predicted: By the theory; None where it says nothing.
        relation: Of the measured to the predicted: "=", "≤" or "≥".
        tolerance: Of the comparison, relative to the predicted (and to 1e-6 at least).
    """

    what: str
    measured: float
    predicted: float | None = None
    relation: str = "="
    tolerance: float = 0.01

    @property
    def holds(self) -> bool | None:
        """Whether the prediction came true; None where there is none."""
        if self.predicted is None:
            return None
        slack = self.tolerance * max(abs(self.predicted), 1e-6)
        above = bool(self.measured >= self.predicted - slack)
        below = bool(self.measured <= self.predicted + slack)
        return {"=": above and below, "≥": above, "≤": below}[self.relation]


@dataclass(frozen=True)
class Curve:
    """A line in a panel.

    Attributes:
        label: Its name; the legend has the first of a name.
        x: (m,).
        y: (m,), or (m, k) for k lines.
        colour: Which of the palette.
        predicted: Whether it is the theory's: dashed, over what is measured.
        dots: Whether its points are drawn, and no line.
    """

    label: str
    x: Array
    y: Array
    colour: int = 0
    predicted: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Cells:
    """A phase diagram: values (len(y), len(x)) in [0, 1], 0 for collapse."""

    x: Array
    y: Array
    values: Array


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        title: What is seen.
        x: Label of the axis.
        y: Label of the axis.
        curves: The lines.
        log: The axes that are logarithmic: "", "x", "y" or "xy".
        cells: Shades below the lines.
        xlim: Limits, where not those of the data.
        ylim: Likewise.
        legend: Where matplotlib puts it.
        texts: Words in the plot: (x, y, text).
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    log: str = ""
    cells: Cells | None = None
    xlim: tuple[float, float] | None = None
    ylim: tuple[float, float] | None = None
    legend: str = "best"
    texts: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True)
class Result:
    """What a claim came to: the claim in a sentence, the lines of the table, the figure."""

    claim: str
    findings: tuple[Finding, ...]
    panels: tuple[Panel, ...]
