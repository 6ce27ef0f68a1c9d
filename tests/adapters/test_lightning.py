"""Codebases that train by Lightning: the callback closes the steps of the head."""

import importlib
import logging
import subprocess
import sys

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from directpred.adapters.lightning import DirectPredCallback  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402
from peers import ROWS, LightlyBYOL, backbone, record, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
STEPS = 4
"""An epoch."""
OPTIM = {
    "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9},
    # The default schedule depends on the number of epochs: a run cut short would be another run.
    "scheduler": {"type": "StepLR", "step_size": 1000},
}


class Pairs(Dataset):
    """The two views of STEPS batches of digits, the same in every epoch."""

    def __init__(self, size):
        batches = [views(step, size) for step in range(STEPS)]
        self.first, self.second = (torch.cat(view) for view in zip(*batches, strict=True))

    def __len__(self):
        return len(self.first)

    def __getitem__(self, index):
        return self.first[index], self.second[index]


class Named(Pairs):
    """As stable-pretraining's MultiViewTransform delivers them."""

    def __getitem__(self, index):
        return {"views": [{"image": view} for view in super().__getitem__(index)]}


class Lightly(pl.LightningModule):
    """The LightningModule of a user of lightly."""

    def __init__(self, optimizers=1):
        super().__init__()
        self.peer = LightlyBYOL()
        self.model = self.peer.model
        self.classifier = nn.Linear(8, 10)
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, index):
        loss = self.peer.loss(*batch)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()[1]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        main = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        if self.automatic_optimization:
            return main
        return [torch.optim.SGD(self.classifier.parameters(), lr=0.1), main]


def lightly():
    torch.manual_seed(0)
    return Lightly()


def spt_module():
    """An `spt.Module` made of parts, with the forward function of BYOL."""
    spt = pytest.importorskip("stable_pretraining")
    from stable_pretraining.forward import byol

    torch.manual_seed(0)
    return spt.Module(
        forward=byol,
        backbone=spt.TeacherStudentWrapper(backbone()),
        projector=spt.TeacherStudentWrapper(nn.Linear(16, 8)),
        predictor=nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
        byol_loss=spt.losses.BYOLLoss(),
        optim=OPTIM | {},
    )


def spt_byol():
    return spt_method("BYOL", projector_dims=(32, 8), predictor_dims=(32, 8))


def spt_simsiam():
    return spt_method("SimSiam", projector_dim=8, predictor_hidden_dim=4)


def spt_method(name, **options):
    """A method class, trained as its docstring shows: the forward takes a batch and a stage."""
    spt = pytest.importorskip("stable_pretraining")

    class Trained(getattr(spt.methods, name)):
        def forward(self, batch, stage):
            output = super().forward(*(view["image"] for view in batch["views"]))
            self.log("loss", output.loss)
            return {"loss": output.loss}

    torch.manual_seed(0)
    module = Trained(backbone(), **options)
    module.optim = OPTIM | {}
    return module


MODULES = [lightly, spt_module, spt_byol, spt_simsiam]


@pytest.fixture(params=MODULES, ids=lambda build: build.__name__)
def build(request):
    return request.param


def swap(module, **options):
    name = "lightly" if isinstance(module, Lightly) else "stable_pretraining"
    pytest.importorskip(name)
    return importlib.import_module(f"directpred.adapters.{name}").replace_predictor(
        module, **options
    )


class Losses(pl.Callback):
    """Keeps the losses, and saves a checkpoint after the second epoch."""

    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def fit(module, epochs, folder, callback=None, checkpoint=None, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    losses = Losses()
    callbacks = [callback or DirectPredCallback(), losses]
    if not isinstance(module, Lightly):
        from stable_pretraining.callbacks import TeacherStudentCallback

        callbacks.append(TeacherStudentCallback())
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )
    data = Pairs(16) if isinstance(module, Lightly) else Named(16)
    trainer.fit(module, DataLoader(data, ROWS), ckpt_path=checkpoint)
    return trainer, losses.values


def test_the_weight_is_that_of_the_features_and_the_loss_falls(build, tmp_path):
    module = build()
    learned = set(module.parameters())
    head = swap(module)
    learned -= set(module.parameters())
    batches = record(head)
    trainer, losses = fit(module, 8, tmp_path)
    assert int(head.step_count) == 8 * STEPS == trainer.global_step
    assert {len(batch) for batch in batches} == {2}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-4)
    assert np.mean(losses[-STEPS:]) < np.mean(losses[:STEPS])
    assert learned
    (optimizer,) = trainer.optimizers
    assert learned.isdisjoint(p for group in optimizer.param_groups for p in group["params"])
    assert head._watch.followed() is None  # detached again


def test_a_checkpoint_in_the_middle_continues_identically(build, tmp_path):
    whole, resumed = build(), build()
    for module in (whole, resumed):
        swap(module)
    _, uninterrupted = fit(whole, 4, tmp_path / "whole")
    _, losses = fit(resumed, 4, tmp_path, checkpoint=tmp_path / "whole" / "middle.ckpt")
    assert losses == uninterrupted[2 * STEPS :]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("build", [lightly, spt_simsiam])
def test_accumulated_batches_are_one_step(build, tmp_path):
    module = build()
    head = swap(module)
    batches = record(head)
    options = {"accumulate_grad_batches": 2} if build is lightly else {}
    if build is not lightly:
        module.optim["frequency"] = 2
    fit(module, 2, tmp_path, **options)
    assert int(head.step_count) == STEPS
    assert [len(batch) for batch in batches] == [4] * STEPS
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-4)


def test_of_several_optimizers_one_must_be_chosen(tmp_path):
    pytest.importorskip("lightly")
    module = Lightly(optimizers=2)
    head = swap(module)
    with pytest.raises(ValueError, match="0: SGD of 2 tensors, 1: SGD"):
        fit(module, 1, tmp_path)
    with pytest.raises(ValueError, match="optimizer=2"):
        fit(module, 1, tmp_path, callback=DirectPredCallback(optimizer=2))
    fit(module, 1, tmp_path, callback=DirectPredCallback(optimizer=1))
    assert int(head.step_count) == STEPS


def test_a_module_without_a_head_is_an_error(tmp_path):
    pytest.importorskip("lightly")
    with pytest.raises(ValueError, match="no DirectPredHead in Lightly"):
        fit(lightly(), 1, tmp_path)


def test_every_head_of_the_module_is_closed(tmp_path):
    pytest.importorskip("lightly")
    module = lightly()
    first = swap(module)
    module.second = DirectPredHead(8)

    def also(head, args, output):
        return output + 0 * module.second(args[0])  # a gradient has to reach it

    first.register_forward_hook(also)
    fit(module, 1, tmp_path)
    assert int(first.step_count) == int(module.second.step_count) == STEPS
    torch.testing.assert_close(first.weight, module.second.weight)


ALONE = """
import sys
sys.modules["lightning"] = None  # as if it were not installed
import pytorch_lightning as pl, torch, warnings
from torch import nn
from torch.utils.data import DataLoader
from directpred.adapters.lightning import DirectPredCallback
from directpred.torch import replace_predictor

class BYOL(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.predictor = nn.Linear(6, 4), nn.Linear(4, 4)

    def training_step(self, batch, index):
        return self.predictor(self.encoder(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

model = BYOL()
head = replace_predictor(model)
options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
options |= dict(enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2)
trainer = pl.Trainer(callbacks=[DirectPredCallback()], **options)
trainer.fit(model, DataLoader(torch.randn(32, 6), 8))
print("steps", int(head.step_count))
"""


@pytest.mark.parametrize("missing", [True, False])
def test_pytorch_lightning_alone_is_enough(missing, tmp_path):
    """And its trainer takes the callback that was made of the other package's."""
    pytest.importorskip("pytorch_lightning")
    script = ALONE if missing else ALONE.replace('sys.modules["lightning"] = None', "pass")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "steps 2" in done.stdout, done.stderr[-2000:]
