"""The page that compares runs."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning", reason="needs the train extra")

import torch
from matplotlib.figure import Figure
from PIL import Image

from directpred.reference_trainers.cli import main
from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.report import command, curves, eigenspaces
from directpred.reference_trainers.report import page as html
from directpred.reference_trainers.report.command import report
from directpred.reference_trainers.report.directory import HEADER, read
from directpred.reference_trainers.thumbnails import save_views

SCALARS = ("probe", "knn", "loss", "spread", "effective_rank")
VECTORS = ("alignment", "correlation_eigenvalues", "weight_eigenvalues")
Row = tuple[str, int, int, str, int | str, float]


def values(predictor: str, seed: int, epoch: int, metrics: Sequence[str] = SCALARS) -> list[Row]:
    """What a run might have measured; of a closed-form predictor also vectors of 4 values."""
    rng = np.random.default_rng([seed, epoch, len(predictor)])
    rows: list[Row] = [
        (predictor, seed, epoch, name, "", round(float(x), 5))
        for name, x in zip(metrics, rng.uniform(0, 90, len(metrics)), strict=True)
    ]
    if predictor.startswith("direct"):
        s = np.sort(rng.uniform(0, 5, 4)) * (epoch > 0)
        p = np.sqrt(s) + 0.1 * s[-1]
        for name, vector in zip(VECTORS, (np.ones(4), s, p), strict=True):
            rows += [(predictor, seed, epoch, name, j, float(x)) for j, x in enumerate(vector)]
    return rows


def write(directory: Path, rows: Sequence[Row], summary: Mapping[str, Any] | None) -> Path:
    directory.mkdir(parents=True)
    with (directory / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


def summary_of(recipe: Recipe) -> dict[str, Any]:
    return {
        "command": "train",
        "recipe": asdict(recipe),
        "seconds": 12.25,
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "machine": {"system": "Linux", "cores": 2},
    }


def trained(
    directory: Path, metrics: Sequence[str] = SCALARS, last: int = 2, **options: Any
) -> Path:
    """The directory of a run of 2 epochs."""
    recipe = replace(Recipe(epochs=2), **options)
    rows = [row for e in range(last + 1) for row in values(recipe.predictor, 0, e, metrics)]
    return write(directory, rows, summary_of(recipe))


def compared(directory: Path) -> Path:
    """The directory of a comparison of two predictors with three seeds."""
    shared = asdict(Recipe(epochs=2))
    del shared["predictor"], shared["seed"]
    summary = summary_of(Recipe()) | {
        "command": "compare",
        "status": "finished",
        "recipe": shared,
        "predictors": ["directpred", "mlp"],
        "seeds": [0, 1, 2],
        "results": {
            name: {"seconds": {"values": [1.0, 2.0, 3.0]}} for name in ("directpred", "mlp")
        },
        "failures": {"mlp seed 3": "training diverged <b>"},
    }
    rows = [
        row
        for seed in range(3)
        for name in ("directpred", "mlp")
        for epoch in range(3)
        for row in values(name, seed, epoch)
    ]
    return write(directory, rows, summary)


class Page(HTMLParser):
    """Elements, the cells of the tables, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def results(self) -> list[dict[str, str]]:
        head, *rows = self.tables[0]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def images(self) -> list[Image.Image]:
        pictures = []
        for tag, attributes in self.elements:
            if tag == "img":
                head, _, data = (attributes["src"] or "").partition(",")
                assert head == "data:image/png;base64"
                pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        return pictures


def made(out: Path, *runs: Path) -> Page:
    report(runs, out)
    assert sorted(path.name for path in out.glob("report*")) == ["report.html", "report.png"]
    assert (out / "report.html").stat().st_size < 5e6
    return Page(out / "report.html")


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotting takes a second, and many tests do not look at it."""
    picture = io.BytesIO()
    Image.new("L", (1, 1)).save(picture, format="PNG")
    monkeypatch.setattr(command, "draw", lambda groups, labels: picture.getvalue())


def test_table_has_the_last_numbers_of_a_run(tmp_path: Path) -> None:
    page = made(tmp_path, trained(tmp_path / "mine"))
    (row,) = page.results()
    last = {r[3]: r[5] for r in values("directpred", 0, 2) if r[4] == ""}
    assert row == {
        "run": "mine",
        "data set": "digits",
        "predictor": "DirectPred",
        "seeds": "0",
        "epochs": "2",
        "linear probe, %": f"{last['probe']:.2f}",
        "k-NN, %": f"{last['knn']:.2f}",
        "spread": f"{last['spread']:.3f}",
        "effective rank": f"{last['effective_rank']:.2f}",
        "seconds": "12.2",
    }


def test_table_has_mean_and_deviation_of_a_comparison(tmp_path: Path) -> None:
    page = made(tmp_path, compared(tmp_path / "all"))
    rows = page.results()
    assert [row["predictor"] for row in rows] == ["DirectPred", "learned, 2-layer"]
    probes = [{r[3]: r[5] for r in values("mlp", seed, 2)}["probe"] for seed in range(3)]
    assert rows[1]["linear probe, %"] == f"{mean(probes):.2f} ± {stdev(probes):.2f}"
    assert rows[1]["seconds"] == "2.0 ± 1.0"
    assert rows[1]["seeds"] == "0, 1, 2"
    assert "Failed: all, mlp seed 3: training diverged <b>" in page.text


@pytest.mark.usefixtures("unplotted")
def test_last_and_best_of_a_trained_probe(tmp_path: Path) -> None:
    page = made(tmp_path, trained(tmp_path / "mine", ("probe", "probe_best", "spread")))
    (row,) = page.results()
    last = {r[3]: r[5] for r in values("directpred", 0, 2, ("probe", "probe_best", "spread"))}
    assert row["linear probe, %"] == f"{last['probe']:.2f}"
    assert row["its best epoch, %"] == f"{last['probe_best']:.2f}"


def test_page_stands_alone(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b", predictor="linear")]
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    save_views(images, images.float(), images.float(), runs[0] / "views.png")
    page = made(tmp_path, *runs)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert "url(" not in page.source
    assert "//" not in re.sub(r'src="[^"]*"', "", page.source)
    assert [image.size for image in page.images()][1:] == [(800, 300)]
    alternatives = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert all(text and len(text) > 20 for text in alternatives)
    with Image.open(tmp_path / "report.png") as picture:
        assert page.images()[0].size == picture.size


@pytest.mark.usefixtures("unplotted")
def test_equal_views_are_shown_once_and_large_ones_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b")]
    for run in runs:
        save_views(*torch.rand(3, 2, 1, 8, 8).fill_(0.5), run / "views.png")
    page = made(tmp_path, *runs)
    assert len(page.images()) == 2
    assert "a, b: images" in page.text
    monkeypatch.setattr(html, "PICTURES_BYTES", 0)
    page = made(tmp_path, *runs)
    assert len(page.images()) == 1
    assert "too large for this page" in page.text


def test_text_is_escaped(tmp_path: Path) -> None:
    name = "<script>alert('1')&amp;$x$ \"_"
    run = trained(tmp_path / name)
    summary = json.loads((run / "summary.json").read_text())
    summary["recipe"]["dataset"] = "<img src=x>"
    summary["machine"]["processor"] = "</table><script>"
    (run / "summary.json").write_text(json.dumps(summary))
    page = made(tmp_path, run, trained(tmp_path / "_b"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script"})
    assert len(page.images()) == 1
    assert page.results()[0]["run"] == name
    assert page.results()[0]["data set"] == "<img src=x>"
    assert "</table><script>" in page.tables[-1][-1] or "</table><script>" in page.text


@pytest.mark.usefixtures("unplotted")
def test_only_options_that_differ_are_told(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b", predictor="mlp", eps=0.2)]
    page = made(tmp_path, *runs)
    assert page.tables[1] == [
        ["option", "a", "b"],
        ["predictor", "directpred", "mlp"],
        ["eps", "null", "0.2"],
    ]
    page = made(tmp_path, runs[0], trained(tmp_path / "c"))
    assert "all runs have the same recipe" in page.text


@pytest.mark.usefixtures("unplotted")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"predictor": "linear", "seed": 3, "bn_affine": True, "fixed_predictor_lr": True},
        {"jitter": (0.8, 0.8, 0.8, 0.2), "blur2": 0.1, "dataset": "stl10", "lr": 1e-5},
    ],
)
def test_command_makes_the_same_recipe(tmp_path: Path, options: dict[str, Any]) -> None:
    page = made(tmp_path, trained(tmp_path / "a", **options))
    (line,) = re.findall(r"^directpred train.*", page.text, re.MULTILINE)
    words = shlex.split(line)[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given.pop("--data", None) == ("DIR" if "dataset" in options else None)
    recipe = Recipe.parse({key[2:].replace("-", "_"): value for key, value in given.items()})
    assert recipe == replace(Recipe(epochs=2), **options)


@pytest.mark.usefixtures("unplotted")
def test_command_of_a_comparison(tmp_path: Path) -> None:
    page = made(tmp_path, compared(tmp_path / "all"))
    assert "directpred compare --predictors directpred,mlp --seeds 3 --epochs 2\n" in page.text


@pytest.mark.usefixtures("unplotted")
def test_versions_are_told_apart(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b"), trained(tmp_path / "c")]
    assert made(tmp_path, *runs).tables[-1][0] == ["", "all runs"]
    summary = json.loads((runs[1] / "summary.json").read_text())
    summary["versions"]["torch"] = "2.6.0"
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    table = made(tmp_path, *runs).tables[-1]
    assert table[0] == ["", "a, c", "b"]
    assert ["torch", "2.15.0", "2.6.0"] in table


@pytest.mark.usefixtures("unplotted")
def test_unfinished_run(tmp_path: Path) -> None:
    run = trained(tmp_path / "a", last=1)
    assert made(tmp_path, run).results()[0]["run"] == "a (unfinished)"
    assert made(tmp_path, run).results()[0]["epochs"] == "1 of 2"
    (run / "summary.json").unlink()
    page = made(tmp_path, run)
    row = page.results()[0]
    assert (row["run"], row["epochs"], row["data set"]) == ("a (unfinished)", "1", "–")
    assert row["seconds"] == "–"
    assert "no summary.json yet" in page.text


@pytest.mark.usefixtures("unplotted")
def test_comparison_that_goes_on(tmp_path: Path) -> None:
    run = compared(tmp_path / "all")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    text = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(line for line in text if not line.startswith("mlp")))
    first, second = made(tmp_path, run).results()
    assert first["run"] == "all (running)"
    assert (second["predictor"], second["epochs"], second["spread"]) == (
        "learned, 2-layer",
        "–",
        "–",
    )


@pytest.mark.parametrize(
    ("predictor", "metrics", "last"),
    [
        ("mlp", ("loss", "spread", "effective_rank"), 2),  # no labels, no matrix
        ("mlp", ("spread",), 2),
        ("directpred", SCALARS, 0),  # before the first step: F̂ is zero
        ("directpred", SCALARS, 1),
        ("directset", ("spread", "loss"), 2),
    ],
)
def test_what_is_not_measured_is_left_out(
    tmp_path: Path, predictor: str, metrics: Sequence[str], last: int
) -> None:
    page = made(tmp_path, trained(tmp_path / "a", metrics, last, predictor=predictor))
    assert ("k-NN, %" in page.results()[0]) == ("knn" in metrics)
    assert ("W_p" in page.text) == (predictor != "mlp" and last > 0)
    assert ("Alignment" in page.text) == (predictor != "mlp")
    rows = -(-(len(metrics) + (predictor != "mlp")) // 3) + (predictor != "mlp" and last > 0)
    assert page.images()[0].height == pytest.approx(150 * 2.55 * rows, rel=0.25)


def test_many_runs_of_the_same_predictor_look_different(tmp_path: Path) -> None:
    groups = [group for n in range(12) for group in read(trained(tmp_path / f"run{n}")).groups]
    assert len({str(style) for style in curves._styles(groups)}) == 12
    page = made(tmp_path, *(tmp_path / f"run{n}" for n in range(12)))
    assert "Of 12 spectra, the first 8 are shown." in page.text


def test_rule_is_drawn_where_the_recipe_is_known(tmp_path: Path) -> None:
    run = trained(tmp_path / "a", eps=0.1)
    (group,) = read(run).groups
    panels = [Figure().add_subplot() for _ in range(3)]
    curves._spectra(panels, group, "a")
    (rule,) = panels[2].lines
    s, p = np.asarray(rule.get_data(), dtype=float)
    np.testing.assert_allclose(p, np.sqrt(s / s[-1]) + 0.1)
    (points,) = panels[2].collections
    last = {name: [r[5] for r in values("directpred", 0, 2) if r[3] == name] for name in VECTORS}
    expected = np.column_stack([last["correlation_eigenvalues"], last["weight_eigenvalues"]])
    np.testing.assert_allclose(np.asarray(points.get_offsets()), expected)
    assert panels[2].get_legend().get_texts()[0].get_text() == "Eq. 18, ε = 0.1"  # type: ignore[union-attr]

    (run / "summary.json").unlink()
    (group,) = read(run).groups
    panels = [Figure().add_subplot() for _ in range(3)]
    curves._spectra(panels, group, "a")
    assert not panels[2].lines


LEARNED = (
    *("alignment", "correlation_eigenvalues", "weight_diagonal"),
    *("weight_norms", "projector_norms"),
)


def learned(directory: Path, vectors: Sequence[str] = LEARNED, **options: Any) -> Path:
    """The directory of a run of a learned linear predictor."""
    recipe = Recipe(epochs=2, predictor="linear", **options)
    rows = [row for epoch in range(3) for row in values("linear", 0, epoch)]
    rng = np.random.default_rng(0)
    for epoch in range(3):
        for name in vectors:
            numbers = np.sort(rng.uniform(-1 if name == "alignment" else 0.1, 1, 5))
            rows += [("linear", 0, epoch, name, j, float(x)) for j, x in enumerate(numbers)]
    return write(directory, rows, summary_of(recipe))


def test_eigenspaces_of_a_learned_predictor(tmp_path: Path) -> None:
    run = learned(tmp_path / "a", predictor_lr=4.0)
    (group,) = read(run).groups
    panels = [Figure().add_subplot() for _ in range(3)]
    eigenspaces._learned(panels, group, "a")

    def of(metric: str, epoch: int = -1) -> Any:
        series = group.series(metric)
        assert series is not None
        return series[1][0, epoch]

    (mesh,) = panels[0].collections
    assert mesh.get_array() is not None
    np.testing.assert_allclose(np.asarray(mesh.get_array())[:, -1], of("alignment")[::-1])
    assert panels[0].get_ylim() == (5.5, 0.5)  # the leading one is on top
    s, p = of("correlation_eigenvalues"), of("weight_diagonal")
    (points,) = panels[1].collections
    offsets = np.column_stack([s / s.max(), p / p.max()])
    np.testing.assert_allclose(np.asarray(points.get_offsets()), offsets)
    parabola, rule = (np.asarray(line.get_data(), dtype=float) for line in panels[1].lines)
    np.testing.assert_allclose(parabola[1] ** 2, parabola[0])
    raw = np.sqrt(rule[0]) + 0.1
    np.testing.assert_allclose(rule[1], raw / raw[-1])
    before, after = panels[2].collections
    for epoch, drawn in ((0, before), (-1, after)):
        balance = [of("projector_norms", epoch) ** 2, of("weight_norms", epoch) ** 2 / 4]
        np.testing.assert_allclose(np.asarray(drawn.get_offsets()), np.column_stack(balance))
    (line,) = panels[2].lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())


@pytest.mark.usefixtures("unplotted")
def test_page_shows_the_eigenspaces_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (eigenspaces, html):
        monkeypatch.setattr(module, "MOST_LEARNED", 1)
    runs = [learned(tmp_path / "a", LEARNED[:3]), learned(tmp_path / "b")]
    page = made(tmp_path, trained(tmp_path / "other"), *runs)
    assert "Eigenspaces of the learned linear predictor" in page.text
    assert "Of 2 predictors, the first 1 are shown." in page.text
    with Image.open(tmp_path / "alignment.png") as picture:
        assert page.images()[1].size == picture.size
    page = made(tmp_path / "new", tmp_path / "other")
    assert "Eigenspaces" not in page.text
    assert not (tmp_path / "new" / "alignment.png").exists()


def test_a_sweep_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "a")
    (run / "summary.json").write_text(json.dumps(summary_of(Recipe()) | {"command": "sweep"}))
    with pytest.raises(UserError, match=re.escape(f"its picture is {run / 'sweep.png'}")):
        report([run], tmp_path)


def test_of_several_seeds_the_epochs_that_all_have_are_drawn(tmp_path: Path) -> None:
    rows = [
        row for s, last in ((0, 3), (1, 2)) for e in range(last + 1) for row in values("mlp", s, e)
    ]
    (group,) = read(write(tmp_path / "a", rows, None)).groups
    series = group.series("spread")
    assert series is not None
    assert series[0].tolist() == [0, 1, 2]
    assert series[1].shape == (2, 3, 1)
    assert group.last_epoch == 2


@pytest.mark.usefixtures("unplotted")
def test_where_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = trained(tmp_path / "runs" / "[red]a"), trained(tmp_path / "runs" / "b")
    monkeypatch.chdir(tmp_path)
    report([a], None)
    assert capsys.readouterr().out == f"written to {a / 'report.html'} and {a / 'report.png'}\n"
    assert (a / "report.html").is_file()
    report([a, b, a], None)
    assert capsys.readouterr().out == "written to report.html and report.png\n"
    assert len(Page(tmp_path / "report.html").results()) == 2
    report([a, b], tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "report.png").is_file()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.usefixtures("unplotted")
def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "x" / "run"), trained(tmp_path / "y" / "run")]
    assert [row["run"] for row in made(tmp_path, *runs).results()] == [str(run) for run in runs]


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"no such run: {tmp_path / 'none'}")):
        report([tmp_path / "none"], tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is not a run")):
        report([tmp_path], tmp_path)
    empty = write(tmp_path / "empty", [], None)
    with pytest.raises(UserError, match=re.escape(f"nothing is measured yet in {empty}")):
        report([empty], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


HEAD = b"predictor,seed,epoch,metric,index,value\n"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"", "line 1"),
        (b"predictor,seed\n", "line 1"),
        (b"\xff\xfe", "line 1"),
        (HEAD + b"mlp,0,0,spread,,0.5\nmlp,0,1,spr", "line 3"),
        (HEAD + b"mlp,0,0,spread,,many\n", "line 2"),
        (HEAD + b"mlp,zero,0,spread,,0.5\n", "line 2"),
        (HEAD + b"mlp,0,0.5,spread,,0.5\n", "line 2"),
        (HEAD + b"mlp,0,0,spread,,0.5\nmlp,0,0,spread,,0.5\n", "line 3"),
        (HEAD + b"mlp,0,0,alignment,1,0.5\n", "line 2"),
        (HEAD + b'mlp,0,0,"spread,,0.5\n', "line 2"),
        (HEAD + b"mlp,0,0,a,0,1\nmlp,0,0,a,1,1\nmlp,0,1,a,0,1\n", "mlp lacks values of a"),
    ],
)
def test_damaged_metrics(tmp_path: Path, content: bytes, where: str) -> None:
    run = trained(tmp_path / "a")
    (run / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{run / 'metrics.csv'} is damaged")) as error:
        report([run], tmp_path)
    assert where in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"recipe": 3}',
        '{"recipe": {"lr": 1}}',
        '{"recipe": {"predictor": "mlp"}, "results": {"mlp": 3}}',
        '{"recipe": {"predictor": "mlp"}, "versions": null}',
    ],
)
def test_damaged_summary(tmp_path: Path, text: str) -> None:
    run = trained(tmp_path / "a")
    (run / "summary.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{run / 'summary.json'} is damaged")):
        report([run], tmp_path)


@pytest.mark.parametrize(
    ("size", "edge", "channels"), [(8, 96, 1), (28, 84, 1), (32, 96, 3), (96, 96, 3), (224, 96, 3)]
)
def test_views_are_pictured(tmp_path: Path, size: int, edge: int, channels: int) -> None:
    raw = torch.randint(0, 17, (9, channels, size, size), dtype=torch.uint8)
    save_views(raw, raw.float() * 2 - 3, torch.rand(9, channels, size, size), tmp_path / "v.png")
    with Image.open(tmp_path / "v.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (3 * (edge + 4), 8 * (edge + 4), 3)
    tiles = pixels.reshape(3, edge + 4, 8, edge + 4, 3)[:, 2:-2, :, 2:-2]
    # Scale and offset do not show.
    np.testing.assert_allclose(tiles[0], tiles[1], atol=1)
    if size <= edge:
        low, high = raw[0].min(), raw[0].max()
        shown = tiles[0, :: edge // size, 0, :: edge // size]
        expected = ((raw[0] - low) / (high - low) * 255).permute(1, 2, 0).expand(-1, -1, 3)
        np.testing.assert_allclose(shown, expected, atol=1)
    assert [path.name for path in tmp_path.iterdir()] == ["v.png"]


def test_views_of_few_or_strange_images(tmp_path: Path) -> None:
    raw = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    broken = torch.full((2, 3, 16, 16), float("nan"), dtype=torch.bfloat16, requires_grad=True)
    save_views(raw, broken, broken * 0 + float("inf"), tmp_path / "v.png")
    with Image.open(tmp_path / "v.png") as picture:
        assert picture.size == (200, 300)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", "--epochs", "2", "--out", str(out), "--name", "<b>mine"]) == 0
    run = out / "<b>mine"
    if not (run / "views.png").exists():
        save_views(*torch.rand(3, 8, 1, 8, 8), run / "views.png")
    return run


def test_real_run(tmp_path: Path, real_run: Path) -> None:
    page = made(tmp_path, real_run)
    (row,) = page.results()
    result = json.loads((real_run / "summary.json").read_text())["result"]
    assert (row["run"], row["epochs"]) == ("<b>mine", "2")
    for metric, (heading, digits) in html.COLUMNS.items():
        assert row.get(heading) == (f"{result[metric]:.{digits}f}" if metric in result else None)
    assert "directpred train --epochs 2\n" in page.text
    assert len(page.images()) == 2


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += ["--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}", *options]
    return subprocess.run(
        [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_the_page(tmp_path: Path, real_run: Path, dark: bool) -> None:
    page = made(tmp_path, real_run, trained(tmp_path / "other", predictor="linear"))

    shot = tmp_path / "shot.png"
    size = ["--window-size=1250,1600", "--hide-scrollbars"]
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    seen = browse(tmp_path / "report.html", f"--screenshot={shot}", *size, theme)
    assert "CONSOLE" not in seen.stderr
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (1600, 1250)
    background = np.median(pixels[:, :20])
    assert (background < 60) if dark else (background > 240)
    # Something stands on every third of the page.
    assert all((part != background).mean() > 0.02 for part in np.array_split(pixels, 3))

    # The browser itself tells, from a copy that may run scripts, what it has loaded.
    script = (
        "<script>window.onload = () => { document.title = 'loaded:' + "
        "[...document.images].map(i => i.naturalWidth + 'x' + i.naturalHeight).join() + "
        "';' + (document.documentElement.scrollWidth <= innerWidth) }</script></body>"
    )
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.source)
    assert source != page.source
    copy = tmp_path / "copy.html"
    copy.write_text(source.replace("</body>", script), encoding="utf-8")
    seen = browse(copy, "--dump-dom", *size)
    assert "CONSOLE" not in seen.stderr
    sizes = ",".join(f"{image.width}x{image.height}" for image in page.images())
    assert f"<title>loaded:{sizes};true</title>" in seen.stdout
