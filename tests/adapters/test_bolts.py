"""Lightning bolts: its BYOL and SimSiam from their source, in a pytorch_lightning trainer."""

import importlib
import logging
import sys
import types

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pl = pytest.importorskip("pytorch_lightning")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from directpred.adapters.lightning import DirectPredCallback  # noqa: E402
from directpred.torch import replace_predictor, restore  # noqa: E402
from peers import ROWS, backbone, record, source, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]
STEPS = 4
"""An epoch."""
PACKAGES = (
    *("", ".callbacks", ".optimizers", ".utils", ".models", ".models.self_supervised"),
    *(".models.self_supervised.byol", ".models.self_supervised.simsiam"),
)
"""Packages whose __init__ imports what needs pytorch_lightning 1; the modules in them do not."""


@pytest.fixture(params=["byol.byol_module", "simsiam.simsiam_module"])
def kind(request, monkeypatch):
    root = source("bolts") / "src" / "pl_bolts"
    for package in PACKAGES:
        stand_in = types.ModuleType(f"pl_bolts{package}")
        stand_in.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    stand_in = types.ModuleType("pl_bolts.utils.self_supervised")
    stand_in.torchvision_ssl_encoder = None  # an encoder is given
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    module = importlib.import_module(f"pl_bolts.models.self_supervised.{request.param}")
    yield module.BYOL if "byol" in request.param else module.SimSiam
    for name in [name for name in sys.modules if name.startswith("pl_bolts")]:
        monkeypatch.delitem(sys.modules, name)


class First(nn.Module):
    """Its encoders give a list."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone()

    def forward(self, x):
        return [self.backbone(x)]


def build(kind):
    torch.manual_seed(0)
    options = {"encoder_out_dim": 16, "projector_hidden_dim": 32, "projector_out_dim": 8}
    options |= {"predictor_hidden_dim": 8, "learning_rate": 0.01, "warmup_epochs": 1}
    return kind(base_encoder=First(), max_epochs=8, **options)


class Pairs(Dataset):
    def __init__(self):
        batches = [views(step) for step in range(STEPS)]
        self.views = [torch.cat(view) for view in zip(*batches, strict=True)]

    def __len__(self):
        return len(self.views[0])

    def __getitem__(self, index):
        return [view[index] for view in self.views], 0


def fit(module, folder, epochs=4, checkpoint=None, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[DirectPredCallback()],
        **options,
    )
    trainer.fit(module, DataLoader(Pairs(), ROWS), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_weight_is_that_of_the_features(kind, accumulated, tmp_path):
    module = build(kind)
    learned = module.predictor
    head = replace_predictor(module)
    assert module.predictor is head
    batches = record(head)
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulated)
    assert int(head.step_count) == 4 * STEPS // accumulated == trainer.global_step
    assert {len(batch) for batch in batches} == {2 * accumulated}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-3)
    assert restore(module) is learned


def test_its_checkpoints_go_on_and_load_where_the_class_replaces_its_predictor(kind, tmp_path):
    class Own(kind):
        def __init__(self, **options):
            super().__init__(**{**options, "base_encoder": First()})
            replace_predictor(self)

    whole, resumed = (build(Own) for _ in range(2))
    fit(whole, tmp_path)
    torch.manual_seed(0)
    fit(build(Own), tmp_path, 2).save_checkpoint(tmp_path / "middle.ckpt")
    trainer = fit(resumed, tmp_path, checkpoint=tmp_path / "middle.ckpt")
    if kind.__name__ == "SimSiam":  # its BYOL does not save where the target's momentum was
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(value, resumed.state_dict()[name], msg=name)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Own.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal(again.predictor.weight, resumed.predictor.weight)
    assert int(again.predictor.step_count) == 4 * STEPS
