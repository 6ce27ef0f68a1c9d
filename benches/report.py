"""From the entries of a run to Markdown tables that a person reads.

`python benches/report.py benches/results/<device>.json` prints them once more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
NOT_MEASURED = "not measured"
BUSY = "**The machine was busy with other work (load {} at the start): not figures to quote.**"


def digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 1 else f"{x:.3f}"


def ms(entry: Entry | None) -> str:
    """The median of an entry in milliseconds, or why there is none."""
    if entry is None:
        return "–"
    if "left_out" in entry:
        return f"*{entry['left_out']}*"
    return digits(entry["median_s"] * 1e3)


def times(entry: Entry | None, bold: bool = True) -> str:
    """The ratio of an entry, as in 22.6×."""
    if entry is None or "ratio" not in entry:
        return "–"
    return f"**{digits(entry['ratio'])}×**" if bold else f"{digits(entry['ratio'])}×"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, aligned also as text; the first columns to the left, numbers right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (w - 1) if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([text(lines[0]), text(rule), *map(text, lines[1:])])


class Results:
    """The results of a run, to look entries up in."""

    def __init__(self, results: Entry) -> None:
        self.all = results
        self.entries: list[Entry] = results["entries"]

    def find(self, **keys: Any) -> Entry | None:
        """The entry with these values, or None."""
        found = (e for e in self.entries if all(e.get(k) == v for k, v in keys.items()))
        return next(found, None)

    def values(self, group: str, key: str) -> list[Any]:
        """The values that a key takes within a group, in order of appearance."""
        return list(dict.fromkeys(e[key] for e in self.entries if e["group"] == group))


def targets(run: Results) -> str:
    """What was to be reached (on a GPU, an H200), and what was."""

    def ratio(name: str, rows: int) -> float | None:
        entry = run.find(group="step", name=name, dim=256, rows=rows)
        return entry and entry.get("ratio")

    def update(solver: str, dim: int, key: str) -> float | None:
        entry = run.find(group="update", name="torch, GPU", solver=solver, dim=dim)
        return entry and entry[key]

    gpu = run.all["gpu"] is not None
    here: list[tuple[str, float | None, str, float, str]] = []
    cpu_rows = [
        ("published ÷ DirectPred, dim 256, 512 rows", ratio("published", 512), "≥", 22, "×"),
        ("published ÷ DirectPred, dim 256, 2048 rows", ratio("published", 2048), "≥", 65, "×"),
        ("2-layer 256-4096-256 ÷ DirectPred, 512 rows", ratio("2-layer", 512), "≥", 14, "×"),
    ]
    eigh, matmul = update("eigh", 256, "ratio"), update("matmul", 256, "ratio")
    fast, wide = update("matmul", 256, "median_s"), update("matmul", 2048, "median_s")
    whole = run.find(group="training", name="DirectPred")
    gpu_rows = [
        ("update, dim 256", fast and fast * 1e6, "≤", 200, " µs"),
        ("update by eigh ÷ by matmul, dim 256", eigh and matmul and eigh / matmul, "≥", 20, "×"),
        ("2-layer ÷ DirectPred, whole, dim 256, 512 rows", ratio("2-layer", 512), "≥", 1, "×"),
        ("update, dim 2048", wide and wide * 1e3, "≤", 8, " ms"),
        ("added to a ResNet-18 step", whole and 100 * (whole["ratio"] - 1), "≤", 1, " %"),
    ]
    for where, on_gpu, rows in [("2 CPU cores", False, cpu_rows), ("GPU", True, gpu_rows)]:
        for what, value, sign, bound, unit in rows:
            here.append((f"{where}: {what}", value if gpu == on_gpu else None, sign, bound, unit))

    def line(what: str, value: float | None, sign: str, bound: float, unit: str) -> list[str]:
        wanted = f"{sign} {bound:g}{unit}"
        if value is None:
            return [what, wanted, NOT_MEASURED, ""]
        reached = value >= bound if sign == "≥" else value <= bound
        return [what, wanted, f"**{digits(value)}{unit}**", "reached" if reached else "missed"]

    return table(["", "wanted", "measured", ""], (line(*row) for row in here))


def steps(run: Results) -> str:
    """Group 1: a step of the predictor."""
    columns = {
        "identity": "no predictor",
        "learned linear": "learned linear",
        "DirectCopy": "DirectCopy",
        "DirectPred, eigh": "DirectPred eigh",
        "DirectPred, matmul": "DirectPred matmul",
        "2-layer": "2-layer",
        "published": "published",
    }
    rows = []
    for dim in run.values("step", "dim"):
        for n in run.values("step", "rows"):
            found = {x: run.find(group="step", name=x, dim=dim, rows=n) for x in columns}
            if any(found.values()):
                ratios = [times(found["2-layer"]), times(found["published"])]
                rows.append([f"{dim} × {n}", *map(ms, found.values()), *ratios])
    head = ["dim × rows", *columns.values(), "2-layer ÷ DirectPred", "published ÷ DirectPred"]
    return table(head, rows)


def parts(run: Results) -> str:
    """Where the time of a step goes."""
    found = [e for e in run.entries if e["group"] == "part"]
    shares = [e["ratio"] for e in found]
    return table(
        ["", *(e["name"] for e in found), "rest"],
        [
            ["ms", *map(ms, found), "–"],
            ["share", *(f"**{100 * x:.0f} %**" for x in [*shares, 1 - sum(shares)])],
        ],
    )


def updates(run: Results) -> str:
    """Group 2: an update alone, in every array library."""
    backends = run.values("update", "name")
    on_gpu = run.all["gpu"] is not None
    rows = []
    for dim in run.values("update", "dim"):
        found = {
            s: [run.find(group="update", name=b, solver=s, dim=dim) for b in backends]
            for s in ("eigh", "matmul")
        }
        fastest = [
            min((e["median_s"] for e in both if e), default=None)
            for both in zip(*found.values(), strict=True)
        ]
        for solver, entries in found.items():
            cells = [
                "–"
                if e is None
                else f"{f'**{ms(e)}**' if e['median_s'] == f else ms(e)} ({times(e, bold=False)})"
                for e, f in zip(entries, fastest, strict=True)
            ]
            rows.append([f"{dim}, {solver}", *cells, *([] if on_gpu else [NOT_MEASURED])])
    head = ["dim, solver", *backends, *([] if on_gpu else ["GPU: torch, CuPy, JAX"])]
    return table(head, rows)


def training(run: Results) -> str:
    """Group 3: a whole training step."""
    rows = [
        [
            e["name"],
            digits(e["alone_s"] * 1e3),
            ms(e),
            f"**{100 * e['alone_s'] / e['median_s']:.2f} %**",
            f"{100 * (e['ratio'] - 1):+.1f} ± {50 * e['ratio_iqr']:.1f} %",
        ]
        for e in run.entries
        if e["group"] == "training"
    ]
    head = ["predictor", "predictor, ms", "step, ms", "share of the step", "over no predictor"]
    return table(head, rows)


def memory(run: Results) -> str:
    """Group 4: peak memory."""
    names = run.values("memory", "name")
    rows = []
    for n in run.values("memory", "rows"):
        found = {x: run.find(group="memory", name=x, rows=n) or {} for x in names}
        cells = [digits(e["bytes"] / 1e6) if "bytes" in e else "–" for e in found.values()]
        peer, ours = (found.get(x, {}).get("bytes") for x in ("published", "DirectPred, eigh"))
        rows.append([str(n), *cells, f"**{digits(peer / ours)}×**" if peer and ours else "–"])
    return table(["rows", *(x.replace(",", "") for x in names), "published ÷ eigh"], rows)


SECTIONS: list[tuple[str, str, str, Callable[[Results], str]]] = [
    (
        "step",
        "A step of the predictor",
        "Milliseconds of forward, cosine loss, backward and update together. The ratios in bold "
        'are to DirectPred with `solver="auto"`, and say how many times cheaper DirectPred is; an '
        "italic entry says why the published algorithm was not run: what it would store, or take.",
        steps,
    ),
    (
        "part",
        "Where the time goes",
        "The parts of DirectPred's step at dim 256 and 512 rows, each run by itself, as shares of "
        "the whole; the rest is what Python, checks, copies and a colder cache cost.",
        parts,
    ),
    (
        "update",
        "An update alone, in every array library",
        "Milliseconds of `update` on 512 rows, and in brackets its ratio to the bare operations "
        "of the eigh route (matrix product, eigh, rebuild) in the same library; **bold** is the "
        "faster solver.",
        updates,
    ),
    (
        "training",
        "A whole training step",
        "BYOL with ResNet-18 on 32 × 32 images by the published recipe (predictor 128 wide), "
        "{rows} images; the predictor by itself, as a share of that step, and the step's own ratio "
        "to one without predictor (median ± half the interquartile range).",
        training,
    ),
    (
        "memory",
        "Peak memory of an update",
        "Megabytes beyond features and state at dim 256: DirectPred's do not grow with the rows.",
        memory,
    ),
]


def markdown(results: Entry) -> str:
    """The whole report."""
    run = Results(results)
    where = f"{results['cpu']}, {results['cores']} cores, {results['threads']} threads"
    installed = [f"{k} {v}" for k, v in results["versions"].items() if v != "not installed"]
    lines = [
        f"# Benches: {results['device']}",
        f"{where}{', ' + results['gpu'] if results['gpu'] else '; no GPU'}. {', '.join(installed)}."
        f" {results['date']}, `{results['command']}`, {results['seconds']} s.",
        "Times are medians; ratios are medians of ratios of runs that took turns, so that a "
        "machine that slows down slows both.",
        *([BUSY.format(results["busy"])] if results["busy"] > 0.5 else []),
        "## Targets",
        targets(run),
    ]
    for group, title, sentence, make in SECTIONS:
        rows = run.values(group, "rows")
        if rows:
            lines += [f"## {title}", sentence.format(rows=rows[0]), make(run)]
        else:
            lines += [f"## {title}", NOT_MEASURED.capitalize() + "."]
    if results["left_out"]:
        lines += ["## Left out", "\n".join(left_out(results["left_out"]))]
    return "\n\n".join(lines) + "\n"


def left_out(reasons: dict[str, list[str]]) -> list[str]:
    """One line a reason: what it kept out."""
    found = []
    for why, tests in reasons.items():
        functions = dict.fromkeys(f"`{x.partition('[')[0]}`" for x in tests)
        found.append(f"- {why}: {len(tests)} of {', '.join(functions)}")
    return found


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
