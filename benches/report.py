"""From the entries of a run to Markdown tables that a person reads.

`python benches/report.py benches/results/<device>.json` prints them once more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Entry = dict[str, Any]
NOT_MEASURED = "not measured"
BARE = (
    "*Bare operations* (`benches/bare.py`) of an update are the matrix product zᵀz, the "
    "eigendecomposition, and the product that rebuilds the weight; those of a whole step are "
    "these, the products of the prediction and of its gradient, and the cosine loss forward and "
    "backward: no checks, no average, no state."
)
NO_GRAPHS = "**DIRECTPRED_GRAPHS=0: no closing was recorded.**"
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

    def ratio(self, **keys: Any) -> float | None:
        """The ratio of the entry with these values, or None."""
        return (self.find(**keys) or {}).get("ratio")

    def values(self, group: str, key: str) -> list[Any]:
        """The values that a key takes within a group, in order of appearance."""
        return list(dict.fromkeys(e.get(key) for e in self.entries if e["group"] == group))


class Target(NamedTuple):
    """What is to be reached, and what was; the worst of the figures where there are several."""

    what: str
    sign: str
    goal: float
    unit: str
    found: dict[str, float | None]
    """Figures by what tells them apart, None where there is none."""


def gpu_targets(run: Results) -> list[Target]:
    """The goals for an H100."""

    def closing(dim: int, freq: int, unit: float) -> float | None:
        found = run.find(group="closing", name="DirectPred", dim=dim, freq=freq)
        return found and found["device_s"] / unit

    def peer(views: int) -> float | None:
        return run.ratio(group="step", name="2-layer", dim=256, rows=512, views=views)

    cupy = run.find(group="update", name="CuPy", solver="matmul", dim=256)
    whole = run.find(group="training", name="DirectPred")
    # The standard error of a median, from the quartiles of what it is the median of.
    error = whole and 93 * whole["ratio_iqr"] / whole["rounds"] ** 0.5
    added = {f"± {digits(error)}" if error else "": whole and 100 * (whole["ratio"] - 1)}
    return [
        Target("head, dim 256: the closing", "≤", 200, " µs", {"": closing(256, 1, 1e-6)}),
        Target(
            "`dp.DirectPred` on CuPy, dim 256: an update",
            *("≤", 400, " µs", {"": cupy and cupy["median_s"] * 1e6}),
        ),
        Target(
            "2-layer ÷ DirectPred, whole step, 256 × 512",
            *("≥", 1.3, "×", {"one view": peer(1), "both views": peer(2)}),
        ),
        Target("head, dim 2048: the closing", "≤", 4, " ms", {"": closing(2048, 1, 1e-3)}),
        Target("head, dim 2048, freq 5: a closing", "≤", 1, " ms", {"": closing(2048, 5, 1e-3)}),
        Target("added to the eager ResNet-18 step", "≤", 1, " %", added),
    ]


def cpu_targets(run: Results) -> list[Target]:
    """The goals for any CPU."""

    def each(least: int, **keys: Any) -> dict[str, float | None]:
        dims = [dim for dim in run.values(keys["group"], "dim") if dim >= least]
        return {f"dim {dim}": run.ratio(dim=dim, **keys) for dim in dims} or {"": None}

    def step(group: str, name: str) -> dict[str, float | None]:
        return {"": run.ratio(group=group, name=name, dim=256, rows=512)}

    update = each(256, group="update", name="torch, CPU", solver="eigh")
    return [
        Target("update ÷ bare operations, dim ≥ 256", "≤", 1.1, "×", update),
        Target(
            "whole step ÷ bare operations, 256 × 512", "≤", 1.1, "×", step("bare", "DirectPred")
        ),
        Target("published ÷ DirectPred, 256 × 512", "≥", 16, "×", step("step", "published")),
        Target("2-layer ÷ DirectPred, 256 × 512", "≥", 8, "×", step("step", "2-layer")),
        Target("DirectCopy ÷ squarings, dim ≥ 512", "≤", 0.15, "×", each(512, group="norm")),
    ]


def targets(run: Results) -> str:
    """What was to be reached, and what was."""
    on_gpu = run.all["gpu"] is not None

    def line(where: str, here: bool, target: Target) -> list[str]:
        what, sign, goal, unit, found = target
        known = {which: x for which, x in found.items() if x is not None and here}
        cells = [f"{where}: {what}", f"{sign} {goal:g}{unit}"]
        if not known:
            return [*cells, NOT_MEASURED, ""]
        which = (max if sign == "≤" else min)(known, key=lambda which: known[which])
        worst = known[which]
        met = worst <= goal if sign == "≤" else worst >= goal
        measured = f"**{digits(worst)}{unit}** {which}".strip()
        return [*cells, measured, "yes" if met else "no"]

    rows = [("GPU", on_gpu, x) for x in gpu_targets(run)]
    rows += [("CPU", not on_gpu, x) for x in cpu_targets(run)]
    return table(["figure", "goal", "measured", "met"], (line(*row) for row in rows))


def steps(run: Results) -> str:
    """Group 1: a step of the predictor."""
    columns = {
        "identity": "no predictor",
        "learned linear": "learned linear",
        "DirectCopy": "DirectCopy",
        "DirectPred, eigh": "DirectPred eigh",
        "DirectPred, matmul": "DirectPred matmul",
        "2-layer": "2-layer",
        "DirectPred": "DirectPred",
        "DirectPred, no graph": "DirectPred no graph",
        "published": "published",
    }
    measured = {*run.values("step", "name"), "2-layer", "published"}
    columns = {name: title for name, title in columns.items() if name in measured}
    rows = []
    for dim in run.values("step", "dim"):
        for n in run.values("step", "rows"):
            for views in run.values("step", "views"):
                size = {"dim": dim, "rows": n, "views": views}
                found = {x: run.find(group="step", name=x, **size) for x in columns}
                if any(found.values()):
                    ratios = [times(found["2-layer"]), times(found["published"])]
                    what = f"{dim} × {n}" + (f", {views} views" if views == 2 else "")
                    rows.append([what, *map(ms, found.values()), *ratios])
    head = ["dim × rows", *columns.values(), "2-layer ÷ DirectPred", "published ÷ DirectPred"]
    return table(head, rows)


def closings(run: Results) -> str:
    """A closing on a GPU, with a recording and without."""
    rows = []
    for dim in run.values("closing", "dim"):
        for freq in run.values("closing", "freq"):
            size = {"group": "closing", "dim": dim, "freq": freq}
            both = [run.find(name=name, **size) for name in ("DirectPred", "DirectPred, no graph")]
            if any(both):
                cells = [
                    digits(1e6 * found[key]) if found else "–"
                    for found in both
                    for key in ("device_s", "host_s", "forward_s")
                ]
                rows.append([f"{dim}, freq {freq}", *cells])
    kinds = [f"{k}{how}" for how in ("", ", no graph") for k in ("device", "host", "host, forward")]
    return table(["dim", *kinds], rows)


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
        "closing",
        "A closing on a GPU",
        "Microseconds of a head's `step()`, a mean over closings that follow each other without "
        "waiting: *device*, between events around it on a device that the host is ahead of; "
        "*host*, until `step()` returns, and until the forward pass before it ({rows} rows) does. "
        "*No graph* launches its kernels one by one.",
        closings,
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
        *([] if results.get("graphs", True) else [NO_GRAPHS]),
        "## Targets",
        targets(run),
        "The goals for a GPU are for an H100. Of several figures the worst counts; a closing is "
        "judged by the time of the device. " + BARE,
    ]
    for group, title, sentence, make in SECTIONS:
        if rows := run.values(group, "rows"):
            lines += [f"## {title}", sentence.format(rows=rows[0]), make(run)]
        elif not results.get("only_targets"):
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
