"""What is measured of a model, before training and every few epochs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn

from directpred.metrics import alignment, effective_rank, spread
from directpred.reference_trainers.byol import BYOL
from directpred.reference_trainers.data import Data, Split
from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.probe import knn, linear_probe
from directpred.torch import DirectPredHead

Measurement: TypeAlias = dict[str, float | list[float]]
"""One value, or one for each of the d dimensions, by the name of the metric."""


@torch.no_grad()
def measure(model: BYOL, data: Data) -> Measurement:
    """Evaluate the frozen model.

    ``probe`` and ``knn`` are top-1 in percent on the encoder's features; ``spread`` and
    ``effective_rank`` describe the features that enter the predictor, on the held-out images.
    ``alignment`` is between the predictor and the correlation of these features, for predictors
    that are a matrix. A DirectPred head has its eigenvalues told too, ``correlation_eigenvalues``
    of F̂ and ``weight_eigenvalues``. All vectors are in ascending order of the correlation's
    eigenvalues.

    Args:
        model: Its mode is left as it was.
        data: Images on the model's device.

    Returns:
        Plain numbers by name.

    Raises:
        UserError: The features are not finite: training has diverged.
    """
    training = model.training
    model.eval()
    train, test = (model.online.encoder(split.inputs) for split in data)
    z = model.online.projector(test)
    model.train(training)
    if not (train.isfinite().all() and z.isfinite().all()):
        raise UserError("training diverged: the features are not finite (try a lower lr)")

    features = Split(train, data.train.labels), Split(test, data.test.labels)
    correlation = z.T @ z / len(z)
    measured: Measurement = {
        "probe": linear_probe(*features),
        "knn": knn(*features),
        "spread": float(spread(z)),
        "effective_rank": float(effective_rank(correlation)),
    }
    if isinstance(model.predictor, nn.Linear):
        measured["alignment"] = alignment(model.predictor.weight.T, correlation).tolist()
    if isinstance(model.predictor, DirectPredHead):
        measured["alignment"] = alignment(model.predictor.weight, correlation).tolist()
        measured["correlation_eigenvalues"] = _spectrum(model.predictor.correlation)
        measured["weight_eigenvalues"] = _spectrum(model.predictor.weight)
    return measured


def _spectrum(matrix: Tensor) -> list[float]:
    eigenvalues: list[float] = torch.linalg.eigvalsh(matrix).tolist()
    return eigenvalues


class Monitor(L.Callback):
    """Measures the model in training; a checkpoint keeps what was measured so far.

    Args:
        data: The data set.
        report: Called with the number of each epoch that is done and, where the model was
            evaluated after it, the measurement.

    Attributes:
        history: One measurement for each evaluated epoch, with the keys ``epoch`` and, after
            training, ``loss``, the mean over the epoch's steps. Epoch 0 is before training.
    """

    def __init__(self, data: Data, report: Callable[[int, Measurement | None], None]) -> None:
        self.data, self.report = data, report
        self.history: list[Measurement] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the untrained model."""
        if not self.history:
            self._evaluate(pl_module, epoch=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Remember the loss."""
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model where its turn has come."""
        epoch = trainer.current_epoch + 1
        assert isinstance(pl_module, BYOL)
        if epoch % pl_module.recipe.evaluate_every == 0 or epoch == trainer.max_epochs:
            self._evaluate(pl_module, epoch, loss=sum(self.losses) / len(self.losses))
        else:
            self.report(epoch, None)
        self.losses = []

    def _evaluate(self, model: Any, epoch: int, **extra: float) -> None:
        measured: Measurement = {"epoch": epoch, **extra, **measure(model, self.data)}
        self.history.append(measured)
        self.report(epoch, measured)

    def state_dict(self) -> dict[str, Any]:
        """What was measured, and the losses of an epoch that is not done."""
        return {"history": list(self.history), "losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self.history, self.losses = state_dict["history"], state_dict["losses"]
