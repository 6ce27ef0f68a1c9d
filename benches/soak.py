"""A predictor over a million updates of hostile features, beside a float64 oracle.

python benches/soak.py                5 minutes on one CPU core; writes benches/results/soak.md
python benches/soak.py --workers 6    2 minutes on six

Episodes of random length jump between scales of 1e-9, 1 and 1e9, between full rank and rank one to
three, rows that are all the same, and zeros; one batch in a hundred holds a NaN and is skipped.
"""

from __future__ import annotations

import os

for library in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import argparse  # noqa: E402
import datetime  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field, fields, replace  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import cpuinfo  # noqa: E402
import numpy as np  # noqa: E402

sys.path.append(str(Path(__file__).parents[1]))  # where `benches` is, for a script

import directpred as dp  # noqa: E402
from benches.report import table  # noqa: E402

Matrix = np.ndarray[Any, Any]

RULES: dict[str, tuple[dp.Rule, Callable[[Matrix], Matrix]]] = {
    "Eq18": (dp.Eq18(eps=0.1), lambda s: (s / s.max()) ** 0.5 + 0.1),
    "DirectSet": (dp.DirectSet(eps=0.1), lambda s: s**0.5 + 0.1 * s.max() ** 0.5),
}


@dataclass(frozen=True)
class Run:
    """One predictor in float32, and how long it is updated."""

    library: str
    dim: int
    rows: int
    rho: float
    rule: str
    solver: str
    freq: int
    updates: int
    every: int
    """Settings of the weight from one comparison with the oracle to the next."""


@dataclass
class Worst:
    """The worst that was seen in the checks of a run; all but the last three are relative."""

    asymmetry: float = 0.0
    negative: float = 0.0
    correlation: float = 0.0
    weight: float = 0.0
    checks: int = 0
    skipped: int = 0
    memory: float = 0.0
    seconds: float = field(default=0.0, compare=False)

    def see(self, **found: float) -> None:
        """Take what was found where it is worse."""
        for name, value in found.items():
            # Not max(), to which a NaN is not worse.
            if not value <= getattr(self, name):
                setattr(self, name, value)


BOUNDS = Worst(asymmetry=1e-6, negative=1e-6, correlation=1e-4, weight=5e-3, memory=16.0)
"""What each may be; memory in MB."""

RUNS = [
    Run("numpy", 32, 16, 0.99, "DirectSet", "eigh", 10, 1_000_000, 7),
    Run("numpy", 32, 16, 0.3, "Eq18", "eigh", 1, 200_000, 23),
    Run("numpy", 32, 16, 0.99, "DirectSet", "matmul", 10, 50_000, 7),
    Run("torch", 32, 16, 0.3, "DirectSet", "eigh", 1, 50_000, 23),
    Run("numpy", 256, 64, 0.99, "DirectSet", "eigh", 10, 50_000, 50),
    Run("torch", 256, 64, 0.3, "Eq18", "matmul", 10, 5_000, 3),
]


def batches(run: Run, seed: int = 0) -> Iterator[Matrix]:
    """The features of all updates, (rows, dim) float32; those to be skipped hold a NaN."""
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(97, run.rows, run.dim)).astype(np.float32)
    left = 0
    for update in range(run.updates):
        if left == 0:
            left = int(rng.geometric(1 / 40))
            kind = rng.choice(["full", "full", "low rank", "same rows", "zeros"])
            scale = np.float32(rng.choice([1e-9, 1.0, 1e9]))
            mix = scale * rng.normal(size=(int(rng.integers(1, 4)), run.dim)).astype(np.float32)
            decay = scale * (np.arange(run.dim) + 1.0).astype(np.float32) ** -rng.choice([0, 1])
        left -= 1
        z = pool[update % len(pool)]
        if kind == "full":
            z = z * decay
        elif kind == "low rank":
            z = z[:, : len(mix)] @ mix
        elif kind == "same rows":
            z = np.broadcast_to(z[0] * scale, z.shape)
        else:
            z = np.zeros_like(z)
        if rng.random() < 0.01:
            z = z.copy()
            z[rng.integers(run.rows), rng.integers(run.dim)] = np.nan
        yield z.astype(np.float32, copy=False)


def soak(run: Run) -> Worst:
    """Update a predictor, and compare it with float64 now and then."""
    rule, exact_rule = RULES[run.rule]
    predictor = dp.DirectPred(
        run.dim, rule=rule, rho=run.rho, freq=run.freq, solver=run.solver, nonfinite="skip"
    )
    wrap: Callable[[Matrix], Any] = np.asarray
    if run.library == "torch":
        import torch

        torch.set_num_threads(1)

        def wrap(z: Matrix) -> Any:
            return torch.from_numpy(z.copy())

    correlation, worst, steps = np.zeros((run.dim, run.dim)), Worst(), 0
    memory, start = 0.0, time.perf_counter()
    for update, z in enumerate(batches(run)):
        with np.errstate(invalid="ignore"):  # the NaN
            predictor.update(wrap(z))
        if np.isfinite(z).all():
            rho = run.rho if steps else 0.0
            wide = z.astype(np.float64)
            correlation = rho * correlation + (1 - rho) / len(z) * (wide.T @ wide)
            steps += 1
        if update % (run.freq * run.every) == 0 and steps:
            worst.see(**compare(predictor, correlation, exact_rule))
            worst.checks += 1
        if update == run.updates // 10:
            memory = peak_memory()
    worst.memory = peak_memory() - memory
    worst.seconds = time.perf_counter() - start
    worst.skipped = predictor.skipped
    assert (predictor.step_count, predictor.skipped) == (steps, run.updates - steps)
    return worst


def compare(
    predictor: dp.DirectPred, exact: Matrix, exact_rule: Callable[[Matrix], Matrix]
) -> dict[str, float]:
    """The errors of a predictor whose F̂ should be `exact`."""
    got, weight = (np.asarray(x, np.float64) for x in (predictor.correlation, predictor.weight))
    s, u = np.linalg.eigh(exact)
    found = {
        "asymmetry": max(np.abs(x - x.T).max() / (np.abs(x).max() or 1) for x in (got, weight))
    }
    if s[-1] < 1e-36:  # denormal in float32, after many zeros: finite is all there is to ask
        return found if np.isfinite(weight).all() else {"weight": np.inf}
    spectrum = np.linalg.eigvalsh(got)
    exact_weight = (u * exact_rule(np.maximum(s, 0))) @ u.T
    return found | {
        "negative": max(0.0, float(-spectrum[0] / spectrum[-1])),
        "correlation": float(np.linalg.norm(got - exact, 2) / s[-1]),
        "weight": float(np.linalg.norm(weight - exact_weight, 2) / np.linalg.norm(exact_weight, 2)),
    }


def peak_memory() -> float:
    """The most memory that the process has taken so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def markdown(results: list[tuple[Run, Worst]]) -> str:
    """The report, a line a run."""
    columns = [f.name for f in fields(Worst) if f.name not in ("seconds", "checks", "skipped")]
    head = ["", "updates", "skipped", "checks", *columns, "s"]
    rows = [
        [
            f"{run.library}, dim {run.dim}, {run.rule}, {run.solver}, ρ = {run.rho}, "
            f"freq = {run.freq}",
            *(f"{x:,}" for x in (run.updates, worst.skipped, worst.checks)),
            *(f"{getattr(worst, name):.1e}" for name in columns[:-1]),
            f"{worst.memory:.1f} MB",
            f"{worst.seconds:.0f}",
        ]
        for run, worst in results
    ]
    bounds = [f"≤ {getattr(BOUNDS, name):g}" for name in columns]
    rows.append(["bound", "", "", "", *bounds[:-1], f"{bounds[-1]} MB", ""])
    packages = ", ".join(f"{p} {version(p)}" for p in ("numpy", "torch"))
    packages = f"python {platform.python_version()}, directpred {dp.__version__}, {packages}"
    return (
        "\n\n".join(
            [
                "# Soak",
                f"{cpuinfo.get_cpu_info().get('brand_raw', 'CPU')}, one thread. "
                f"{packages}. {datetime.date.today()}, `python benches/soak.py`.",
                "A predictor in float32 is fed episodes of features whose scale jumps between "
                "1e-9, 1 and 1e9 and whose rank collapses, of rows that are all the same, of "
                "zeros, and NaN in one batch of a hundred. The worst of all checks against a "
                "float64 oracle that is kept beside it:",
                table(head, rows),
                "*asymmetry* of F̂ and of the weight, relative to their largest entry; *negative*: "
                "−λ_min / λ_max of F̂; *correlation* and *weight*: spectral norm of the difference "
                "from the oracle's, relative to its own; *memory*: what the peak of the process "
                "grew by after the first tenth of the updates.",
            ]
        )
        + "\n"
    )


def main() -> int:
    """Run all, print and write the table; 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--share", type=float, default=1.0, help="of the updates, to try it out")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a core each")
    out = Path(__file__).parent / "results" / "soak.md"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    runs = [replace(run, updates=int(run.updates * options.share)) for run in RUNS]
    results = []
    # Each in a fresh process, of which the peak of the memory is its own.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        for run, worst in zip(runs, pool.imap(soak, runs), strict=True):
            results.append((run, worst))
            print(run, worst, flush=True)
    text = markdown(results)
    options.out.write_text(text)
    print(text)
    good = all(
        getattr(worst, f.name) <= getattr(BOUNDS, f.name)
        for _, worst in results
        for f in fields(Worst)
        if getattr(BOUNDS, f.name)
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
