"""The monitor of collapse as a callback of Lightning, with any LightningModule."""

import copy
import csv
import logging
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from directpred.adapters.lightning import CollapseMonitor, DirectPredCallback  # noqa: E402
from directpred.metrics import diagnose  # noqa: E402
from directpred.monitor import CollapseWarning  # noqa: E402
from directpred.torch import DirectPredHead  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("error::directpred.monitor.CollapseWarning"),
]
STEPS = 12
FIGURES = ["spread", "effective_rank", "leading_share", "norm"]


class SimSiam(pl.LightningModule):
    """Records what its projector gives to every training pass."""

    def __init__(self, predictor=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"projector": nn.Linear(16, 8)})
        self.predictor = predictor or nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.outputs = []

    def training_step(self, batch, index):
        z = self.net["projector"](batch[0])
        self.outputs.append((self.global_step, z.detach().clone()))
        target = torch.roll(z, 1, 0).detach()
        return -torch.cosine_similarity(self.predictor(z), target).mean()

    def validation_step(self, batch, index):
        self.net["projector"](batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module, callbacks, folder, logger=False, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(STEPS * 40, 16)), 40)
    trainer = pl.Trainer(
        **{"max_epochs": 1} | options,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, data, data)
    return trainer


def logged(logger):
    """What a CSVLogger wrote of the projector, by step."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["net.projector/spread"]]
    names = {f"net.projector/{name}": name for name in FIGURES}
    return {int(row["step"]): {new: float(row[old]) for old, new in names.items()} for row in rows}


def test_every_logger_is_told_every_nth_step(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    module, monitor = SimSiam(), CollapseMonitor("net.projector", every=5)
    fit(module, [monitor], tmp_path, loggers)
    expected = {step + 1: diagnose(module.outputs[step][1]) for step in (0, 5, 10)}
    got = logged(loggers[0])
    assert list(got) == list(expected)
    for step, figures in expected.items():
        assert got[step] == pytest.approx(figures)
    assert monitor.latest == expected[11]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("net.projector/effective_rank")] == [1, 6, 11]
    assert not module.net["projector"]._forward_hooks


def test_steps_are_the_optimizers(tmp_path):
    module, logger = SimSiam(), CSVLogger(tmp_path)
    monitor = CollapseMonitor(module.net["projector"], every=2)
    fit(module, [monitor], tmp_path, logger, accumulate_grad_batches=3)
    first = {}
    for step, z in module.outputs:
        first.setdefault(step, z)
    assert sorted(first) == [0, 1, 2, 3]
    got = logged(logger)
    assert len(got) == 2
    assert [g["norm"] for g in got.values()] == pytest.approx(
        [diagnose(first[step])["norm"] for step in (0, 2)]
    )


@pytest.mark.parametrize("logger", [False, True])
def test_it_stands_beside_directpred_and_early_stopping(tmp_path, logger):
    module, monitor = SimSiam(DirectPredHead(8)), CollapseMonitor("net.projector", every=3)
    stop = EarlyStopping(
        "net.projector/spread", mode="max", stopping_threshold=0.5, check_on_train_epoch_end=True
    )
    trainer = fit(module, [DirectPredCallback(), monitor, stop], tmp_path, logger, max_epochs=4)
    assert trainer.current_epoch == 1  # it has spread enough, and stopped
    assert int(module.predictor.step_count) == STEPS
    assert set(trainer.callback_metrics) >= {f"net.projector/{name}" for name in FIGURES}
    assert float(trainer.callback_metrics["net.projector/spread"]) == pytest.approx(
        monitor.latest["spread"]
    )


def test_a_second_fit_goes_on(tmp_path):
    module, monitor = SimSiam(), CollapseMonitor("net.projector", every=100)
    for fits in (1, 2):
        fit(module, [monitor], tmp_path)
        assert monitor.latest == diagnose(module.outputs[(fits - 1) * STEPS][1])


def test_a_collapse_is_warned_of_by_the_modules_path(tmp_path):
    class Collapsing(SimSiam):
        def on_train_batch_start(self, batch, index):
            if self.global_step == 2:
                self.net["projector"].weight.data.mul_(1e-3)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CollapseWarning)
        fit(Collapsing(), [CollapseMonitor("net.projector", every=1)], tmp_path)
    messages = [str(x.message) for x in caught if x.category is CollapseWarning]
    assert len(messages) == 1
    assert messages[0].startswith("the outputs of net.projector have collapsed, all rows alike")


def test_what_cannot_be_watched_is_an_error(tmp_path):
    with pytest.raises(AttributeError, match="projektor"):
        fit(SimSiam(), [CollapseMonitor("projektor")], tmp_path)
    with pytest.raises(ValueError, match="the Linear to watch is no module of SimSiam"):
        fit(SimSiam(), [CollapseMonitor(nn.Linear(2, 2))], tmp_path)
    with pytest.raises(ValueError, match="every must be ≥ 1, got 0"):
        CollapseMonitor("projector", every=0)


def test_a_module_that_no_step_calls_is_told_of_once(tmp_path):
    """Lightning calls the LightningModule by its training_step, and no hook of it runs."""
    with pytest.warns(UserWarning, match="no training pass of SimSiam in 3 steps") as caught:
        fit(SimSiam(), [CollapseMonitor("", every=3)], tmp_path)
    assert sum("no training pass" in str(warning.message) for warning in caught) == 1


def test_it_is_copied_and_pickled(tmp_path):
    monitor = CollapseMonitor("net.projector", every=5)
    fit(SimSiam(), [monitor], tmp_path)
    for other in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        module = SimSiam()
        fit(module, [other], tmp_path)
        assert other.latest == diagnose(module.outputs[10][1])
        assert other.latest is not monitor.latest
