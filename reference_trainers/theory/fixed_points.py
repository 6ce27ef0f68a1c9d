"""The parabola, the fixed points on it and the border of collapse: an experiment on the modes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .basin import border, end, existing_fixed_points, parabola
from .claim import Curve, Finding, Panel, Result
from .equations import fixed_points as p_minus_plus
from .equations import integrate, modes, separatrix
from .matrices import decay_rate


def fixed_points(
    *, sigma2: float = 0.1, alpha_p: float = 1.0, tau: float = 1.0, eta: float = 0.16
) -> Result:
    """The parabola s = p²/α_p, its fixed points p±, and the border of collapse at p₋."""
    knobs: dict[str, Any] = {"sigma2": sigma2, "alpha_p": alpha_p, "tau": tau}
    lower, upper = existing_fixed_points(sigma2=sigma2, eta=eta, tau=tau)
    most = tau**2 / (4 * (1 + sigma2))
    etas = np.append(most * np.linspace(0.05, 0.95, 10), eta)
    below, above = p_minus_plus(sigma2=sigma2, eta=etas, tau=tau)
    flows = [partial(modes, eta=each, **knobs) for each in etas]
    ends = np.asarray(
        [end(flow, parabola(tau, alpha_p), each)[1] for flow, each in zip(flows, etas, strict=True)]
    )
    borders = np.asarray(
        [
            border(flow, lambda p: parabola(p, alpha_p), top=p**2 / alpha_p, eta=each, high=tau)
            for flow, each, p in zip(flows, etas, above, strict=True)
        ]
    )
    smooth = most * np.linspace(1e-3, 1, 400)
    both = np.stack(p_minus_plus(sigma2=sigma2, eta=smooth, tau=tau), axis=1)

    flow, top = flows[-1], upper**2 / alpha_p
    times = np.linspace(0, 4 / eta, 81)
    s, p = integrate(flow, (0.6 * tau**2, 0.2 * tau), times)
    away = lower / 2
    in_s = border(flow, lambda s: (s, away), top=top, eta=eta, high=tau**2 / alpha_p)
    on_border = separatrix(away, sigma2=sigma2, eta=eta, tau=tau) / alpha_p
    width = tau / (1 + sigma2)
    curves = (
        Curve("where modes end", etas, ends, 0, dots=True),
        Curve("border of collapse", etas, borders, 1, dots=True),
        Curve(r"$p_\pm$", smooth, both, predicted=True),
    )
    return Result(
        "p± = (τ ± √(τ² − 4η(1 + σ²)))/(2(1 + σ²)) on s = p²/α_p; collapse below p₋",
        (
            Finding(f"p₋, η = {eta:g}: border of collapse by bisection", borders[-1], lower),
            Finding(f"p₊, η = {eta:g}: where modes end", ends[-1], upper),
            *(
                Finding(
                    f"largest relative error of {name}, 11 values of η",
                    np.abs(measured / predicted - 1).max(),
                    1e-3,
                    "≤",
                )
                for name, measured, predicted in (("p₋", borders, below), ("p₊", ends, above))
            ),
            Finding("rate of s − p²/α_p", decay_rate(times, np.abs(s - p**2 / alpha_p)), 2 * eta),
            Finding("off the parabola, p = p₋/2: border in s, the separatrix", in_s, on_border),
        ),
        (
            Panel(
                r"Fixed points: below $p_-$, collapse",
                r"weight decay $\eta$",
                "$p$",
                curves,
                ylim=(0, 1.05 * width),
                legend="center left",
                texts=((0.7 * most, 0.07 * width, r"$p\to 0$"),),
            ),
            _portrait(eta, knobs),
        ),
    )


STARTS = (
    *((0.004, y) for y in (0.05, 0.13, 0.19, 0.26, 0.4, 0.6, 0.8)),
    *((x, 0.02) for x in (0.15, 0.35, 0.55, 0.8, 0.99)),
    *((x, 0.99) for x in (0.3, 0.6, 0.9)),
    *((0.99, y) for y in (0.25, 0.45, 0.7)),
)
"""Of the courses of the portrait, of the width and height of the plot."""


def _portrait(eta: float, knobs: dict[str, Any]) -> Panel:
    """Courses in the plane of p and √(α_p s), in which the parabola is the diagonal."""
    tau, alpha_p, sigma2 = knobs["tau"], knobs["alpha_p"], knobs["sigma2"]
    fixed = np.array([0, *existing_fixed_points(sigma2=sigma2, eta=eta, tau=tau)])
    edge = 1.3 * fixed[2]
    times = np.append(0, np.geomspace(0.05, 40 / eta, 300))
    curves = []
    for x, y in STARTS:
        start = (y * edge) ** 2 / alpha_p, x * edge
        s, p = integrate(partial(modes, eta=eta, **knobs), start, times, method="LSODA")
        alive = p[-1] > fixed[1]
        label, colour = ("to $p_+$", 0) if alive else ("to 0", 1)
        curves.append(Curve(label, p, np.sqrt(alpha_p * np.abs(s)), colour))
    line = np.linspace(1e-3, 1, 60) * edge
    q = np.asarray([separatrix(p, sigma2=sigma2, eta=eta, tau=tau) for p in line])
    both = np.stack([line, np.sqrt(q)], axis=1)
    return Panel(
        r"Modes run onto the parabola $s=p^2/\alpha_p$",
        "$p$",
        r"$\sqrt{\alpha_p s}$",
        (
            *curves,
            Curve("parabola, separatrix", line, both, predicted=True),
            Curve("$0, p_-, p_+$", fixed, fixed, 2, dots=True),
        ),
        xlim=(0, edge),
        ylim=(0, edge),
        legend="upper left",
    )
