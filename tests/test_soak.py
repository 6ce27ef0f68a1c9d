import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

BENCHES = Path(__file__).parents[1] / "benches"
pytest.importorskip("cpuinfo")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    yield __import__("soak")
    for name in ("soak", "report"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("library", "dim", "rho", "rule", "solver", "freq", "updates"),
    [
        ("numpy", 32, 0.99, "DirectSet", "eigh", 10, 6_000),
        ("numpy", 32, 0.3, "Eq18", "matmul", 1, 2_000),
        ("torch", 32, 0.3, "DirectSet", "eigh", 1, 1_000),
        ("numpy", 256, 0.99, "DirectSet", "eigh", 10, 400),
    ],
)
def test_hostile_features_for_long(bench, library, dim, rho, rule, solver, freq, updates):
    pytest.importorskip(library)
    run = bench.Run(library, dim, dim // 4, rho, rule, solver, freq, updates, 3)
    worst = bench.soak(run)
    assert worst.checks > updates / (5 * freq)
    assert worst.skipped > 0
    for name in ("asymmetry", "negative", "correlation", "weight"):
        assert getattr(worst, name) <= getattr(bench.BOUNDS, name), name


def test_the_report_has_a_line_a_run(bench, monkeypatch, tmp_path):
    runs = [bench.Run("numpy", 4, 2, 0.3, "Eq18", "eigh", freq, 100, 1) for freq in (1, 2)]
    monkeypatch.setattr(bench, "RUNS", runs)
    out = tmp_path / "soak.md"
    options = ["--share", "0.5", "--workers", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["soak.py", *options])
    assert bench.main() == 0
    lines = [line.split("|") for line in out.read_text().splitlines() if "| numpy" in line]
    assert [(line[1].strip(), line[2].strip()) for line in lines] == [
        (f"numpy, dim 4, Eq18, eigh, ρ = 0.3, freq = {freq}", "50") for freq in (1, 2)
    ]


def test_a_wrong_weight_is_seen(bench, monkeypatch):
    rule, exact = bench.RULES["Eq18"]
    monkeypatch.setitem(bench.RULES, "Eq18", (rule, lambda s: 1.1 * exact(s)))
    assert bench.soak(bench.Run("numpy", 4, 2, 0.3, "Eq18", "eigh", 1, 50, 1)).weight > 0.05


def test_a_nan_is_worse_than_any_number(bench):
    worst = bench.Worst(weight=1.0)
    worst.see(weight=float("nan"))
    assert np.isnan(worst.weight)


def test_memory_does_not_grow():
    import directpred as dp

    rng = np.random.default_rng(0)
    predictor = dp.DirectPred(16, nonfinite="skip")
    features = [rng.normal(size=(32, 16)).astype("float32") for _ in range(4)]

    def update(times):
        for step in range(times):
            predictor.update(features[step % 4])
            predictor.accumulate(features[0])
            predictor.step()

    update(50)
    tracemalloc.start()
    try:
        update(50)
        before, _ = tracemalloc.get_traced_memory()
        update(500)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 4096
