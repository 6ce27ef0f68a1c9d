"""Whole runs: real images, other data sets at their full size, ranks, and a run that is killed."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_datasets import archive
from test_parts import CONFIGS, config

from directpred.reference_trainers.cli import main
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.train import Machine, fit

COMMAND = Path(sys.executable).with_name("directpred")


def pictures(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    for index in range(count):
        pixels = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{index}.JPEG")


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of small JPEGs, as CIFAR-10's."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("test", 4)):
        for name in "abcdefghij":
            pictures(root / split / name, count, 32)
    return root


@pytest.mark.parametrize("images", ["real", "generated"])
def test_cifar10_end_to_end(images: str, folder: Path, tmp_path: Path) -> None:
    """The published recipe on a few images; the real ones where their archive is at hand."""
    if images == "real":
        folder = tmp_path / "cifar"
        with tarfile.open(archive()) as file:
            few = [m for m in file if m.name.rpartition("/")[2].startswith("000")]
            file.extractall(folder, few, filter="data")
    options = "--config cifar10 --device cpu --precision 32 --epochs 1 --batch-size 32"
    directory = ["--out", str(tmp_path), "--name", "run"]
    assert main(["train", *options.split(), "--data", str(folder), *directory]) == 0
    measured = {(row["epoch"], row["metric"]) for row in metrics(tmp_path / "run")}
    assert {("0", "probe"), ("1", "probe_best"), ("1", "knn_top5"), ("1", "loss")} <= measured
    assert (tmp_path / "run" / "log" / "metrics.csv").stat().st_size
    assert any((tmp_path / "run" / "tensorboard").glob("events*"))

    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    backbone, features = tmp_path / "backbone.safetensors", tmp_path / "features.npz"
    written = ["--backbone", str(backbone), "--features", str(features)]
    assert main(["evaluate", "--checkpoint", checkpoint, *written]) == 0  # it knows the images
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.load_state_dict(load_file(backbone))
    assert np.load(features)["test_features"].shape == (100 if images == "real" else 40, 512)


def test_a_folder_without_labels(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(dataset="folder", epochs=1, batch_size=8, size=32, crop=0.2)
    run = fit(recipe, tmp_path / "run.ckpt", machine=Machine(folder / "train" / "a"))
    assert "probe" not in run.history[-1]
    assert 0 < float(run.history[-1]["spread"]) < 2  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["stl10", "imagenet_60", "simsiam_imagenet"])
def test_a_step_at_full_size(name: str, tmp_path: Path) -> None:
    """One optimisation step of the published recipe but for the number of images in a batch."""
    images = tmp_path / "images"
    if name == "stl10":
        binary = images / "stl10_binary"
        binary.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for split, count in (("train", 10), ("test", 10), ("unlabeled", 6)):
            rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(
                binary / f"{split}_X.bin"
            )
            if split != "unlabeled":
                np.arange(1, 11, dtype=np.uint8).tofile(binary / f"{split}_y.bin")
        (binary / "class_names.txt").write_text("\n".join("abcdefghij"))
    else:
        for split in ("train", "val"):
            for wordnet in ("n01440764", "n01443537"):
                pictures(images / split / wordnet, 2, 256)
    published = config(name)
    options = {
        name: getattr(published, name)
        for name in Recipe.__dataclass_fields__
        if name not in ("device", "precision", "batch_size", "epochs", "warmup")
    }
    recipe = Recipe(**options, batch_size=4, epochs=1)
    if name == "stl10":
        recipe = Recipe(**options, batch_size=16, epochs=1)
    run = fit(recipe, tmp_path / "run.ckpt", machine=Machine(images))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert int(saved["state_dict"]["predictor.step_count"]) == 1
    assert np.isfinite(run.history[-1]["loss"])  # type: ignore[arg-type]
    if name == "imagenet_60":  # its linear probe, with augmentation, is a command of its own
        checkpoint = str(tmp_path / "run.ckpt")
        assert main(["evaluate", "--checkpoint", checkpoint, "--epochs", "2"]) == 0
        result = json.loads((tmp_path / "run.ckpt.evaluation.json").read_text())
        assert 0 <= result["probe"] <= result["probe_best"] <= 100
        assert result["probe_top5"] == 100  # of two classes


def test_accumulated_passes_are_one_step(tmp_path: Path) -> None:
    fit(Recipe(epochs=1, batch_size=128, accumulate=4), tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["global_step"] == 10
    assert int(saved["state_dict"]["predictor.step_count"]) == 10


def test_half_precision_and_channels_last(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, precision="bf16", channels_last=True)
    run = fit(recipe, tmp_path / "run.ckpt", machine=Machine(keep_every=1))
    assert run.history[-1]["probe"] > 90  # type: ignore[operator]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("run.ckpt", "epoch-0001.ckpt", "epoch-0002.ckpt"),
    }


@pytest.mark.parametrize("launch", ["lightning", "torchrun"])
def test_two_processes(launch: str, tmp_path: Path) -> None:
    """The statistics are those of both ranks' images; the first rank writes the run."""
    arguments = ["train", "--epochs", "2", "--batch-size", "128", "--devices", "2"]
    arguments += ["--name", "both", "--out"]
    command = [str(COMMAND), *arguments, str(tmp_path)]
    if launch == "torchrun":
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        command = [torchrun, "--nproc-per-node", "2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = torch.load(tmp_path / "both" / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(saved["state_dict"]["predictor.step_count"]) == saved["global_step"] == 20
    last = [row for row in metrics(tmp_path / "both") if row["metric"] == "probe"][-1]
    assert float(last["value"]) > 90


def test_killed_at_a_random_step_it_continues_bit_for_bit(tmp_path: Path) -> None:
    options = ["train", "--epochs", "3", "--evaluate-every", "1", "--out"]
    assert main([*options, str(tmp_path), "--name", "whole"]) == 0
    running = subprocess.Popen(
        [str(COMMAND), *options, str(tmp_path), "--name", "killed"], stdout=subprocess.PIPE
    )
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        time.sleep(0.01)
        assert running.poll() is None
    time.sleep(random.uniform(0, 0.3))
    running.kill()
    running.communicate()
    assert main(["train", "--resume", str(checkpoint)]) == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_missing_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cifar10", "stl10", "imagenet_60", "fashion_mnist"):
        assert main(["train", "--config", name, "--data", str(tmp_path / "nowhere")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") <= 12
        assert "nowhere" in error
    assert main(["train", "--config", "cifar10"]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_damaged_image_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "images" / "broken.jpg"
    pictures(tmp_path / "images", 8, 32)
    broken.write_bytes((tmp_path / "images" / "0.JPEG").read_bytes()[:400])
    recipe = Recipe(dataset="folder", epochs=1, batch_size=9, size=32, crop=0.2)
    with pytest.raises(Exception, match=r"broken\.jpg"):
        fit(recipe, tmp_path / "run.ckpt", machine=Machine(tmp_path / "images"))


def test_configs_are_complete() -> None:
    names = {path.name for path in CONFIGS.iterdir() if path.name.endswith(".yaml")}
    assert names == {
        *("digits.yaml", "fashion_mnist.yaml", "cifar10.yaml", "cifar10_300.yaml", "stl10.yaml"),
        *("stl10_300.yaml", "imagenet_60.yaml", "imagenet_300.yaml", "simsiam_imagenet.yaml"),
        "digits_mild.yaml",
    }
    for name in names:
        text = CONFIGS.joinpath(name).read_text("utf-8")
        assert text.startswith("# ")
        assert "ource" in text or name == "digits.yaml"
        Recipe.parse(yaml.safe_load(text))
