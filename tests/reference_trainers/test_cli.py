"""The command line: what a user can get wrong is one line on standard error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from directpred.reference_trainers.cli import main


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("", 2, "command"),
        ("paint", 2, "paint"),
        ("train --epoks 3", 2, "--epoks"),
        ("train --epoch 3", 2, "--epoch"),
        ("train --epochs 0", 2, "epochs must be a whole number, at least 1"),
        ("train --lr fast", 2, "lr must be a number"),
        ("train --predictor magic", 2, "unknown predictor 'magic'"),
        ("train --batch-size 2000", 2, "1347 training images"),
        ("train --validation 1", 2, "validation must be a number, from 0 to 0.9"),
        ("compare --validation 0.001", 2, "validation 0.001 of 1347 training images"),
        ("train --config nowhere.yaml", 1, "no config 'nowhere.yaml'"),
        ("train --resume nowhere.ckpt", 1, "no checkpoint nowhere.ckpt"),
        ("train --resume nowhere.ckpt --lr 1", 2, "leave out lr"),
        ("train --resume nowhere.ckpt --config digits", 2, "leave out --config"),
        ("train --name a/b", 2, "plain name"),
        ("train --name taken", 1, "taken exists already"),
        ("compare --name taken", 1, "taken exists already"),
        ("compare --predictors mlp,magic", 2, "unknown predictor 'magic'"),
        ("compare --seeds 0", 2, "--seeds"),
        ("compare --workers -1", 2, "--workers"),
        ("sweep", 2, "--vary"),
        ("sweep --ablations --vary lr=1", 2, "--vary"),
        ("sweep --ablations rates", 2, "unknown ablation 'rates'; known are rate,"),
        ("sweep --vary lr", 2, "option=value"),
        ("sweep --vary lr=1 --lr 2", 2, "--lr is given, and the sweep sets it"),
        ("sweep --ablations rule --predictor mlp", 2, "--predictor is given"),
        ("sweep --vary batch_size=64,2000", 2, "1347 training images"),
        ("sweep --vary lr=1 --name taken", 1, "taken exists already"),
        ("evaluate", 2, "--checkpoint"),
        ("evaluate --checkpoint .", 1, "no checkpoint ."),
    ],
)
def test_mistakes(
    arguments: str,
    status: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    assert main(arguments.split()) == status
    complaint = capsys.readouterr().err
    assert complaint.startswith("directpred: ")
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoks: 3\n", "unknown option 'epoks'"),
        ("epochs: many\n", "epochs must be a whole number"),
        ("epochs: [1\n", "not valid YAML"),
        ("- epochs\n", "not a list"),
        ("", "not a list"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_mistakes_in_a_config(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(text, encoding="utf-8")
    assert main(["train", "--config", str(config), "--out", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert str(config) in complaint
    assert expected in complaint
    assert complaint.count("\n") == 1


def test_no_place_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def _python(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from directpred.reference_trainers.cli import main; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_needs_no_framework() -> None:
    done = _python("main(['train', '--help']); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0
    assert "--target-momentum" in done.stdout


@pytest.mark.parametrize("package", ["lightning", "sklearn", "rich"])
def test_a_missing_extra_is_named(package: str) -> None:
    done = _python(f"sys.modules['{package}'] = None; sys.exit(main(['compare']))")
    assert done.returncode == 1
    assert done.stderr == f'directpred: {package} is missing: pip install "directpred[train]"\n'
