"""The command ``directpred evaluate``: linear probe and k-NN of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from directpred.reference_trainers import checkpoint, records
from directpred.reference_trainers.data import load
from directpred.reference_trainers.monitor import measure
from directpred.reference_trainers.progress import open_console
from directpred.reference_trainers.train import fixed_threads


def evaluate(path: Path) -> None:
    """Measure the model of a checkpoint; print a table and write ``PATH.evaluation.json``.

    Args:
        path: A checkpoint of ``directpred train`` or ``directpred compare``.

    Raises:
        UserError: The checkpoint is missing or something else.
    """
    content, model = checkpoint.read(path)
    with fixed_threads(model.recipe.threads):
        measured = measure(model, load(model.recipe.dataset))
    result = {name: value for name, value in measured.items() if isinstance(value, float)}
    result = {"step": content["global_step"], **result}

    table = Table(title=f"{model.recipe.predictor}, seed {model.recipe.seed}")
    for column in ("step", "linear probe, %", "k-NN, %", "spread", "effective rank"):
        table.add_column(column, justify="right")
    table.add_row(
        str(result["step"]),
        f"{result['probe']:.2f}",
        f"{result['knn']:.2f}",
        f"{result['spread']:.3f}",
        f"{result['effective_rank']:.2f}",
    )
    console = open_console()
    console.print(table)
    destination = path.with_name(path.name + ".evaluation.json")
    records.write(destination, json.dumps(result, indent=2) + "\n")
    console.print(f"written to {destination}", soft_wrap=True)
