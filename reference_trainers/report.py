"""The command ``directpred report``: one page that compares runs, and the pictures on it."""

from __future__ import annotations

import base64
import csv
import io
import json
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from . import files, records
from .errors import UserError
from .plot import COLOURS, LEADING, STYLE
from .progress import open_console
from .recipe import LABELS, Recipe
from .siamese import RULES

HEADER = ["predictor", "seed", "epoch", "metric", "index", "value"]

COLUMNS = {
    "probe": ("linear probe, %", 2),
    "probe_best": ("its best epoch, %", 2),
    "knn": ("k-NN, %", 2),
    "spread": ("spread", 3),
    "effective_rank": ("effective rank", 2),
}
"""Metrics in the table: heading and decimals."""

CURVES = {
    "probe": "Linear probe, held-out top-1 (%)",
    "knn": "k-NN, held-out top-1 (%)",
    "loss": "Training loss",
    "spread": "Spread (0 collapsed, 1 isotropic)",
    "effective_rank": "Effective rank",
    "alignment": "Alignment cos∠($u_j$, $Wu_j$)",
}
"""Metrics drawn over the epochs, with their titles."""

SPECTRA = ("correlation_eigenvalues", "weight_eigenvalues")
MOST_SPECTRA = 8
"""Groups whose spectra are drawn, at most: each takes a row."""
MOST_LEARNED = 4
"""Learned linear predictors whose eigenspaces are drawn, at most: each takes a row."""
MOST_LINES = 64
"""Eigenvalues drawn, at most; of more, as many evenly by rank."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.5, 1.4, 1.5)))
SHADES = ((0.0, 1.0), (0.45, 0.0), (0.5, 1.0))
"""How much of which grey (0 black, 1 white) is mixed into the colour of a predictor."""

RULE_NAMES = {
    "directpred": "Eq. 18",
    "directset": "DirectSet",
    "directcopy": "DirectCopy",
    "boost_scale": "BoostScale",
    "no_stopgrad": "Eq. 18",
}
TILE = 96
"""Pixels of a side of an image among the views."""
PICTURES_BYTES = 3_500_000
"""Room for the pictures on a page, where they grow by a third: views beyond it are left out."""

Values = NDArray[np.float64]


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
    records.write(directory / "report.html", _page(found, labels, picture, eigenspaces))
    written = [str(directory / name) for name in ("report.html", *pictures)]
    open_console().print(
        f"written to {', '.join(written[:-1])} and {written[-1]}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def save_views(raw: Tensor, view1: Tensor, view2: Tensor, path: Path) -> None:
    """Write a picture of the first 8 images, with their two views below them.

    Every image is stretched to its own darkest and lightest value, which undoes normalisation but
    for its tint.

    Args:
        raw: Images, (n, c, h, w) of any dtype, on any device.
        view1: Their first views, (n, c, h, w), normalised or not.
        view2: Their second views.
        path: The PNG to write.
    """
    size = view1.shape[-1]
    edge = TILE // size * size if size <= TILE else TILE
    rows = [_tiles(images[:8].detach().cpu().float(), edge) for images in (raw, view1, view2)]
    grid = (torch.cat(rows) * 255).round().byte()
    picture = io.BytesIO()
    Image.fromarray(grid.numpy()).save(picture, format="PNG", optimize=True)
    files.write(path, picture.getvalue())


def _tiles(images: Tensor, edge: int) -> Tensor:
    """A row of images (n, c, h, w) as (edge + 4, n * (edge + 4), 3), in [0, 1], framed in white."""
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    images = images.nan_to_num(0.0, 0.0, 0.0)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp(min=1e-6)
    small = images.shape[-1] < edge
    images = interpolate(images, (edge, edge), mode="nearest" if small else "area")
    return torch.cat(list(pad(images, (2, 2, 2, 2), value=1.0)), dim=-1).permute(1, 2, 0)


@dataclass(frozen=True)
class Group:
    """The runs of one directory that share their predictor: one for each seed.

    Attributes:
        predictor: Its name.
        recipe: What is known of it.
        seconds: For each seed; empty where not known.
        seeds: By seed, metric and epoch the values: one, or one for each of the d dimensions.
    """

    predictor: str
    recipe: Mapping[str, Any]
    seconds: Sequence[float]
    seeds: Mapping[int, Mapping[str, Mapping[int, Sequence[float]]]]

    @property
    def is_set(self) -> bool:
        """Whether there are spectra of F̂ and of a weight that a rule sets from it."""
        return self.predictor in RULES and all(self.series(metric) for metric in SPECTRA)

    @property
    def last_epoch(self) -> int | None:
        """The last that was measured for all seeds."""
        ends = [
            max(epoch for values in metrics.values() for epoch in values)
            for metrics in self.seeds.values()
        ]
        return min(ends) if ends else None

    def series(self, metric: str) -> tuple[Values, Values] | None:
        """Epochs (e,) and values (seeds, e, d) of a metric; of a plain number, d is 1.

        Only the epochs that all seeds have. None where there are none.
        """
        of_seeds = [metrics[metric] for metrics in self.seeds.values() if metric in metrics]
        if not of_seeds:
            return None
        epochs = sorted(set.intersection(*map(set, of_seeds)))
        if metric in SPECTRA:
            # Before the first step there is no spectrum: F̂ is zero and W_p the identity.
            epochs = [epoch for epoch in epochs if epoch > 0]
        if not epochs:
            return None
        values = [[values[epoch] for epoch in epochs] for values in of_seeds]
        return np.asarray(epochs, dtype=float), np.asarray(values, dtype=float)


@dataclass(frozen=True)
class RunDirectory:
    """What a run left on disk.

    Attributes:
        path: As it was given.
        summary: Of summary.json; empty where there is none yet.
        groups: One for each predictor.
    """

    path: Path
    summary: Mapping[str, Any]
    groups: Sequence[Group]

    @property
    def recipe(self) -> dict[str, Any]:
        """The options; where a comparison has several predictors or seeds, lists of them."""
        recipe = dict(self.summary.get("recipe", {}))
        if recipe and self.summary.get("command") == "compare":
            recipe["predictor"] = self.summary.get("predictors", [])
            recipe["seed"] = self.summary.get("seeds", [])
        return recipe

    @property
    def status(self) -> str:
        """What to know of a run that is not simply done, or nothing."""
        if "status" in self.summary:
            status = str(self.summary["status"])
            return "" if status == "finished" else status
        ends = {group.last_epoch for group in self.groups}
        return "" if ends == {self.recipe.get("epochs")} else "unfinished"


def read(path: Path) -> RunDirectory:
    """Read the directory of a run.

    Raises:
        UserError: It is none, or one of its files is damaged.
    """
    if not path.is_dir():
        raise UserError(f"no such run: {path}")
    summary_file, metrics_file = path / "summary.json", path / "metrics.csv"
    if not (summary_file.is_file() or metrics_file.is_file()):
        raise UserError(f"{path} is not a run: it has neither summary.json nor metrics.csv")
    summary = _read_summary(summary_file) if summary_file.is_file() else {}
    if summary.get("command") == "sweep":
        raise UserError(f"{path} is a sweep: its picture is {path / 'sweep.png'}")
    measured = _read_metrics(metrics_file) if metrics_file.is_file() else {}
    recipe = summary.get("recipe", {})
    groups = []
    for predictor in dict.fromkeys([*_predictors(summary), *measured]):
        if summary.get("command") == "compare":
            result = summary.get("results", {}).get(predictor, {})
            seconds = result.get("seconds", {}).get("values", [])
        else:
            seconds = [summary["seconds"]] if "seconds" in summary else []
        groups.append(Group(predictor, recipe, seconds, measured.get(predictor, {})))
    return RunDirectory(path, summary, groups)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        parts = ("recipe", "versions", "machine", "results", "failures")
        if not all(isinstance(summary.get(part, {}), dict) for part in parts):
            raise ValueError
        if summary.get("recipe") and not _predictors(summary):
            raise ValueError
        for result in summary.get("results", {}).values():
            if not isinstance(result.get("seconds", {}).get("values", []), list):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: not the summary of a run") from None
    return dict(summary)


def _predictors(summary: Mapping[str, Any]) -> list[str]:
    if "recipe" not in summary:
        return []
    return (
        list(summary["predictors"]) if "predictors" in summary else [summary["recipe"]["predictor"]]
    )


def _read_metrics(path: Path) -> dict[str, dict[int, dict[str, dict[int, list[float]]]]]:
    """The values by predictor, seed, metric and epoch."""
    measured: dict[str, dict[int, dict[str, dict[int, list[float]]]]] = {}
    rows: Any = None
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        if next(rows, None) != HEADER:
            raise ValueError
        for predictor, seed, epoch, metric, index, value in rows:
            metrics = measured.setdefault(predictor, {}).setdefault(int(seed), {})
            values = metrics.setdefault(metric, {}).setdefault(int(epoch), [])
            if len(values) != (int(index) if index else 0):
                raise ValueError
            values.append(float(value))
    except (ValueError, csv.Error):
        line = max(1, rows.line_num) if rows is not None else 1
        raise UserError(f"{path} is damaged in line {line}") from None
    for predictor, seeds in measured.items():
        names = {metric for metrics in seeds.values() for metric in metrics}
        for metric in sorted(names):
            found = (metrics.get(metric, {}).values() for metrics in seeds.values())
            if len({len(values) for epochs in found for values in epochs}) > 1:
                raise UserError(f"{path} is damaged: {predictor} lacks values of {metric}")
    return measured


def draw(groups: Sequence[Group], labels: Sequence[str]) -> bytes:
    """The picture: curves over the epochs, then the spectra of every predictor that has any.

    Args:
        groups: At least one of them with something measured.
        labels: What to call each.

    Returns:
        A PNG.
    """
    lines = [
        (group, _short(label), style)
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
                _epochs(axes, end)
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
        _epochs(axes, int(epochs[-1]))
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
        (group, _short(label))
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


def _epochs(axes: Axes, end: int) -> None:
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


def _short(label: str) -> str:
    """For a picture: of a length that fits, and without TeX or a meaning to the legend."""
    label = label if len(label) <= 48 else f"{label[:22]}…{label[-25:]}"
    return " " * label.startswith("_") + label.replace("$", r"\$")


# What the page looks like: readable in a window of any width, light or dark, and on paper.
CSS = """
:root { color-scheme: light dark; --line: #d0d4da; --soft: #5b6470; --band: #f3f5f8; }
@media (prefers-color-scheme: dark) { :root { --line: #444b55; --soft: #a7b0bc; --band: #22262c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1150px }
body { margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption, .note { color: var(--soft); max-width: 60rem; }
figcaption, .note, table { font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; }
td { vertical-align: top; }
td:first-child { min-width: 10rem; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody tr:hover { background: var(--band); }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 6px; }
.plots img { min-width: 44rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)) }
.pictures { gap: .4rem 1.5rem; }
pre { background: var(--band); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; }
"""

# Nothing but the page itself may be loaded.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(
    runs: Sequence[RunDirectory], labels: Sequence[str], picture: bytes, eigenspaces: bytes | None
) -> str:
    datasets = dict.fromkeys(run.recipe.get("dataset") for run in runs)
    known = ", ".join(str(name) for name in datasets if name is not None)
    heading = f"Report of {labels[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs"
    sections = [
        _results(runs, labels),
        _figure(picture, runs),
        _eigenspaces(eigenspaces, runs) if eigenspaces is not None else "",
        _all_views(runs, labels, PICTURES_BYTES - len(picture) - len(eigenspaces or b"")),
        _differences(runs, labels),
        _commands(runs, labels),
        _about(runs, labels),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(heading)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(heading)}</h1>",
            f"<p>{escape(known)}</p>" if known else "",
            *sections,
            "</body>",
            "</html>",
            "",
        ]
    )


def _results(runs: Sequence[RunDirectory], labels: Sequence[str]) -> str:
    """The table of the last measurements."""
    columns = {
        metric: column
        for metric, column in COLUMNS.items()
        if any(group.series(metric) for run in runs for group in run.groups)
    }
    head = ["run", "data set", "predictor", "seeds", "epochs"]
    head += [heading for heading, _ in columns.values()] + ["seconds"]
    rows, failures = [], []
    for run, label in zip(runs, labels, strict=True):
        failures += [
            f"{label}, {what}: {why}" for what, why in run.summary.get("failures", {}).items()
        ]
        for group in run.groups:
            row = [label + (f" ({run.status})" if run.status else "")]
            row += [str(run.recipe.get("dataset", "–")), _title(group.predictor)]
            row += [", ".join(map(str, sorted(group.seeds))) or "–", _progress(group)]
            for metric, (_, digits) in columns.items():
                series = group.series(metric)
                row.append(_mean(series[1][:, -1, 0], digits) if series else "–")
            rows.append([*row, _mean(group.seconds, 1)])
    notes = ["Of the last measured epoch"]
    if any(len(group.seeds) > 1 for run in runs for group in run.groups):
        notes[0] += ", mean ± standard deviation over the seeds"
    if "probe" in columns:
        notes.append("Linear probe and k-NN: top-1 accuracy on the held-out images")
    if "probe_best" in columns:
        notes.append("Best epoch: of the probe's own training, chosen on those images")
    notes.append(
        "Spread: standard deviation of the normalised features × √d, 0 where they have collapsed"
    )
    notes.append("Seconds: of a run, with its evaluations")
    return "\n".join(
        [
            "<h2>Results</h2>",
            _table(head, rows, first_number=4),
            f'<p class="note">{escape(". ".join(notes))}.</p>',
            *(f"<p>Failed: {escape(failure)}</p>" for failure in failures),
        ]
    )


def _progress(group: Group) -> str:
    planned, last = group.recipe.get("epochs"), group.last_epoch
    if last is None:
        return "–"
    return str(last) if planned is None or last >= planned else f"{last} of {planned}"


def _mean(values: Iterable[float], digits: int) -> str:
    numbers = np.asarray(list(values), dtype=float)
    if not len(numbers):
        return "–"
    deviation = f" ± {numbers.std(ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.{digits}f}{deviation}"


def _figure(picture: bytes, runs: Sequence[RunDirectory]) -> str:
    groups = [group for run in runs for group in run.groups]
    shown = [metric for metric in CURVES if any(group.series(metric) for group in groups)]
    heads = sum(group.is_set for group in groups)
    names = ", ".join(name.replace("_", " ") for name in shown).replace("knn", "k-NN")
    text = f"Over the epochs: {names}. Colours tell the predictors, dashes the runs, apart."
    if "alignment" in shown:
        text += " Alignment is 1 where the predictor keeps the eigenvectors of F in place."
    if any(len(group.seeds) > 1 for group in groups):
        text += " Lines are means over the seeds, bands one standard deviation."
    if heads:
        text += (
            " Spectra of the first seed, dark the least eigenvalue, light the greatest: of the"
            " correlation F̂, of the weight W_p, and one against the other with the rule that sets"
            " the weight. A weight that is held or trained between two settings (freq > 1) leaves"
            " that line."
        )
    if heads > MOST_SPECTRA:
        text += f" Of {heads} spectra, the first {MOST_SPECTRA} are shown."
    image = _image(picture, f"Plots. {text}", text)
    return f'<h2>Curves and spectra</h2>\n<div class="plots">{image}</div>'


def _eigenspaces(picture: bytes, runs: Sequence[RunDirectory]) -> str:
    text = (
        "Of the first seed of each learned linear predictor, with the eigenvectors of the"
        " correlation F of the features, on held-out images. Left: blue where the predictor keeps"
        " the eigenvector in place, white where it turns it away, red where it turns it over."
        " Middle: what it multiplies each eigenvector by, beside the parabola on which the theory"
        " ends, and Eq. 18, both drawn through the leading one. Right: by Theorem 1 the squared"
        " norms differ by a constant that weight decay takes away, if it is the same for both; on"
        " the dashed line they are equal."
    )
    learned = sum(group.series("weight_diagonal") is not None for r in runs for group in r.groups)
    if learned > MOST_LEARNED:
        text += f" Of {learned} predictors, the first {MOST_LEARNED} are shown."
    image = _image(picture, f"Plots. {text}", text)
    return f'<h2>Eigenspaces of the learned linear predictor</h2>\n<div class="plots">{image}</div>'


def _image(content: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure class="scroll"><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _all_views(runs: Sequence[RunDirectory], labels: Sequence[str], room: int) -> str:
    """The pictures of views, the same one only once."""
    owners: dict[bytes, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        if (path := run.path / "views.png").is_file():
            owners.setdefault(path.read_bytes(), []).append(label)
    if not owners:
        return ""
    parts = ["<h2>Views</h2>", '<div class="pictures">']
    for content, names in owners.items():
        caption = f"{', '.join(names)}: images, and below each its two augmented views"
        room -= len(content)
        if room >= 0:
            parts.append(_image(content, caption, caption))
        else:
            parts.append(f"<p>{escape(', '.join(names))}: views.png is too large for this page</p>")
    return "\n".join([*parts, "</div>"])


def _differences(runs: Sequence[RunDirectory], labels: Sequence[str]) -> str:
    """The options in which the runs differ."""
    recipes = [(run.recipe, label) for run, label in zip(runs, labels, strict=True) if run.recipe]
    if len(recipes) < 2:
        return ""
    keys = dict.fromkeys(key for recipe, _ in recipes for key in recipe)
    rows = []
    for key in keys:
        values = [_spelled(recipe[key]) if key in recipe else "–" for recipe, _ in recipes]
        if len(set(values)) > 1:
            rows.append([key, *values])
    body = (
        _table(["option", *(label for _, label in recipes)], rows)
        if rows
        else "<p>None: all runs have the same recipe.</p>"
    )
    return f"<h2>Differences of the recipes</h2>\n{body}"


def _commands(runs: Sequence[RunDirectory], labels: Sequence[str]) -> str:
    parts = ["<h2>To make the runs again</h2>"]
    if any(run.recipe.get("dataset", "digits") != "digits" for run in runs):
        parts.append("<p>DIR is where the images are.</p>")
    for run, label in zip(runs, labels, strict=True):
        text = _command(run) if run.recipe else "not known: the run has no summary.json yet"
        parts.append(f'<p class="note">{escape(label)}</p>\n<pre>{escape(text)}</pre>')
    return "\n".join(parts)


def _command(run: RunDirectory) -> str:
    """The command line that makes a run again: what differs from the defaults."""
    defaults = asdict(Recipe())
    recipe, words = run.recipe, ["directpred", str(run.summary.get("command", "train"))]
    if run.summary.get("command") == "compare":
        words += ["--predictors", _spelled(recipe.pop("predictor"))]
        words += ["--seeds", str(len(recipe.pop("seed")))]
    for key, value in recipe.items():
        if key not in defaults or _spelled(value) != _spelled(defaults[key]):
            words += [f"--{key.replace('_', '-')}", _spelled(value)]
    if recipe.get("dataset", "digits") != "digits":
        words += ["--data", "DIR"]
    return shlex.join(words)


def _spelled(value: Any) -> str:
    """An option as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _about(runs: Sequence[RunDirectory], labels: Sequence[str]) -> str:
    """Versions and machines, runs that share them in one column."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        facts = {**run.summary.get("versions", {}), **run.summary.get("machine", {})}
        if facts:
            told = tuple((key, _spelled(value)) for key, value in facts.items())
            columns.setdefault(told, []).append(label)
    if not columns:
        return ""
    keys = dict.fromkeys(key for told in columns for key, _ in told)
    rows = [[key, *(dict(told).get(key, "–") for told in columns)] for key in keys]
    names = ["all runs"] if len(columns) == 1 else [", ".join(names) for names in columns.values()]
    return f"<h2>Versions and machine</h2>\n{_table(['', *names], rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 99) -> str:
    """A table of texts; the columns from ``first_number`` on are numbers."""
    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<thead><tr>{''.join(_cells('th', head, first_number))}</tr></thead>",
            "<tbody>",
            *(f"<tr>{''.join(_cells('td', row, first_number))}</tr>" for row in rows),
            "</tbody></table></div>",
        ]
    )


def _cells(tag: str, texts: Sequence[str], first_number: int) -> Iterator[str]:
    for place, text in enumerate(texts):
        kind = ' class="number"' if place >= first_number else ""
        yield f"<{tag}{kind}>{escape(text)}</{tag}>"


def _labels(runs: Sequence[RunDirectory]) -> list[str]:
    """How tables and pictures call each run: by the name of its directory where that is enough."""
    names = [run.path.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _group_labels(runs: Sequence[RunDirectory], labels: Sequence[str]) -> list[str]:
    if len(runs) == 1:
        return [_title(group.predictor) for group in runs[0].groups]
    return [
        f"{label} ({_title(group.predictor)})"
        for run, label in zip(runs, labels, strict=True)
        for group in run.groups
    ]


def _title(predictor: str) -> str:
    return LABELS.get(predictor, predictor)
