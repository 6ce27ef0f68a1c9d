"""The command ``directpred evaluate``: linear probe and k-NN of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from rich.table import Table
from torch import Tensor, nn

from . import checkpoint, records
from .batches import evaluation_batches
from .datasets import Dataset, Files, Memory, load
from .export import save_backbone, save_features
from .imagenet_probe import ImageNetProbe
from .monitor import BATCH, Measurement, extract, measure, resized
from .probes import Split
from .progress import open_console
from .ranks import deaths_explained
from .recipe import Recipe
from .siamese import Siamese
from .train import (
    PRECISIONS,
    fixed_threads,
    quiet_lightning,
    training_batches,
    without_entry_points,
)
from .views import build_views


def evaluate(
    path: Path,
    data: Path | None = None,
    download: bool = False,
    workers: int = 0,
    features: Path | None = None,
    backbone: Path | None = None,
    epochs: int = 80,
) -> None:
    """Measure the model of a checkpoint; print a table and write ``PATH.evaluation.json``.

    Args:
        path: A checkpoint of ``directpred train`` or ``directpred compare``.
        data: Directory of the data set; by default that of the training.
        download: Whether to download what is missing there.
        workers: Processes that decode files.
        features: Where to write the encoder's features, if at all.
        backbone: Where to write the encoder's weights, if at all.
        epochs: Of the linear probe on ImageNet.

    Raises:
        UserError: The checkpoint is missing or something else, or a file cannot be written.
    """
    content, model = checkpoint.read(path)
    if backbone is not None:
        save_backbone(model.online.encoder, backbone)
    if data is None and content["data"] is not None:
        data = Path(content["data"])
    if model.recipe.device == "auto" and torch.cuda.is_available():
        model.to("cuda")
    dataset = load(model.recipe.dataset, data, download, model.recipe.validation)
    with fixed_threads(model.recipe.threads), deaths_explained():
        measured = measure(model, dataset, workers)
        if model.recipe.probe == "sgd" and dataset.train is not None and dataset.test is not None:
            measured |= train_probe(model, dataset, workers, epochs)
        if features is not None:
            splits = {"pretrain": dataset.pretrain, "train": dataset.train, "test": dataset.test}
            labelled = {
                name: Split(extract(model, source, workers)[0].cpu(), source.labels)
                for name, source in splits.items()
                if source is not None and source.labels is not None
            }
            save_features(features, **labelled)
    result = {name: value for name, value in measured.items() if isinstance(value, float)}
    result = {"step": content["global_step"], **result}

    table = Table(title=f"{model.recipe.predictor}, seed {model.recipe.seed}")
    rows = {
        "step": ("step", "{:.0f}"),
        "probe": ("linear probe, %", "{:.2f}"),
        "probe_best": ("best epoch's", "{:.2f}"),
        "probe_top5": ("top-5", "{:.2f}"),
        "knn": ("20-NN, %", "{:.2f}"),
        "knn_top5": ("top-5", "{:.2f}"),
        "knn200": ("200-NN, %", "{:.2f}"),
        "spread": ("spread", "{:.3f}"),
        "effective_rank": ("effective rank", "{:.2f}"),
    }
    shown = {name: column for name, column in rows.items() if name in result}
    for title, _ in shown.values():
        table.add_column(title, justify="right")
    table.add_row(*(form.format(result[name]) for name, (_, form) in shown.items()))
    console = open_console()
    console.print(table)
    destination = path.with_name(path.name + ".evaluation.json")
    records.write(destination, json.dumps(result, indent=2) + "\n")
    console.print(f"written to {destination}", soft_wrap=True)


def train_probe(model: Siamese, data: Dataset, workers: int, epochs: int) -> Measurement:
    """The linear probe of ImageNet: augmented images, SGD 0.2 for each 256 of them.

    Args:
        model: Its encoder is left as it is.
        data: With labelled images to train on and to test on.
        workers: Processes that decode files.
        epochs: Passes over the training images.

    Returns:
        ``probe`` and ``probe_top5`` after the last epoch and ``probe_best``, in percent.
    """
    assert data.train is not None and data.test is not None  # noqa: PT018
    recipe = model.recipe
    first = model.online.projector[0]
    assert isinstance(first, nn.Linear)
    lr = 0.2 * recipe.batch_size / 256
    probe = ImageNetProbe(
        model.online.encoder, first.in_features, len(data.classes), lr, recipe.seed
    )
    with quiet_lightning(), without_entry_points():
        trainer = L.Trainer(
            accelerator=recipe.device,
            devices=1,
            precision=PRECISIONS[recipe.precision],
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        device = trainer.strategy.root_device
        train = Labelled(recipe, data.train, workers, device)
        trainer.fit(probe, train, Evaluated(recipe, data.test, workers, device))
    best = max(accuracy.top1 for accuracy in probe.history)
    last = probe.history[-1]
    return {"probe": last.top1, "probe_top5": last.top5, "probe_best": best}


class Labelled:
    """Randomly cropped and mirrored images with their labels, one epoch an iteration."""

    def __init__(
        self, recipe: Recipe, source: Memory | Files, workers: int, device: torch.device
    ) -> None:
        assert source.labels is not None
        self.labels, self.device = source.labels.to(device), device
        self.batches = training_batches(recipe, source, device, workers=workers)
        views = replace(
            recipe,
            crop=0.08,
            flip=0.5,
            jitter_p=0.0,
            grayscale=0.0,
            blur=0.0,
            blur2=None,
            solarize=0.0,
            noise=0.0,
            brightness=0.0,
        )
        self.views = build_views(
            views, getattr(source, "maximum", 255), cropped=isinstance(source, Files)
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, normalised, (n, c, h, w), and labels (n,)."""
        _, rows = self.batches.order.rest()
        for row, raw in zip(rows.to(self.device), self.batches, strict=True):
            images, _ = self.views(*(view.to(self.device) for view in raw))
            yield images, self.labels[row]


class Evaluated:
    """The images of a source as they are evaluated, with their labels."""

    def __init__(
        self, recipe: Recipe, source: Memory | Files, workers: int, device: torch.device
    ) -> None:
        assert source.labels is not None
        self.batches = evaluation_batches(source, recipe.size, resized(recipe.size), BATCH, workers)
        self.labels, self.device = source.labels.split(BATCH), device
        maximum = getattr(source, "maximum", 255)
        self.plain = build_views(recipe, maximum, cropped=False).plain

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, normalised, (n, c, h, w), and labels (n,)."""
        for raw, labels in zip(self.batches, self.labels, strict=True):
            yield self.plain(raw.to(self.device)), labels.to(self.device)
