"""The region where all collapses, as phase diagrams of the modes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .claim import Cells, Curve, Finding, Panel, Result
from .equations import Array, integrate, modes, separatrix


def collapse(*, sigma2: float = 0.1, alpha_p: float = 1.0, tau: float = 1.0) -> Result:
    """The region of collapse, τ² < 4η(1 + σ²), and what α_p does to the basin outside of it."""
    etas = tau**2 * np.linspace(0.0025, 0.2975, 60)
    sigmas = np.linspace(0.025, 2.975, 60)
    eta, sigma = np.meshgrid(etas, sigmas)
    of_sigma = _ends(tau, tau**2 / alpha_p, alpha_p=alpha_p, sigma2=sigma, eta=eta, tau=tau)
    as_predicted = float(np.mean((of_sigma > 0.25) == (tau**2 >= 4 * eta * (1 + sigma))))

    p, s = 0.05 * tau, 0.01 * tau**2
    alphas = np.geomspace(0.1, 100, 60)
    eta, alpha = np.meshgrid(etas, alphas)
    of_alpha = _ends(p, s, alpha_p=alpha, sigma2=sigma2, eta=eta, tau=tau)
    q = np.asarray([separatrix(p, sigma2=sigma2, eta=each, tau=tau) for each in etas])
    as_separated = float(np.mean((of_alpha > 0.25) == (alpha * s > q)))
    most = tau**2 / (4 * (1 + sigma2))
    beyond = float(np.mean(of_alpha[eta > most] < 0.25))

    condition = r"$\tau^2=4\eta(1+\sigma^2)$"
    parabola = Curve(condition, tau**2 / (4 * (1 + sigmas)), sigmas, predicted=True)
    edge = Curve(condition, np.full(2, most), alphas[[0, -1]], predicted=True)
    return Result(
        "all collapses where τ² < 4η(1 + σ²), whatever α_p; outside, α_p shrinks the basin",
        (
            Finding("share of 3600 cells (η, σ²) as predicted", as_predicted, 0.99, "≥", 0),
            Finding(
                "share of 3600 cells (η, α_p) as the separatrix says", as_separated, 0.99, "≥", 0
            ),
            Finding("  collapsed where τ² < 4η(1 + σ²)", beyond, 1, "≥", 0.005),
        ),
        (
            Panel(
                r"Collapse where $\tau^2<4\eta(1+\sigma^2)$",
                r"weight decay $\eta$",
                r"augmentation $\sigma^2$",
                (parabola,),
                cells=Cells(etas, sigmas, of_sigma),
                texts=((0.025 * tau**2, 0.7, r"$p\to p_+$"), (0.2 * tau**2, 1.8, r"$p\to 0$")),
                ylim=(0, 3),
                legend="upper right",
            ),
            Panel(
                r"A larger $\alpha_p$ shrinks the basin of collapse",
                r"weight decay $\eta$",
                r"$\alpha_p$, from $p(0)=0.05\,\tau$, $s(0)=0.01\,\tau^2$",
                (Curve("separatrix", etas, q / s, predicted=True), edge),
                log="y",
                cells=Cells(etas, alphas, of_alpha),
                texts=((0.04 * tau**2, 20, r"$p\to p_+$"), (0.12 * tau**2, 0.3, r"$p\to 0$")),
                ylim=(0.1, 100),
                legend="lower right",
            ),
        ),
    )


def _ends(p: float, s: float, **knobs: Any) -> Array:
    """Where p ends, over τ/(1 + σ²), for all cells of a diagram at once, from one start.

    A mode ends at 0, or at p₊, which is at least half of that.
    """
    start = np.full_like(knobs["eta"], s), np.full_like(knobs["eta"], p)
    times = np.array([0, 1000 / knobs["tau"] ** 2])
    flow = partial(modes, **knobs)
    _, course = integrate(flow, start, times, method="RK45", rtol=1e-4, atol=1e-7)
    ends: Array = course[-1] * (1 + knobs["sigma2"]) / knobs["tau"]
    return ends
