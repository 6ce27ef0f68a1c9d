"""The command ``directpred evaluate``: linear probe and k-NN of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.table import Table

from . import checkpoint, records
from .datasets import load
from .export import save_backbone, save_features
from .monitor import extract, measure
from .probes import Split
from .progress import open_console
from .train import fixed_threads


def evaluate(
    path: Path,
    data: Path | None = None,
    download: bool = False,
    workers: int = 0,
    features: Path | None = None,
    backbone: Path | None = None,
) -> None:
    """Measure the model of a checkpoint; print a table and write ``PATH.evaluation.json``.

    Args:
        path: A checkpoint of ``directpred train`` or ``directpred compare``.
        data: Directory of the data set; by default that of the training.
        download: Whether to download what is missing there.
        workers: Processes that decode files.
        features: Where to write the encoder's features, if at all.
        backbone: Where to write the encoder's weights, if at all.

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
    dataset = load(model.recipe.dataset, data, download)
    with fixed_threads(model.recipe.threads):
        measured = measure(model, dataset, workers)
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
