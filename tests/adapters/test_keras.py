"""Keras 3 on both backends, each in a process of its own: a process has but one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "keras_byol.py"


def run(library, *command, folder):
    if not importlib.util.find_spec("keras"):
        pytest.skip("keras is not installed")
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "KERAS_BACKEND": library, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_weight_is_that_of_the_features(library, tmp_path):
    pytest.importorskip(library)
    done = run(library, str(SCRIPT), folder=tmp_path)
    assert done.stdout.endswith("right\n"), done.stderr[-3000:]


def test_another_backend_is_an_error(tmp_path):
    done = run("numpy", "-c", "import directpred.adapters.keras", folder=tmp_path)
    assert "KERAS_BACKEND is 'numpy'" in done.stderr
