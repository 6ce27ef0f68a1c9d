"""Grids of options for ``directpred sweep``: the user's own, and the ablations of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from .errors import UsageError
from .recipe import Recipe

FIXED = {"seed": "--seeds", "dataset": "--data", "jitter": "--jitter"}
"""Options that do not vary, and what is for them instead."""


@dataclass(frozen=True)
class Grid:
    """Every combination of the values of some options.

    Attributes:
        name: Short, for files and the command line.
        title: What is asked.
        vary: The values of each option that varies; the last one varies fastest.
        given: Further options that its runs have other than the recipe of the sweep.
    """

    name: str
    title: str
    vary: Mapping[str, Sequence[Any]]
    given: Mapping[str, Any] = field(default_factory=dict)

    def points(self) -> Iterator[dict[str, Any]]:
        """The combinations."""
        for values in product(*self.vary.values()):
            yield dict(zip(self.vary, values, strict=True))

    def recipe(self, base: Recipe, point: Mapping[str, Any]) -> Recipe:
        """That of a combination: of the sweep, but for what is given and what varies."""
        return Recipe.parse(asdict(base) | dict(self.given) | dict(point))


def parse(texts: Sequence[str]) -> Grid:
    """The grid of ``--vary option=value,value --vary option=value``.

    Raises:
        UsageError: An option is unknown, comes twice or cannot vary, or a value is out of range.
    """
    vary: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise UsageError(f"--vary takes option=value,value, not {text!r}")
        if name in FIXED:
            raise UsageError(f"{name} cannot vary; {FIXED[name]} is the same for all runs")
        if name in vary:
            raise UsageError(f"--vary {name} is given twice")
        parsed = [getattr(Recipe.parse({name: value}), name) for value in values.split(",")]
        vary[name] = list(dict.fromkeys(parsed))
    return Grid("grid", ", ".join(vary), vary)


LEARNED, DECAYS = {"predictor": "linear"}, (0.0, 4e-4, 4e-3, 4e-2)

ABLATIONS = (
    Grid(
        "rate",
        "Learned linear predictor: its learning rate (α_p) and the weight decay of all",
        {"predictor_lr": (0.1, 0.3, 1.0, 3.0, 10.0), "weight_decay": DECAYS},
        LEARNED,
    ),
    Grid(
        "decay",
        "Learned linear predictor: weight decay of the predictor and of the trunk",
        {"predictor_weight_decay": DECAYS, "weight_decay": DECAYS},
        LEARNED,
    ),
    Grid(
        "target",
        "Momentum of the target network; at 0 it is the online network",
        {
            "predictor": ("directpred", "linear", "mlp"),
            "target_momentum": (0.0, 0.9, 0.99, 0.996, 0.999),
        },
    ),
    Grid(
        "symmetric",
        "Learned linear predictor: made symmetric after every step, by weight decay",
        {"symmetric": (False, True), "weight_decay": DECAYS},
        LEARNED,
    ),
    Grid(
        "rule",
        "DirectPred: ε of Eq. 18 and ρ of Eq. 19",
        {"eps": (0.0, 0.01, 0.1, 0.3, 1.0), "rho": (0.0, 0.3, 0.9, 0.99)},
        {"predictor": "directpred"},
    ),
    Grid(
        "frequency",
        "DirectPred: steps between two settings, the weight held or trained in between",
        {"freq": (1, 2, 5, 10), "between": ("hold", "train")},
        {"predictor": "directpred"},
    ),
)
"""The paper's questions, on the recipe of the sweep."""
