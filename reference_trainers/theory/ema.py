"""The moving average of the target as a curriculum, as experiments on modes and full system."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .basin import border, existing_fixed_points, parabola
from .claim import Curve, Finding, Panel, Result
from .equations import commutator, escape_rate, fixed_points, full, integrate, modes_ema
from .matrices import decay_rate, misalignment, norm, random_matrix, random_symmetric


def ema(
    *,
    outputs: int = 6,
    sigma2: float = 0.1,
    alpha_p: float = 1.0,
    tau: float = 0.5,
    beta: float = 0.1,
    eta: float = 0.04,
    seed: int = 0,
) -> Result:
    """The EMA target as a curriculum: τ starts small and rises to 1 at the rate β.

    ``tau`` is where the EMA's starts, W_a(0) = τ W(0), and the fixed τ that it is compared to.
    """
    knobs: dict[str, Any] = {"sigma2": sigma2, "alpha_p": alpha_p, "eta": eta}
    rates = beta / 5, beta, 5 * beta
    of_basin, basin = _basin(tau, rates, knobs)
    of_speed, speed = _speed(rates, knobs)
    of_alignment, alignment = _alignment(outputs, tau, beta, seed, knobs)
    return Result(
        "an EMA keeps p±, grows slower, and shares p₋ as its border only from τ(0) = 1",
        (*of_basin, *of_speed, *of_alignment),
        (basin, speed, *alignment),
    )


def _basin(
    tau: float, rates: Sequence[float], knobs: dict[str, Any]
) -> tuple[list[Finding], Panel]:
    sigma2, alpha_p, eta = knobs["sigma2"], knobs["alpha_p"], knobs["eta"]
    lower, upper = existing_fixed_points(sigma2=sigma2, eta=eta, tau=1.0)

    def border_from(start: float, beta: float) -> float:
        flow = partial(modes_ema, beta=beta, **knobs)
        top = upper**2 / alpha_p
        return border(flow, lambda p: (*parabola(p, alpha_p), start), top=top, eta=eta, high=1.0)

    starts = np.array([0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2])
    curves, findings = [], []
    for colour, beta in enumerate(rates):
        borders = np.asarray([border_from(start, beta) for start in starts])
        curves.append(Curve(rf"EMA, $\beta={beta:g}$", starts, borders, colour, dots=True))
        from_1 = float(borders[starts == 1].item())
        findings.append(Finding(f"border of collapse, τ(0) = 1, β = {beta:g}: p₋", from_1, lower))
    measured = border_from(tau, rates[1])
    fixed = float(fixed_points(sigma2=sigma2, eta=eta, tau=tau)[0])
    (side, within), beyond = (("below", "≤"), "≥") if tau <= 1 else (("above", "≥"), "≤")
    findings += [
        Finding(
            f"  τ(0) = {tau:g}, β = {rates[1]:g}: {side} p₋ of that τ, fixed",
            measured,
            math.inf if math.isnan(fixed) else fixed,
            within,
        ),
        Finding("  but not p₋ of τ = 1", measured, lower, beyond),
    ]
    fine = np.linspace(2 * math.sqrt(eta * (1 + sigma2)), 1.25, 200)
    below = fixed_points(sigma2=sigma2, eta=eta, tau=fine)[0]
    predicted = r"$p_-(\tau)$ for a fixed $\tau$; $p_-(1)$"
    return findings, Panel(
        r"EMA: a small $\tau(0)$ widens the basin",
        r"$\tau(0)$, of $W_a(0)=\tau(0)\,W(0)$",
        "collapse below this $p(0)$",
        (
            *curves,
            Curve(predicted, fine, below, predicted=True),
            Curve(predicted, np.array([0.1, 1.25]), np.full(2, lower), predicted=True),
        ),
        ylim=(0, 5 * lower),
        legend="upper right",
    )


def _speed(rates: Sequence[float], knobs: dict[str, Any]) -> tuple[list[Finding], Panel]:
    sigma2, alpha_p, eta = knobs["sigma2"], knobs["alpha_p"], knobs["eta"]
    lower, upper = existing_fixed_points(sigma2=sigma2, eta=eta, tau=1.0)
    escapes = [float(escape_rate(sigma2=sigma2, eta=eta, beta=beta)) for beta in rates]
    times = np.linspace(0, 7 / escapes[0], 401)
    of_p, of_tau, findings = [], [], []
    for colour, (beta, escape) in enumerate(zip(rates, escapes, strict=True)):
        flow = partial(modes_ema, beta=beta, **knobs)
        _, p, tau = integrate(flow, (*parabola(1.5 * lower, alpha_p), 1.0), times)
        of_p.append(Curve(rf"$p$, $\beta={beta:g}$", times, p, colour))
        of_tau.append(Curve(r"$\tau$, paler", times, tau, 3 + colour))
        near = np.linspace(2 / escape, 6 / escape, 41)
        start = (*parabola(lower * (1 + 1e-5), alpha_p), 1.0)
        _, p_near, _ = integrate(flow, start, np.append(0, near))
        rate = -decay_rate(near, p_near[1:] - lower)
        findings += [
            Finding(f"rate at which p leaves p₋, β = {beta:g}", rate, escape),
            Finding("  least τ on the way from 1.5 p₋ to p₊", tau.min(), 1, "≤"),
        ]
    return findings, Panel(
        r"A slow target lags: $\tau$ dips, $p$ grows slower",
        "time $t$",
        r"$p$ and $\tau=w_a/w$",
        (*of_p, *of_tau, Curve("$p_+$", times[[0, -1]], np.full(2, upper), predicted=True)),
        legend="lower right",
    )


def _alignment(
    outputs: int, tau: float, beta: float, seed: int, knobs: dict[str, Any]
) -> tuple[list[Finding], tuple[Panel, ...]]:
    """A small τ makes K larger for given F and W_p; but with it all is slower, and F smaller.

    So by the clock it aligns later. What counts for learning may be how far F and W_p are aligned
    by the time that F has grown: then the EMA's are the better aligned.
    """
    rng, eye = np.random.default_rng(seed), np.eye(outputs)
    W, W_p = 0.3 * random_matrix(outputs, outputs, rng), 0.3 * random_symmetric(outputs, rng)
    data = {"X": eye, "X_prime": knobs["sigma2"] * eye}
    theory = {"alpha_p": knobs["alpha_p"], "eta": knobs["eta"], "predictor": "symmetric"}
    times = np.linspace(0, 200, 1001)
    sizes, shares, growths = [], [], []
    for start, rate in ((1.0, None), (tau, None), (tau, beta)):
        flow = partial(full, **data, **theory, tau=start, beta=rate)
        W_t, W_p_t, _ = integrate(flow, (W, W_p, start * W), times)
        F = W_t @ W_t.swapaxes(1, 2)
        sizes.append(norm(commutator(F, W_p_t)))
        shares.append(misalignment(F, W_p_t))
        growths.append(np.trace(F, axis1=1, axis2=2) / np.trace(F[-1]))
    findings = [
        Finding(
            f"{what} at t = {times[at]:g}, {name} over τ = 1",
            series[which][at] / series[0][at],
            1,
            "≤",
        )
        for what, at, series in (("‖L‖", 15, sizes), ("‖L‖/(‖F‖‖W_p‖)", 100, shares))
        for which, name in ((1, f"τ = {tau:g}"), (2, f"EMA from {tau:g}"))
    ]
    of_1, _, of_ema = (share[np.argmax(g > 0.5)] for share, g in zip(shares, growths, strict=True))
    half = f"  when tr F is half of its end, EMA from {tau:g} over τ = 1"
    findings.append(Finding(half, of_ema / of_1, 1, "≤"))
    y = r"$\|[F,W_p]\|\,/\,\|F\|\|W_p\|$"
    names = r"$\tau=1$", rf"$\tau={tau:g}$", rf"EMA, from $\tau={tau:g}$"
    shown = times <= 60
    by_time = [Curve(names[k], times[shown], shares[k][shown], k) for k in range(3)]
    by_growth = [Curve(names[k], growths[k], shares[k], k) for k in (0, 2)]
    return findings, (
        Panel(r"By the clock, $\tau=1$ aligns first", "time $t$", y, tuple(by_time), log="y"),
        Panel(
            "By the growth of $F$, the EMA does",
            r"$\mathrm{tr}\,F$, of its end",
            y,
            tuple(by_growth),
            log="y",
            ylim=(1e-8, 1),
        ),
    )
