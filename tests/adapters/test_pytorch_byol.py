"""The `BYOLTrainer` of PyTorch-BYOL and of luckmatters, run from their sources."""

import contextlib
import importlib
import os
import sys
import types

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from directpred.adapters import pytorch_byol  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402
from peers import record, source, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchvision"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Digits(torch.utils.data.Dataset):
    """Both views of 32 digits; luckmatters asks for a third."""

    def __init__(self, count):
        self.views = [view.repeat(1, 1, 2, 2) for view in views(0, rows=32)][:2]
        self.views += [self.views[0]] * (count - 2)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return [view[index] for view in self.views], 0


@contextlib.contextmanager
def imported(folder, *names):
    """Modules of a checkout, which has names as common as `data` and `models`."""
    before, here = dict(sys.modules), os.getcwd()
    sys.path[:0] = [str(folder), str(folder.parent)]
    os.chdir(folder)
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        os.chdir(here)
        del sys.path[:2]
        for name in set(sys.modules) - set(before):
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


class Writer:
    """For the SummaryWriter: what is logged is not looked at."""

    def __init__(self, folder):
        self.log_dir = str(folder)
        self.losses = []

    def add_scalar(self, name, value, global_step):
        self.losses.append(float(getattr(value, "detach", lambda: value)()))

    def add_image(self, *args, **kwargs):
        pass


def tensorboard(monkeypatch, folder):
    # tensorboard itself is not installed with the tests.
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = lambda *args: Writer(folder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)


def sthalles(folder, epochs=10):
    """As its main.py puts the trainer together, with small layers."""
    torch.manual_seed(0)
    with imported(
        source("pytorch_byol"), "trainer", "models.mlp_head", "models.resnet_base_network"
    ) as (
        trainer,
        mlp_head,
        network,
    ):
        head = {"mlp_hidden_size": 32, "projection_size": 16}
        online, target = (network.ResNet18(name="resnet18", projection_head=head) for _ in range(2))
        predictor = mlp_head.MLPHead(in_channels=online.projetion.net[-1].out_features, **head)
        optimizer = torch.optim.SGD(
            [*online.parameters(), *predictor.parameters()], lr=0.03, momentum=0.9
        )
        params = {"m": 0.9, "batch_size": 16, "num_workers": 0, "checkpoint_interval": 5000}
        return trainer.BYOLTrainer(
            online, target, predictor, optimizer, "cpu", max_epochs=epochs, **params
        )


def luckmatters(folder, epochs=10, **changes):
    """As its main.py puts the trainer together, by its own configuration."""
    yaml = pytest.importorskip("yaml")
    torch.manual_seed(0)
    root = source("luckmatters") / "ssl" / "real-dataset"
    config = yaml.safe_load((root / "config" / "byol_config.yaml").read_text())
    params = config["trainer"] | {
        "predictor_reg": None,
        "batch_size": 16,
        "num_workers": 0,
        "max_epochs": epochs,
        "evaluator": None,
    }
    params |= changes
    names = "byol_trainer", "models.mlp_head", "models.resnet_base_network"
    with imported(root, *names) as (trainer, mlp_head, network):
        head = {"mlp_hidden_size": 32, "projection_size": 16}
        specs = {name: config["network"][name] for name in ("bn_spec", "conv_spec")}
        online, target = (
            network.ResNet18(
                "cifar10",
                params["projector_params"],
                name="resnet18",
                projection_head=head,
                **specs,
            )
            for _ in range(2)
        )
        predictor = mlp_head.MLPHead(16, **head, options=params["predictor_params"])
        return trainer.BYOLTrainer(
            str(folder),
            online,
            target,
            predictor,
            torch.optim.SGD(online.parameters(), lr=0.03, momentum=0.9),
            torch.optim.SGD(predictor.parameters(), lr=0.03, momentum=0.9),
            "cpu",
            **params,
        )


@pytest.fixture(params=[sthalles, luckmatters], ids=lambda make: make.__name__)
def make(request, tmp_path, monkeypatch):
    tensorboard(monkeypatch, tmp_path)
    # luckmatters multiplies its batch size by the number of GPUs.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (tmp_path / "checkpoints").mkdir()

    def made(**options):
        trainer = request.param(tmp_path, **options)
        trainer.data = Digits(3 if request.param is luckmatters else 2)
        return trainer

    return made


def parameters(optimizer):
    return {p for group in optimizer.param_groups for p in group["params"]}


def test_the_weight_is_that_of_the_features_and_the_loss_falls(make, tmp_path):
    trainer = make()
    learned = set(trainer.predictor.parameters())
    head = pytorch_byol.replace_predictor(trainer)
    assert learned.isdisjoint(parameters(trainer.optimizer))
    if hasattr(trainer, "predictor_optimizer"):
        assert not parameters(trainer.predictor_optimizer)
    batches = record(head)
    trainer.train(trainer.data)
    assert int(head.step_count) == 20
    assert {len(batch) for batch in batches} == {2}
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(head.weight, expected, atol=1e-4)
    losses = trainer.writer.losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_its_own_checkpoint_and_that_of_the_head_hold_the_state(make, tmp_path):
    trainer, again = make(epochs=1), make(epochs=1)
    head = pytorch_byol.replace_predictor(trainer)
    trainer.train(trainer.data)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    file = next(path for name in ("model", "model_final")
                if (path := tmp_path / "checkpoints" / f"{name}.pth").exists())  # fmt: skip
    saved = torch.load(file, weights_only=True)
    other = pytorch_byol.replace_predictor(again)
    # PyTorch-BYOL saves no predictor, learned or not; luckmatters does.
    other.load_state_dict(
        saved.get("predictor_state_dict") or torch.load(tmp_path / "head.pt", weights_only=True)
    )
    again.online_network.load_state_dict(saved["online_network_state_dict"])
    again.target_network.load_state_dict(saved["target_network_state_dict"])
    again.optimizer.load_state_dict(saved["optimizer_state_dict"])
    for one in (trainer, again):
        loss = one.update(*one.data[:16][0][:2])
        one.optimizer.zero_grad()
        loss.backward()
        one.optimizer.step()
        one.last = loss.item()
    assert trainer.last == again.last
    assert torch.equal(head.weight, other.weight)
    assert int(other.step_count) == 3


def test_undo(make):
    trainer = make(epochs=1)
    predictor, before = trainer.predictor, parameters(trainer.optimizer)
    pytorch_byol.replace_predictor(trainer)
    assert isinstance(trainer.predictor, DirectPredHead)
    assert pytorch_byol.restore(trainer) is predictor is trainer.predictor
    assert parameters(trainer.optimizer) == before
    trainer.train(trainer.data)


def test_a_trainer_that_sets_its_predictor_is_an_error(tmp_path, monkeypatch):
    tensorboard(monkeypatch, tmp_path)
    trainer = luckmatters(tmp_path, predictor_reg="corr")
    with pytest.raises(ValueError, match="predictor_reg='corr'"):
        pytorch_byol.replace_predictor(trainer)


def test_no_such_trainer_is_an_error():
    with pytest.raises(TypeError, match="Linear with NoneType, NoneType"):
        pytorch_byol.replace_predictor(nn.Linear(2, 2))
