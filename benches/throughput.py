"""Images a second of a training step and of each of its parts, as a table.

python benches/throughput.py cifar10 [--device cuda] [--batches 20] [option=value ...]

A step is the raw batch, the two views, the online network forward and backward, the target network,
and the predictor's update. Images are random bytes; the time is the median over batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.resources import files

import torch
import yaml
from rich.console import Console
from rich.table import Table

from directpred.reference_trainers.batches import MemoryBatches
from directpred.reference_trainers.datasets import Memory
from directpred.reference_trainers.optimizers import build_optimizer
from directpred.reference_trainers.recipe import Recipe
from directpred.reference_trainers.siamese import Siamese, follow
from directpred.reference_trainers.views import build_views
from directpred.torch import DirectPredHead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("options", nargs="*", metavar="option=value", help="of the recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=20)
    given = parser.parse_args()
    configs = files("directpred.reference_trainers").joinpath("configs")
    options = yaml.safe_load(configs.joinpath(f"{given.config}.yaml").read_text("utf-8"))
    recipe = Recipe.parse(options | dict(option.split("=") for option in given.options))
    torch.set_num_threads(recipe.threads)
    times = measure(recipe, given.device, given.batches)

    table = Table(title=f"{given.config}, {recipe.batch_size} images, {given.device}")
    for column in ("part", "ms", "images/s", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    whole = times["step"]
    for part, seconds in times.items():
        rate = f"{recipe.batch_size / seconds:,.0f}"
        table.add_row(part, f"{1e3 * seconds:.2f}", rate, f"{100 * seconds / whole:.0f} %")
    Console(width=72).print(table)


def measure(recipe: Recipe, device: str, batches: int) -> dict[str, float]:
    """Median seconds of each part and of the whole step, in this order."""
    channels = 1 if recipe.dataset in ("digits", "fashion_mnist") else 3
    shape = (max(2 * recipe.batch_size, 512), channels, recipe.size, recipe.size)
    source = Memory(torch.randint(0, 256, shape, dtype=torch.uint8), None)
    views = build_views(recipe, 255, cropped=False)
    model = Siamese(recipe, channels, 1, views).to(device).train()
    model.configure_model()
    optimizer = build_optimizer(recipe, model.online, model.predictor)
    half = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    parts: dict[str, list[float]] = {}

    def timed(part: str, run: Callable[[], object]) -> object:
        wait(device)
        started = time.perf_counter()
        result = run()
        wait(device)
        parts.setdefault(part, []).append(time.perf_counter() - started)
        return result

    loader = MemoryBatches(source, recipe.batch_size, 0, device)
    for _ in range(batches):
        raw = timed("data", lambda: next(iter(loader)))
        made = timed("augmentation", lambda raw=raw: views(*raw))
        view1, view2 = (v.contiguous(memory_format=model.memory_format) for v in made)
        with torch.autocast(device, half, enabled=half is not None):
            z1, z2 = timed("online forward", lambda v=(view1, view2): [model.online(x) for x in v])
            targets = (z1.detach(), z2.detach())
            if model.has_target:
                targets = timed("target forward", lambda v=(view1, view2): target(model, v))
            p1, p2 = timed("predictor forward", lambda z=(z1, z2): [model.predictor(x) for x in z])
            cos = torch.nn.functional.cosine_similarity
            loss = -cos(p1, targets[1]).mean() - cos(p2, targets[0]).mean()
        optimizer.zero_grad()
        timed("backward", loss.backward)
        timed("optimizer", optimizer.step)
        if model.has_target:
            timed("target update", lambda: follow(model.target, model.online, 0.99))
        if isinstance(model.predictor, DirectPredHead):
            timed("predictor update", model.predictor.step)
    medians = {part: statistics.median(times[2:]) for part, times in parts.items()}
    return medians | {"step": sum(medians.values())}


@torch.no_grad()
def target(model: Siamese, views: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [model.target(view) for view in views]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
