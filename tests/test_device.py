"""The script for a lent GPU, rehearsed from beginning to end on the CPU."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
for package in ("cpuinfo", "kornia", "lightning", "pytest_benchmark", "sklearn", "torchvision"):
    pytest.importorskip(package)
missing = [tool for tool in ("bash", "setsid", "timeout", "tar") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"there is no {', '.join(missing)}")

ROOT = Path(__file__).parents[1]
HEAD = "import pytest\n\n@pytest.mark.gpu\ndef test_graphs():\n"


def rehearse(folder, verdict, steps):
    """Run steps, with GPU tests that have that verdict; the log, and where the results are."""
    tests = folder / "test_verdict.py"
    tests.write_text(HEAD + f"    {verdict}\n")
    ours = ("DIRECTPRED_GRAPHS", "PYTEST")  # pytest-benchmark measures nothing beside xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment |= {"PYTHON": sys.executable, "GPU_TESTS": str(tests), "STEPS": steps}
    done = subprocess.run(
        ["bash", "benches/device.sh", "rehearse", str(folder / "rehearsal")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    results = folder / "rehearsal" / "results"
    log = (results / "log.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(log)
    assert log.splitlines()[-1].endswith("] done")
    return [line.partition("] ")[2] for line in log.splitlines()], results


def packed(results):
    with tarfile.open(results / "results.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {m.name.removeprefix("./"): archive.extractfile(m).read() for m in members}


def test_tests_targets_and_training(tmp_path):
    log, results = rehearse(tmp_path, "pass", "tests targets training")
    assert log == [
        "gpu_tests: exit status 0",
        "core_tests: exit status 0",
        "recorded closings: on",
        "targets: exit status 0",
        "linear: exit status 0",
        "done",
    ]
    assert {path.name for path in results.iterdir()} == {
        *("log.txt", "gpu_tests.txt", "targets.txt", "linear.metrics.csv", "results.tar.gz")
    }
    assert "1 passed" in (results / "gpu_tests.txt").read_text()
    assert "| CPU: whole step ÷ bare operations" in (results / "targets.txt").read_text()
    assert "linear,0,1," in (results / "linear.metrics.csv").read_text()
    everything = packed(results)
    assert json.loads(everything["linear.summary.json"])
    (name,) = [name for name in everything if name.endswith("-targets-rehearse.json")]
    measured = json.loads(everything[name])
    assert measured["graphs"] is True
    groups = {entry["group"] for entry in measured["entries"]}
    assert groups == {"bare", "closing", "norm", "step", "training", "update"}


def test_gpu_tests_that_fail_turn_recorded_closings_off(tmp_path):
    log, results = rehearse(tmp_path, "assert 0", "tests benches")
    assert log == [
        "gpu_tests: exit status 1",
        "core_tests: exit status 1",
        "recorded closings: off",
        "benches: exit status 0",
        "done",
    ]
    assert "1 failed" in (results / "gpu_tests.txt").read_text()
    assert "passed" in (results / "benches.txt").read_text()
    (report,) = [v for k, v in packed(results).items() if k.endswith("-rehearse.json")]
    assert json.loads(report)["graphs"] is False


def test_gpu_tests_that_are_all_skipped_turn_recorded_closings_off(tmp_path):
    log, _ = rehearse(tmp_path, "pytest.skip('no CUDA device')", "tests")
    assert log[0] == "gpu_tests: exit status 0"
    assert log[2] == "recorded closings: off"


def test_without_a_command_it_says_what_there_is():
    done = subprocess.run(
        ["bash", "benches/device.sh"], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert "device.sh prepare ARCHIVE" in done.stdout
