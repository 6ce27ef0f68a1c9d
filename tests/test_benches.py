import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHES))
    yield __import__("report")
    sys.modules.pop("report", None)


def results(*entries: dict[str, Any], gpu: str | None = None) -> dict[str, Any]:
    return {
        "device": gpu or "2 CPU threads",
        "cpu": "a processor",
        "cores": 2,
        "busy": 0.0,
        "threads": 2,
        "gpu": gpu,
        "versions": {"python": "3.11", "jax": "not installed"},
        "date": "2026-01-01",
        "command": "python benches/run.py",
        "seconds": 1,
        "entries": list(entries),
        "left_out": {"no CUDA device": ["test_update[a]", "test_update[b]"]},
    }


def timed(name: str, ratio: float, **entry: Any) -> dict[str, Any]:
    return {
        "group": "step", "name": name, "dim": 256, "rows": 512, "median_s": 0.0123, "ratio": ratio
    } | entry  # fmt: skip


def test_a_target_is_judged_by_the_ratio_of_its_entry(report: Any) -> None:
    text = report.markdown(results(timed("published", 23.0), timed("2-layer", 13.9)))
    lines = [line for line in text.splitlines() if line.startswith("| 2 CPU cores")]
    published, published_2048, two_layer = lines
    assert "**23.0×** | reached" in published
    assert "not measured" in published_2048
    assert "missed" in two_layer


def test_gpu_targets_are_not_measured_without_one(report: Any) -> None:
    text = report.markdown(results(timed("2-layer", 20.0)))
    lines = [line for line in text.splitlines() if line.startswith("| GPU")]
    assert len(lines) == 5
    assert all("not measured" in line for line in lines)


def test_cpu_figures_are_no_gpu_figures(report: Any) -> None:
    text = report.markdown(results(timed("published", 23.0), gpu="a GPU"))
    lines = [line for line in text.splitlines() if line.startswith("| 2 CPU cores")]
    assert len(lines) == 3
    assert all("not measured" in line for line in lines)


def test_what_was_left_out_shows_in_its_cell_or_as_a_line(report: Any) -> None:
    skipped = {"group": "step", "name": "published", "dim": 256, "rows": 512, "left_out": "9 GB"}
    text = report.markdown(results(skipped))
    assert "*9 GB*" in text
    assert "- no CUDA device: 2 of `test_update`" in text


def test_tables_have_as_many_cells_in_every_line(report: Any) -> None:
    update = {"group": "update", "solver": "eigh"}
    training = {"group": "training", "alone_s": 1e-3, "ratio_iqr": 0.1}
    entries = [
        timed("published", 23.0),
        timed("loss", 0.1, group="part"),
        timed("NumPy", 1.1, **update),
        timed("DirectPred", 1.0, **training),
        {"group": "memory", "name": "published", "rows": 512, "bytes": 10},
    ]
    blocks = report.markdown(results(*entries)).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 6
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1


def test_figures_of_a_busy_machine_say_so(report: Any) -> None:
    assert "busy" not in report.markdown(results())
    assert "was busy" in report.markdown(results() | {"busy": 2.5})
