"""Where modes end, and from where they do not collapse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import UsageError
from .equations import Array, Number, fixed_points, integrate


def existing_fixed_points(*, sigma2: float, eta: float, tau: float) -> tuple[float, float]:
    """p₋ and p₊.

    Raises:
        UsageError: There are none.
    """
    most = tau**2 / (4 * (1 + sigma2))
    if eta >= most:
        raise UsageError(
            f"without fixed points p± all collapses: eta must be below "
            f"τ²/(4(1 + σ²)) = {most:.4g}, not {eta:g}"
        )
    lower, upper = fixed_points(sigma2=sigma2, eta=eta, tau=tau)
    return float(lower), float(upper)


def parabola(p: float, alpha_p: float) -> tuple[float, float]:
    """S and p of a mode that is balanced, s = p²/α_p."""
    return p**2 / alpha_p, p


def end(flow: Callable[..., Sequence[Array]], start: Sequence[Number], eta: float) -> list[float]:
    """Where the single numbers of a mode are after a time of 40 / η."""
    times = np.array([0, 40 / eta])
    courses = integrate(flow, start, times, method="LSODA", rtol=1e-6, atol=1e-12)
    return [float(course[-1].item()) for course in courses]


def border(
    flow: Callable[..., Sequence[Array]],
    start: Callable[[float], Sequence[Number]],
    *,
    top: float,
    eta: float,
    high: float,
) -> float:
    """The least x from which a mode does not collapse, by bisection to a relative 1e-5.

    Args:
        flow: Of the mode; s is the first of its numbers.
        start: From x to where the mode starts.
        top: Where s ends if it does not collapse; a quarter of it counts as alive.
        eta: η, which sets how long it takes.
        high: An x from which the mode does not collapse.
    """
    low = 0.0
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        alive = end(flow, start(middle), eta)[0] > top / 4
        low, high = (low, middle) if alive else (middle, high)
    return (low + high) / 2
