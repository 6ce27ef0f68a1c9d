"""The README's Python examples run, each as a program of its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("README.md", "CONTRIBUTING.md", "adapters/README.md", "docs/ranks.md", "docs/rules.md")
PAGES = {name: ROOT / name for name in NAMES}
EXAMPLES = [
    example
    for page in PAGES.values()
    for example in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
]
LINKS = [
    (name, link)
    for name, page in PAGES.items()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("\n")[0])
def test_example_runs(example):
    pytest.importorskip("torch")
    if "import jax" in example:
        pytest.importorskip("jax")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


def test_it_prints_the_reference_as_it_is():
    source = (ROOT / "directpred" / "reference.py").read_text(encoding="utf-8")
    assert source[source.index("import torch") :] in README


def test_its_bench_tables_are_those_of_the_committed_results():
    results = "".join(path.read_text() for path in ROOT.glob("benches/results/*.md"))
    quoted = README[README.index("\n## Speed") : README.index("\n## Licence")]
    rows = [line for line in quoted.splitlines() if line.startswith("|")]
    assert rows
    assert [row for row in rows if row not in results] == []


def test_its_diff_is_one_that_is_run():
    (diff,) = re.findall(r"^```diff\n.*?^```", README, flags=re.DOTALL | re.MULTILINE)
    assert diff in PAGES["adapters/README.md"].read_text(encoding="utf-8")


def test_the_table_of_many_ranks_is_what_its_example_prints(capsys):
    page = PAGES["docs/ranks.md"].read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    exec(example, {})
    assert capsys.readouterr().out in page


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize(
    ("page", "link", "anchor"),
    [
        (name, link, anchor)
        for name, page in PAGES.items()
        for link, anchor in re.findall(
            r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")
        )
    ],
)
def test_linked_headings_exist(page, link, anchor):
    path = PAGES[page].parent / link if link else PAGES[page]
    assert anchor in anchors(path)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_linked_files_exist(page, link):
    assert (PAGES[page].parent / link).exists()
