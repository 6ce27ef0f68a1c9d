"""What the wheel holds: all of the package, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "directpred": "directpred",
    "adapters": "directpred/adapters",
    "reference_trainers": "directpred/reference_trainers",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # Of the files that git knows: what lies about in a working tree is none of a release.
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path_factory.mktemp("source")
    for name in tracked.stdout.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        return set(file.namelist()), tracked.stdout.split("\0")[:-1]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names, tracked = wheel
    expected = set()
    for name in tracked:
        folder, _, rest = name.partition("/")
        if folder in FOLDERS and rest.endswith((".py", ".yaml", "py.typed")):
            expected.add(f"{FOLDERS[folder]}/{rest}")
    assert {"directpred/py.typed", "directpred/reference_trainers/configs/cifar10.yaml"} <= expected
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == expected


def test_the_wheel_describes_itself(wheel):
    names, _ = wheel
    described = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert described == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"),
        "licenses/LICENSE",
    }
