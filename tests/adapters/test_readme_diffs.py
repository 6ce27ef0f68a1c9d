"""What adapters/README.md tells a user to change, applied to scripts and run."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from compare_lightly import README, apply, hunks  # noqa: E402
from peers import REPOSITORY, source, views  # noqa: E402

TEXT = README.read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^`([^`\n]+)`:\n+```diff$", TEXT, re.M)
EXAMPLES = [script for script in SCRIPTS if script.startswith("examples/")]
# Appended to a script: what it trained with, wherever it holds it.
CHECK = """
import gc
from directpred.torch import DirectPredHead
heads = [x for x in gc.get_objects() if isinstance(x, DirectPredHead)]
print("steps", [int(head.step_count) for head in heads])
assert len(heads) == 1 and heads[0].step_count > 1
"""


CHECKS = {
    "flax": "\nassert int(model.predictor.step_count[...]) == 60\n",
    "linen": "\nassert int(state.batch_stats['predictor']['directpred'].state.step_count) == 60\n",
    "keras": "\nassert int(model.predictor.step_count) == 3 * 28\n",
    "haiku": "\nassert int(state['predictor']['directpred'].state.step_count) == 60\n",
}


def test_every_diff_is_known_here():
    assert TEXT.count("```diff") == len(SCRIPTS)
    assert set(SCRIPTS) - set(EXAMPLES) == set(SOURCE_FILES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_diff_is_short(script):
    added = [line for hunk in hunks(script) for line in hunk.split("\n") if line[:1] == "+"]
    assert 1 <= len(added) <= 5


@pytest.mark.parametrize("script", [s for s in EXAMPLES if "mmpretrain" not in s])
def test_an_example_trains_with_it(script, tmp_path):
    name = re.sub(r"examples/|_(digits|byol|lightning_simsiam)\.py", "", script)
    if not importlib.util.find_spec(
        name.replace("linen", "flax")
    ):  # keras is not to be imported on another backend here
        pytest.skip(f"{name} is not installed")
    patched = apply(hunks(script), (REPOSITORY / script).read_text())
    path = tmp_path / "script.py"
    path.write_text(patched + CHECKS.get(name, CHECK))
    arguments = ["0", "2"] if script.endswith("lightly_byol.py") else []
    done = subprocess.run(
        [sys.executable, path, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


SOURCE_FILES = {
    "main_simsiam.py": "simsiam",
    "main.py": "pytorch_byol",
    "ssl/real-dataset/main.py": "luckmatters",
    "main_pretrain.py": "solo_learn",
    "byol/main_loop.py": "deepmind_byol",
    "main_moco.py": "moco_v3",
    "src/pl_bolts/models/self_supervised/byol/byol_module.py": "bolts",
    "train_transductive.py": "bgrl",
}


@pytest.mark.parametrize("script", SOURCE_FILES)
def test_a_diff_fits_the_source(script):
    patched = apply(hunks(script), (source(SOURCE_FILES[script]) / script).read_text())
    compile(patched, script, "exec")


# Its train() needs no CUDA apart from these three.
SIMSIAM_ON_CPU = """
import torch
torch.nn.Module.cuda = lambda self, device=None: self
torch.cuda.set_device = lambda device: None
torch.nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(lambda cls, module: module)
"""


def test_simsiam_trains_with_it_on_two_ranks(tmp_path):
    folder = source("simsiam")
    patched = apply(hunks("main_simsiam.py"), (folder / "main_simsiam.py").read_text())
    (tmp_path / "main.py").write_text(SIMSIAM_ON_CPU + patched)
    save_digits(tmp_path / "data" / "train" / "all", 32)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (
        f"{tmp_path}/data --arch resnet18 --dim 32 --pred-dim 8 --epochs 1 --batch-size 8 "
        f"--workers 0 --fix-pred-lr --world-size 2 --dist-backend gloo "
        f"--dist-url tcp://127.0.0.1:{port} --rank"
    ).split()
    (tmp_path / "other").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, tmp_path / "main.py", *options, str(rank)],
            cwd=tmp_path if rank == 0 else tmp_path / "other",  # both save checkpoints
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    states = [
        torch.load(path / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
        for path in (tmp_path, tmp_path / "other")
    ]
    assert int(states[0]["module.predictor.step_count"]) == 2
    weights = [state["module.predictor.weight"] for state in states]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.eye(32))


PYTORCH_BYOL_ON_DIGITS = """
import torchvision, types, yaml, sys
torchvision.datasets.STL10 = lambda root, split, download, transform: (
    torchvision.datasets.ImageFolder("data", transform)
)
load = yaml.load
def smaller(*args, **options):
    config = load(*args, **options)
    config["trainer"] |= {"max_epochs": 1, "batch_size": 8, "num_workers": 0}
    config["data_transforms"]["input_shape"] = "(32, 32, 3)"
    return config
yaml.load = smaller
class Writer:
    log_dir = "."
    def add_scalar(self, *args, **options): pass
    add_image = add_scalar
sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=Writer)
"""


def test_pytorch_byol_trains_with_it(tmp_path):
    folder = source("pytorch_byol")
    for name in ("data", "models", "config", "trainer.py", "utils.py"):
        copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy(folder / name, tmp_path / name)
    save_digits(tmp_path / "data" / "all", 16)
    patched = apply(hunks("main.py"), (folder / "main.py").read_text())
    (tmp_path / "main.py").write_text(PYTORCH_BYOL_ON_DIGITS + patched + CHECK)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def save_digits(folder, count):
    torchvision = pytest.importorskip("torchvision")
    folder.mkdir(parents=True)
    for index, image in enumerate(views(0, 32, count)[0]):
        torchvision.utils.save_image(image, folder / f"{index}.jpg")


def test_a_diff_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="0 places"):
        apply([" nothing\n+new"], "text\n")
    assert apply([" a\n-b\n+c"], "a\nb\n") == "a\nc\n"
