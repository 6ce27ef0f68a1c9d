"""How outputs spread in training that collapses and that does not: what `CollapseMonitor` goes by.

python benches/collapse.py            5 minutes on one CPU core; writes benches/results/collapse.md

The reference trainers' recipes for the digits, with `CollapseMonitor` on the projector.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datetime
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import cpuinfo
import lightning as L
import yaml

sys.path.append(str(Path(__file__).parents[1]))  # where `benches` is, for a script

from benches.report import table
from directpred.adapters.lightning import CollapseMonitor
from directpred.monitor import CollapseWarning
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.train import fit

ROOT = Path(__file__).parents[1]
EVERY = 25  # steps, the default
RUNS = [
    ("digits", "directpred", 0.03),
    ("digits", "mlp", 0.03),
    ("digits", "linear", 0.03),
    ("digits", "none", 0.03),
    ("digits", "no_stopgrad", 0.03),
    ("digits", "eq18_printed", 0.03),
    ("digits", "directpred", 0.1),
    ("digits", "linear", 0.1),
    ("digits_mild", "directpred", 0.03),
    ("digits_mild", "eq18_printed", 0.03),
    ("digits_mild", "linear", 0.03),
]
"""Recipe, predictor and learning rate."""


class Readings(L.Callback):
    """Keeps the readings of a monitor that comes before it, and the steps at which it warned."""

    def __init__(self, monitor: CollapseMonitor, caught: list[warnings.WarningMessage]) -> None:
        self.monitor, self.caught = monitor, caught
        self.kept: list[dict[str, float]] = []
        self.warned: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Keep what is new."""
        if not self.kept or self.monitor.latest is not self.kept[-1]:
            self.kept.append(self.monitor.latest)
        if sum(w.category is CollapseWarning for w in self.caught) > len(self.warned):
            self.warned.append(trainer.global_step)


def row(config: str, predictor: str, lr: float, folder: Path) -> list[str]:
    """Train, and describe the readings."""
    options = yaml.safe_load((ROOT / f"reference_trainers/configs/{config}.yaml").read_text())
    options |= {"predictor": predictor, "lr": lr, "evaluate_every": 1000}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CollapseWarning)
        encoder, projector = (
            CollapseMonitor(f"online.{name}", every=EVERY) for name in ("encoder", "projector")
        )
        readings = Readings(projector, caught)
        run = fit(
            Recipe.parse(options), folder / "run.ckpt", callbacks=[encoder, projector, readings]
        )
    first, *later = readings.kept
    low = min(range(len(later)), key=lambda index: later[index]["spread"])
    end = run.history[-1]
    return [
        f"{config}, {predictor}, lr {lr}",
        cell(first),
        cell(later[low]),
        str(EVERY * (low + 1)),
        cell(later[-1]),
        cell(encoder.latest),
        f"{end['probe']:.1f}",
        ", ".join(map(str, readings.warned)) or "–",
    ]


def cell(figures: dict[str, float]) -> str:
    """Spread and effective rank of a reading."""
    return f"{figures['spread']:.2f}, {figures['effective_rank']:.2f}"


def main() -> None:
    """Train all of them and write the table."""
    header = ["recipe", "first", "lowest", "at step", "last", "encoder", "probe, %", "warned at"]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(*run, Path(folder)) for run in RUNS]
    machine = cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    text = (
        f"# Collapse\n\n{machine}, one thread, {versions}. {datetime.date.today()}, `python "
        "benches/collapse.py`, seed 0.\n\nSpread and effective rank of the projector's 64 outputs, "
        f"in training batches of the digits, every {EVERY} steps: at the first, at the lowest "
        "spread after it and at the last; those of the encoder in front of it at the last; linear "
        "probe at the end; steps at which `CollapseMonitor` warned.\n\n"
    )
    text += table(header, rows) + "\n"
    (ROOT / "benches/results/collapse.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
