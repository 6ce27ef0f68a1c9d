"""The page that compares runs, which stands alone."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from html import escape

import numpy as np

from ..recipe import LABELS, Recipe, spelled
from .curves import CURVES, MOST_SPECTRA
from .directory import Group, RunDirectory
from .eigenspaces import MOST_LEARNED

COLUMNS = {
    "probe": ("linear probe, %", 2),
    "probe_best": ("its best epoch, %", 2),
    "knn": ("k-NN, %", 2),
    "spread": ("spread", 3),
    "effective_rank": ("effective rank", 2),
}
"""Metrics in the table: heading and decimals."""

PICTURES_BYTES = 3_500_000
"""Room for the pictures on a page, where they grow by a third: views beyond it are left out."""

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


def page(
    runs: Sequence[RunDirectory], labels: Sequence[str], picture: bytes, eigenspaces: bytes | None
) -> str:
    """The page, as HTML.

    Args:
        runs: What is on it.
        labels: What to call each.
        picture: The PNG of the curves and spectra.
        eigenspaces: That of the learned linear predictors, if there are any.
    """
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
            row += [str(run.recipe.get("dataset", "–")), title(group.predictor)]
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
        values = [spelled(recipe[key]) if key in recipe else "–" for recipe, _ in recipes]
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
        words += ["--predictors", spelled(recipe.pop("predictor"))]
        words += ["--seeds", str(len(recipe.pop("seed")))]
    for key, value in recipe.items():
        if key not in defaults or spelled(value) != spelled(defaults[key]):
            words += [f"--{key.replace('_', '-')}", spelled(value)]
    if recipe.get("dataset", "digits") != "digits":
        words += ["--data", "DIR"]
    return shlex.join(words)


def _about(runs: Sequence[RunDirectory], labels: Sequence[str]) -> str:
    """Versions and machines, runs that share them in one column."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        facts = {**run.summary.get("versions", {}), **run.summary.get("machine", {})}
        if facts:
            told = tuple((key, spelled(value)) for key, value in facts.items())
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


def title(predictor: str) -> str:
    """How tables and pictures call a predictor."""
    return LABELS.get(predictor, predictor)
