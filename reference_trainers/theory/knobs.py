"""The options of ``directpred dynamics``: what its claims are called, and the knobs they have."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

CLAIMS = (
    *("simulate", "theorem1", "theorem2", "theorem3"),
    *("fixed-points", "collapse", "ema", "directpred"),
)
"""The claims by name, in the order in which they are shown."""

PREDICTORS = ("trained", "symmetric", "directpred", "none")
"""How W_p comes about: by gradient, by its symmetric part, by Eq. 18 from F; or W_p = I."""


def _number(
    kind: type[int] | type[float], least: float, above: bool = False
) -> Callable[[str], float]:
    """Numbers from the least on, or above it."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            whole = "whole " if kind is int else ""
            bound = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be a {whole}number {bound}, not {text!r}")
        return value

    return parse


_positive = _number(float, 0, above=True)

KNOBS: dict[str, tuple[dict[str, Any], str]] = {
    "dim": ({"type": _number(int, 1)}, "d, width of the data"),
    "outputs": ({"type": _number(int, 2)}, "n, rows of W and size of W_p"),
    "sigma2": ({"type": _number(float, 0)}, "σ², variance of the augmentation"),
    "alpha_p": ({"type": _positive}, "α_p, learning rate of the predictor over that of W"),
    "tau": ({"type": _positive}, "τ, of the target W_a = τW; with a β, at the start"),
    "beta": ({"type": _positive}, "β, rate of a target that is a moving average"),
    "eta": ({"type": _positive}, "η, weight decay"),
    "eps": ({"type": _number(float, 0)}, "ε of Eq. 18"),
    "seed": ({"type": _number(int, 0)}, "of the data and of the start"),
    "time": ({"type": _positive}, "how long, in 1 / learning rate"),
    "predictor": ({"choices": PREDICTORS}, f"one of {', '.join(PREDICTORS)}"),
    "stop_gradient": (
        {"action": argparse.BooleanOptionalAction},
        "whether the target gives no gradient",
    ),
    "isotropic": ({"action": argparse.BooleanOptionalAction}, "whether X = I and X′ = σ²I"),
    "aligned": (
        {"action": argparse.BooleanOptionalAction},
        "whether F and W_p start with the same eigenvectors",
    ),
}
"""For each knob what argparse is to make of it, and a text."""
