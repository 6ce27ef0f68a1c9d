"""facebookresearch/moco-v3, ResNet and ViT, from its source: models, LARS, scaler, main_moco.py."""

import os
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import torch.distributed as dist  # noqa: E402

from compare_lightly import apply, hunks  # noqa: E402
from directpred.torch import replace_predictor, restore  # noqa: E402
from peers import importable, record, source, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*GradScaler"),
    pytest.mark.filterwarnings("ignore:.*indexing argument"),
]

# It was written for timm 0.4.9, which torch 2 cannot import: what has other names since.
TIMM = """
import sys, types, warnings
warnings.simplefilter("ignore")
import timm.layers, timm.models.vision_transformer as vit
helpers = types.ModuleType("timm.models.layers.helpers")
helpers.to_2tuple = timm.layers.to_2tuple
sys.modules["timm.models.layers.helpers"] = helpers
vit.VisionTransformer.num_tokens = property(
    lambda self: self.num_prefix_tokens, lambda self, value: None
)
"""


@pytest.fixture
def alone(monkeypatch):
    """A process group of one rank, which its loss asks for, and labels that stay on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    yield
    dist.destroy_process_group()


def build(kind):
    torch.manual_seed(0)
    folder = source("moco_v3")
    with importable(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(TIMM, {})
        import vits
        from moco.builder import MoCo_ResNet, MoCo_ViT
        from moco.optimizer import LARS
    if kind == "resnet":
        torchvision = pytest.importorskip("torchvision")
        encoder = partial(torchvision.models.resnet18, zero_init_residual=True)
        model = MoCo_ResNet(encoder, 16, 32, 1.0)
    else:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model = MoCo_ViT(partial(vits.VisionTransformerMoCo, **sizes), 16, 32, 0.2)
    return model, LARS(model.parameters(), 0.3, weight_decay=1e-6, momentum=0.9)


def train(model, optimizer, steps=6):
    """The step of its `train()`."""
    scaler = torch.cuda.amp.GradScaler()
    losses = []
    for step in range(steps):
        with torch.cuda.amp.autocast(True):
            loss = model(*views(step, 32), 0.99)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("given", [True, False])
def test_the_weight_is_that_of_the_features(kind, given, alone):
    model, optimizer = build(kind)
    learned = model.predictor
    parameters = set(learned.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = replace_predictor(model, optimizer if given else None)
    # The predictor of the ViT ends in a batch normalisation, which is said.
    assert ["ended in BatchNorm1d" in str(w.message) for w in caught] == [True] * (kind == "vit")
    assert model.predictor is head
    assert parameters.isdisjoint(p for group in optimizer.param_groups for p in group["params"])
    batches = record(head)
    losses = train(model, optimizer)
    assert int(head.step_count) == 6
    assert {len(batch) for batch in batches} == {2}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-3)
    assert np.isfinite(losses).all()
    assert restore(model) is learned
    train(model, optimizer, 1)


# Its main() trains without CUDA too, but for the labels; the pictures are 224 wide.
ON_CPU = f"""
{TIMM}
import torch
torch.Tensor.cuda = lambda self, *args, **kwargs: self
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
import vits
def vit_small(**options):
    return vits.VisionTransformerMoCo(patch_size=32, embed_dim=64, depth=1, num_heads=2, **options)
vits.vit_small = vit_small
"""


@pytest.mark.parametrize("arch", ["resnet18", "vit_small"])
def test_its_main_trains_with_the_diff(arch, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("tensorboard")
    folder = source("moco_v3")
    patched = apply(hunks("main_moco.py"), (folder / "main_moco.py").read_text())
    (tmp_path / "main.py").write_text(ON_CPU + patched)
    images = tmp_path / "data" / "train" / "all"
    images.mkdir(parents=True)
    for index, image in enumerate(views(0, 64, 8)[0]):
        torchvision.utils.save_image(image, images / f"{index}.png")
    options = (
        f"{tmp_path}/data -a {arch} --moco-dim 16 --moco-mlp-dim 32 --epochs 1 --warmup-epochs 0 "
        "-b 4 --workers 0 --rank 0"
    )
    done = subprocess.run(
        [sys.executable, "main.py", *options.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / "checkpoint_0000.pth.tar", weights_only=True)["state_dict"]
    assert int(state["predictor.step_count"]) == 2
    assert not torch.equal(state["predictor.weight"], torch.eye(16))
