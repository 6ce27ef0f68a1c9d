"""What is measured of a model, before training and every few epochs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor, nn

from directpred.metrics import alignment, effective_rank, spread
from directpred.torch import DirectPredHead

from .batches import evaluation_batches
from .datasets import Dataset, Files, Memory
from .errors import UserError, warn
from .probes import Split, knn, linear_probe, logistic_regression
from .ranks import explained
from .siamese import Siamese
from .views import build_views

Measurement: TypeAlias = dict[str, float | list[float]]
"""One value, or one for each of the d dimensions, by the name of the metric."""

BATCH = 512
LOOK = 50
"""Passes from one look at whether the model is finite to the next: as often as losses are logged,
which waits for the device anyway."""
UNLABELLED = 10_000
"""Images of a set without labels that are looked at."""


def measure(model: Siamese, data: Dataset, workers: int = 0) -> Measurement:
    """Evaluate the frozen model.

    On the encoder's features of the labelled images, in percent: ``probe`` and ``probe_top5`` after
    the last epoch of the probe, ``probe_best`` after its best, and ``knn`` and ``knn_top5`` of the
    20, ``knn200`` of the 200 nearest neighbours. ``spread`` and ``effective_rank`` describe the
    features that enter the predictor, on the held-out images. ``alignment`` is between the
    predictor and the correlation of these features, for predictors that are a matrix. A DirectPred
    head has its eigenvalues told too, ``correlation_eigenvalues`` of F̂ and ``weight_eigenvalues``;
    of a learned linear predictor `of_linear` says what is. All vectors are in ascending order of
    the correlation's eigenvalues.

    Args:
        model: Its mode is left as it was.
        data: The data set; of one without labels only what needs none is measured.
        workers: Processes that decode files.

    Returns:
        Plain numbers by name.

    Raises:
        UserError: The features are not finite: training has diverged; or an image is unreadable.
    """
    held_out = data.test or data.train or data.pretrain
    features, z = extract(model, held_out, workers, limit=None if data.test else UNLABELLED)
    if not (features.isfinite().all() and z.isfinite().all()):
        raise UserError("training diverged: the features are not finite (try a lower lr)")
    measured: Measurement = {}
    if data.train is not None and data.test is not None and model.recipe.probe != "sgd":
        train = Split(extract(model, data.train, workers)[0], _labels(data.train, model))
        measured |= accuracies(
            train, Split(features, _labels(data.test, model)), len(data.classes), model.recipe.probe
        )
    correlation = z.T @ z / len(z)
    measured["spread"] = float(spread(z))
    measured["effective_rank"] = float(effective_rank(correlation))
    if isinstance(model.predictor, nn.Linear):
        measured |= of_linear(model.predictor.weight.detach(), model.online.projector, correlation)
    if isinstance(model.predictor, DirectPredHead):
        measured["alignment"] = alignment(model.predictor.weight, correlation).tolist()
        measured["correlation_eigenvalues"] = _spectrum(model.predictor.correlation)
        measured["weight_eigenvalues"] = _spectrum(model.predictor.weight)
    return measured


def of_linear(weight: Tensor, projector: nn.Module, correlation: Tensor) -> Measurement:
    """What a learned linear predictor has made of the eigenspaces of the features.

    With the eigenvectors u_j of the correlation, in ascending order of its eigenvalues:
    ``alignment`` as `directpred.metrics.alignment`; ``correlation_eigenvalues`` s_j;
    ``weight_diagonal``, p_j = u_jᵀ W_p u_j, the eigenvalues of an aligned predictor. The paper's
    Theorem 1 ties ``weight_norms``, ‖W_p u_j‖, to ``projector_norms``, ‖Wᵀ u_j‖ of the projector's
    last layer, W with the bias as a column, whatever the network in front of it (left out where a
    normalisation stands between them). A symmetric predictor has ``weight_eigenvalues`` besides, in
    their own ascending order.

    Args:
        weight: Of the `torch.nn.Linear`, (dim, dim).
        projector: Made by `networks.mlp`.
        correlation: Of the features that enter the predictor, (dim, dim).

    Returns:
        Vectors of dim values by name.
    """
    s, u = torch.linalg.eigh(correlation)
    measured: Measurement = {
        "alignment": alignment(weight.T, correlation).tolist(),
        "correlation_eigenvalues": s.tolist(),
        "weight_diagonal": (u * (weight @ u)).sum(0).tolist(),
        "weight_norms": (weight @ u).norm(dim=0).tolist(),
    }
    *_, last = projector.children()
    if isinstance(last, nn.Linear):
        layer = torch.cat([last.weight, last.bias[:, None]], dim=1).detach()
        measured["projector_norms"] = (layer.T @ u).norm(dim=0).tolist()
    if torch.equal(weight, weight.T):
        measured["weight_eigenvalues"] = _spectrum(weight)
    return measured


def accuracies(train: Split, test: Split, classes: int, protocol: str) -> Measurement:
    """Linear probe, by the protocol of that name, and nearest neighbours, in percent."""
    measured: Measurement = {}
    if protocol == "logistic":
        measured["probe"], measured["probe_top5"] = logistic_regression(train, test)
    else:
        result = linear_probe(train, test, classes)
        measured["probe"], measured["probe_top5"] = result.last
        measured["probe_best"] = result.best.top1
    if len(train.labels) >= 20:
        measured["knn"], measured["knn_top5"] = knn(train, test, classes, 20)
    if len(train.labels) >= 200:
        measured["knn200"] = knn(train, test, classes, 200).top1
    return measured


@torch.no_grad()
def extract(
    model: Siamese, source: Memory | Files, workers: int = 0, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """The encoder's features and the projections of images, in float32.

    Args:
        model: Its mode is left as it was.
        source: The images.
        workers: Processes that decode files.
        limit: Of how many, at most.

    Returns:
        (n, d) and (n, dim), on the model's device.
    """
    size, training = model.recipe.size, model.training
    plain = build_views(model.recipe, getattr(source, "maximum", 255), cropped=False).plain
    model.eval()
    features, projections, seen = [], [], 0
    for raw in evaluation_batches(source, size, resized(size), BATCH, workers):
        images = plain(raw.to(model.device)).contiguous(memory_format=model.memory_format)
        features.append(model.online.encoder(images))
        projections.append(model.online.projector(features[-1]))
        seen += len(raw)
        if limit is not None and seen >= limit:
            break
    model.train(training)
    return torch.cat(features).float(), torch.cat(projections).float()


def resized(size: int) -> int:
    """The shorter side of an image from which a centre of that size is evaluated: 256 for 224."""
    return round(size * 8 / 7)


def _labels(source: Memory | Files, model: Siamese) -> Tensor:
    assert source.labels is not None
    return source.labels.to(model.device)


def _spectrum(matrix: Tensor) -> list[float]:
    eigenvalues: list[float] = torch.linalg.eigvalsh(matrix).tolist()
    return eigenvalues


class Monitor(L.Callback):
    """Measures the model in training; a checkpoint keeps what was measured so far.

    It also sees to it that a model that is not finite is neither trained on for long nor saved. A
    loss that is not finite makes it so at that very step, but for a gradient scaler's.

    Args:
        data: The data set.
        workers: Processes that decode files.
        report: Called with the number of each epoch that is done and, where the model was
            evaluated after it, the measurement.

    Attributes:
        history: One measurement for each evaluated epoch, with the keys ``epoch`` and, after
            training, ``loss``, the mean over the epoch's steps. Epoch 0 is before training.
    """

    def __init__(
        self, data: Dataset, workers: int, report: Callable[[int, Measurement | None], None]
    ) -> None:
        self.data, self.workers, self.report = data, workers, report
        self.history: list[Measurement] = []
        self.losses: list[Tensor] = []
        self.skipped = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the untrained model."""
        self.losses = [x.to(pl_module.device) for x in self.losses]  # those of a resumed run
        if not self.history:
            self._evaluate(trainer, pl_module, epoch=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Remember the loss."""
        self.losses.append(outputs["loss"].detach())  # as it is: a number would wait for the device
        if len(self.losses) % LOOK == 0:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model where its turn has come."""
        epoch = trainer.current_epoch + 1
        assert isinstance(pl_module, Siamese)
        self._check(trainer, pl_module)
        self._tell_of_skipped(trainer, pl_module, epoch)
        if epoch % pl_module.recipe.evaluate_every == 0 or epoch == trainer.max_epochs:
            losses = torch.stack(self.losses).double()
            loss = float(losses[losses.isfinite()].mean())
            self._evaluate(trainer, pl_module, epoch, loss=loss)
        else:
            self.report(epoch, None)
        self.losses = []

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save a model that is not finite: it would take the place of one that is."""
        self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Raise a `UserError`, on all ranks, where the model is not finite."""
        state = [x for x in model.state_dict().values() if x.is_floating_point()]
        finite = bool(torch.stack([x.isfinite().all() for x in state]).all())
        if trainer.strategy.reduce_boolean_decision(finite):
            return
        passes = trainer.accumulate_grad_batches
        bad = [index // passes for index, x in enumerate(self.losses) if not x.isfinite()]
        last = trainer.global_step
        step = last - len(self.losses) // passes + 1 + bad[0] if bad else last
        first = trainer.strategy.reduce(
            torch.tensor(step, device=trainer.strategy.root_device), reduce_op="min"
        )
        raise UserError(
            f"training diverged at step {int(first)}: the weights are not finite (try a lower lr)"
        )

    def _tell_of_skipped(self, trainer: L.Trainer, model: Siamese, epoch: int) -> None:
        """Warn of the epoch's steps that were left out, by the correlation or a gradient scaler."""
        bad = int((~torch.stack(self.losses).isfinite()).sum())
        left_out = {"a loss that is not finite": bad}
        if isinstance(model.predictor, DirectPredHead):
            skipped = int(model.predictor.skipped)
            left_out["features that are not finite, left out of the correlation"] = (
                skipped - self.skipped
            )
            self.skipped = skipped
        for what, count in left_out.items():
            if count and trainer.is_global_zero:
                warn(f"epoch {epoch}: {count} {'step' if count == 1 else 'steps'} with {what}")

    def _evaluate(self, trainer: L.Trainer, model: Any, epoch: int, **extra: float) -> None:
        """Measure on the first rank, while the others wait; an error is raised on all of them."""
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                measured: Measurement = {"epoch": epoch, **extra}
                measured |= measure(model, self.data, self.workers)
                self.history.append(measured)
                self.report(epoch, measured)
                scalars = {name: x for name, x in measured.items() if isinstance(x, float)}
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=trainer.global_step)
            except Exception as error:
                failure = explained(error)
        told = trainer.strategy.broadcast(failure and (str(failure) or repr(failure)))
        if failure is not None:
            raise failure
        if told is not None:
            raise UserError(told)

    def state_dict(self) -> dict[str, Any]:
        """What was measured, and the losses of an epoch that is not done."""
        losses = [float(x) for x in self.losses]
        return {"history": list(self.history), "losses": losses, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken."""
        self.history = state_dict["history"]
        self.losses = [torch.tensor(x) for x in state_dict["losses"]]
        self.skipped = state_dict.get("skipped", 0)
