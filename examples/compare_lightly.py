"""A user's script, `lightly_byol.py`, as it is and with the two lines of adapters/README.md.

python examples/compare_lightly.py [SEEDS [EPOCHS]]
"""

import contextlib
import io
import re
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent
README = HERE.parent / "adapters" / "README.md"


def hunks(script: str) -> list[str]:
    """The parts of the diff in adapters/README.md that is headed by the name of the script."""
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(rf"^`{re.escape(script)}`:\n+```diff\n(.*?)^```", text, re.M | re.S)
    return [
        hunk.strip("\n") for hunk in re.split(r"^@@.*\n", block, flags=re.M) if hunk.strip("\n")
    ]


def apply(diff: list[str], text: str) -> str:
    """Apply the parts of a diff, each to the one place where its old lines stand."""
    for hunk in diff:
        lines = hunk.split("\n")
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[:1] in kept)
            for kept in ((" ", "-", ""), (" ", "+", ""))
        )
        if text.count(old) != 1:
            raise ValueError(f"these lines stand at {text.count(old)} places, not one:\n{old}")
        text = text.replace(old, new)
    return text


def run(script: str, *arguments: str) -> dict[str, object]:
    """Run a script as the main program; its global variables."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    before = sys.argv
    sys.argv = ["script", *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(script, "script", "exec"), namespace)
    finally:
        sys.argv = before
    return namespace


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    epochs = sys.argv[2] if len(sys.argv) > 2 else "30"
    name = "examples/lightly_byol.py"
    original = (HERE.parent / name).read_text(encoding="utf-8")
    scripts = {
        "lightly's BYOLPredictionHead": original,
        "DirectPred": apply(hunks(name), original),
    }
    console = Console(width=max(80, Console().width))
    table = Table("predictor", "linear probe, %", "spread", box=None)
    for title, script in scripts.items():
        runs = [run(script, str(seed), epochs) for seed in track(range(seeds), title)]
        table.add_row(title, *(summary([r[v] for r in runs]) for v in ("accuracy", "spread")))
    console.print(table)


def summary(values: list) -> str:
    digits = 1 if min(values) > 2 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
