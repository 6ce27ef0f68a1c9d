"""Files for other programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.export import save_backbone, save_features
from directpred.reference_trainers.networks import resnet, small_encoder
from directpred.reference_trainers.probes import Split


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        content: dict[str, str] = file.metadata()
    return content


def splits() -> dict[str, Split]:
    return {
        "train": Split(torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.arange(6)),
        "held_out": Split(torch.randn(2, 3).bfloat16(), torch.tensor([1, 0], dtype=torch.int32)),
    }


@pytest.fixture
def encoder() -> torchvision.models.ResNet:
    encoder = resnet("resnet18", "imagenet").to(memory_format=torch.channels_last)
    encoder(torch.randn(2, 3, 32, 32))  # moves the statistics of the normalisations
    return encoder.eval()


def test_torchvision_loads_a_backbone(encoder: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(encoder, path)
    assert metadata(path) == {"format": "pt", "arch": "resnet18", "stem": "imagenet"}

    model = torchvision.models.resnet18()
    lacking = model.load_state_dict(load_file(path), strict=False)
    assert lacking.missing_keys == ["fc.weight", "fc.bias"]
    assert not lacking.unexpected_keys

    model.fc = nn.Identity()
    model.load_state_dict(load_file(path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), encoder(images))


def test_a_classifier_is_left_out(tmp_path: Path) -> None:
    save_backbone(torchvision.models.resnet18(), tmp_path / "with_fc")
    assert not [name for name in load_file(tmp_path / "with_fc") if name.startswith("fc")]


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_the_metadata_tell_the_architecture(arch: str, tmp_path: Path) -> None:
    save_backbone(resnet(arch, "cifar").half(), tmp_path / "backbone")
    assert metadata(tmp_path / "backbone") == {"format": "pt", "arch": arch, "stem": "cifar"}


def test_nothing_is_said_of_an_unknown_resnet(tmp_path: Path) -> None:
    block = torchvision.models.resnet.BasicBlock
    encoder = torchvision.models.ResNet(block, [1, 1, 1, 1])
    encoder.maxpool = nn.Identity()  # with the 7×7 convolution
    save_backbone(encoder, tmp_path / "backbone")
    assert metadata(tmp_path / "backbone") == {"format": "pt"}


def test_any_other_encoder(tmp_path: Path) -> None:
    encoder = small_encoder(1, 4, "cifar")
    encoder.register_buffer("shared", encoder[0].weight.detach())
    save_backbone(encoder, tmp_path / "backbone")
    assert metadata(tmp_path / "backbone") == {"format": "pt"}
    loaded = load_file(tmp_path / "backbone")
    state: dict[str, Tensor] = encoder.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_saving_changes_neither_the_encoder_nor_the_generator(
    encoder: nn.Module, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    save_backbone(encoder, tmp_path / "backbone")
    assert torch.equal(torch.get_rng_state(), before)
    weight = encoder.get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_features_are_read_by_numpy(tmp_path: Path) -> None:
    path = tmp_path / "features.npz"
    given = splits()
    save_features(path, **given)
    with np.load(path) as content:
        arrays = dict(content)
    assert list(arrays) == [
        "train_features",
        "train_labels",
        "held_out_features",
        "held_out_labels",
    ]
    for name, (features, labels) in given.items():
        assert arrays[f"{name}_features"].dtype == np.float32
        assert arrays[f"{name}_labels"].dtype == np.int64
        np.testing.assert_array_equal(arrays[f"{name}_features"], features.detach().float())
        np.testing.assert_array_equal(arrays[f"{name}_labels"], labels)
    assert os.listdir(tmp_path) == ["features.npz"]


def test_a_split_may_be_called_path_or_file(tmp_path: Path) -> None:
    some = Split(torch.ones(1, 1), torch.ones(1))
    save_features(tmp_path / "features.npz", path=some, file=some)
    with np.load(tmp_path / "features.npz") as content:
        assert len(content.files) == 4


def test_labels_must_match_features(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train has 3 features and 2 labels"):
        save_features(tmp_path / "features.npz", train=Split(torch.ones(3, 1), torch.ones(2)))
    assert not os.listdir(tmp_path)


SAVES: dict[str, Callable[[Path], None]] = {
    "backbone": lambda path: save_backbone(nn.Linear(2, 2), path),
    "features": lambda path: save_features(path, **splits()),
}
every_save = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


@every_save
def test_where_nothing_can_be_written(save: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "it", tmp_path / "file" / "it", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: "):
            save(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@every_save
def test_a_folder_without_permission(save: Callable[[Path], None], tmp_path: Path) -> None:
    (folder := tmp_path / "locked").mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match=f"cannot write {folder / 'it'}: Permission denied"):
        save(folder / "it")


@every_save
@pytest.mark.parametrize(
    ("failure", "raised"), [(OSError(28, "No space left"), UserError), (KeyboardInterrupt(), None)]
)
def test_a_failure_leaves_the_old_file(
    save: Callable[[Path], None],
    failure: BaseException,
    raised: type[BaseException] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise failure

    path = tmp_path / "it"
    path.write_text("old")
    monkeypatch.setattr("safetensors.torch.save", fail)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(raised or type(failure)) as caught:
        save(path)
    if raised:
        assert str(caught.value) == f"cannot write {path}: No space left"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it"]


@every_save
def test_an_old_file_is_replaced(save: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    save(path)
    assert path.stat().st_size > 3
    assert os.listdir(tmp_path) == ["it"]
