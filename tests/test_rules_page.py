"""docs/rules.md: its tables are what the commands of the repository print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def rows(text):
    """The cells of every row of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_digits_runs_are_those_of_the_committed_bench():
    bench = rows((ROOT / "benches/results/collapse.md").read_text(encoding="utf-8"))
    quoted = [row for row in rows(PAGE) if row[0].startswith("digits")]
    assert len(quoted) == 6
    assert [row for row in quoted if row not in bench] == []


def test_the_thresholds_are_the_monitors_and_lie_between_the_runs():
    from directpred import monitor

    said = f"a spread below {monitor.SPREAD} or an effective rank below {monitor.RANK}"
    assert said in " ".join(PAGE.split())
    bench = (ROOT / "benches/results/collapse.md").read_text(encoding="utf-8")
    for recipe, _, lowest, _, last, *_, warned in rows(bench):
        if recipe.startswith("digits"):
            spread, rank = map(float, lowest.split(","))
            collapsed = spread < monitor.SPREAD
            assert collapsed == (rank < monitor.RANK) == (warned != "–")
            if float(last.split(",")[0]) < monitor.SPREAD:
                assert collapsed


def test_the_example_prints_the_rows_of_the_page():
    pytest.importorskip("torch")
    script = ROOT / "examples/time_series.py"
    done = subprocess.run(
        [sys.executable, script, "1", "2"], capture_output=True, text=True, timeout=120, check=True
    )
    head, _, *printed = rows(done.stdout)
    page = rows(PAGE)
    start = page.index(head)
    assert len(printed) == 12
    assert [row[:2] for row in page[start + 2 : start + 14]] == [row[:2] for row in printed]
    for row in printed:
        figures = [float(cell) for cell in row[2:5]]
        assert -2 <= figures[0] <= 2
        assert 0 <= figures[1] <= 1.1
        assert 1 <= figures[2] <= 64
        assert re.fullmatch(r"–|[\d.e+]+", row[5])
        assert 0 <= float(row[6]) <= 100


def test_the_example_is_short():
    lines = (ROOT / "examples/time_series.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
