"""The README's Python examples run, each as a program of its own."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_example_runs(example):
    pytest.importorskip("torch")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_its_bench_tables_are_those_of_the_committed_results():
    results = "".join(
        path.read_text() for path in Path(__file__).parents[1].glob("benches/results/*.md")
    )
    quoted = README[README.index("\n## Speed") : README.index("\n## Licence")]
    rows = [line for line in quoted.splitlines() if line.startswith("|")]
    assert rows
    assert [row for row in rows if row not in results] == []


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_linked_files_exist(link):
    assert (Path(__file__).parents[1] / link).exists()
