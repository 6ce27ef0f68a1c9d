"""The claims about single modes: fixed points, the basin of collapse, and what changes it.

As in `theorems`, a claim is a function of the knobs that it has to a `Result`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from directpred.solvers import eigh
from directpred.spectrum import Eq18

from . import dynamics as dyn
from .dynamics import Array, integrate
from .errors import UsageError
from .theorems import (
    Cells,
    Curve,
    Finding,
    Panel,
    Result,
    decay_rate,
    norm,
    random_matrix,
    random_symmetric,
)


def fixed_points(
    *, sigma2: float = 0.1, alpha_p: float = 1.0, tau: float = 1.0, eta: float = 0.16
) -> Result:
    """The parabola s = p²/α_p, its fixed points p±, and the border of collapse at p₋."""
    knobs: dict[str, Any] = {"sigma2": sigma2, "alpha_p": alpha_p, "tau": tau}
    lower, upper = existing_fixed_points(sigma2, eta, tau)
    most = tau**2 / (4 * (1 + sigma2))
    etas = np.append(most * np.linspace(0.05, 0.95, 10), eta)
    borders = np.asarray([border(eta=each, **knobs) for each in etas])
    start = np.array(tau**2 / alpha_p), np.array(tau)
    ends = np.asarray([end(partial(dyn.modes, eta=each, **knobs), start, each)[1] for each in etas])
    below, above = dyn.fixed_points(sigma2=sigma2, eta=etas, tau=tau)
    smooth = most * np.linspace(1e-3, 1, 400)
    both = np.stack(dyn.fixed_points(sigma2=sigma2, eta=smooth, tau=tau), axis=1)

    flow = partial(dyn.modes, eta=eta, **knobs)
    times = np.linspace(0, 4 / eta, 81)
    s, p = integrate(flow, (np.array(0.6 * tau**2), np.array(0.2 * tau)), times)
    away = lower / 2
    on_border = dyn.separatrix(away, sigma2=sigma2, eta=eta, tau=tau) / alpha_p
    return Result(
        "p± = (τ ± √(τ² − 4η(1 + σ²)))/(2(1 + σ²)) on s = p²/α_p; collapse below p₋",
        (
            Finding(f"p₋, η = {eta:g}: border of collapse by bisection", borders[-1], lower),
            Finding(f"p₊, η = {eta:g}: where modes end", ends[-1], upper),
            Finding(
                "largest relative error of p₋, 11 values of η",
                np.abs(borders / below - 1).max(),
                1e-3,
                "≤",
            ),
            Finding(
                "largest relative error of p₊, 11 values of η",
                np.abs(ends / above - 1).max(),
                1e-3,
                "≤",
            ),
            Finding("rate of s − p²/α_p", decay_rate(times, np.abs(s - p**2 / alpha_p)), 2 * eta),
            Finding(
                "off the parabola, p = p₋/2: border in s, the separatrix",
                border_in_s(away, eta=eta, **knobs),
                on_border,
            ),
        ),
        (
            Panel(
                r"Fixed points: below $p_-$, collapse",
                r"weight decay $\eta$",
                "$p$",
                (
                    Curve("where modes end", etas, ends, 0, dots=True),
                    Curve("border of collapse", etas, borders, 1, dots=True),
                    Curve(r"$p_\pm$", smooth, both, predicted=True),
                ),
                ylim=(0, 1.05 * tau / (1 + sigma2)),
                legend="center left",
                texts=((0.7 * most, 0.07 * tau / (1 + sigma2), r"$p\to 0$"),),
            ),
            _portrait(eta, knobs),
        ),
    )


PORTRAIT = (
    *((0.004, y) for y in (0.05, 0.13, 0.19, 0.26, 0.4, 0.6, 0.8)),
    *((x, 0.02) for x in (0.15, 0.35, 0.55, 0.8, 0.99)),
    *((x, 0.99) for x in (0.3, 0.6, 0.9)),
    *((0.99, y) for y in (0.25, 0.45, 0.7)),
)
"""Where the courses of the portrait start, of the width and height of the plot."""


def _portrait(eta: float, knobs: dict[str, Any]) -> Panel:
    """Courses in the plane of p and √(α_p s), in which the parabola is the diagonal."""
    tau, alpha_p, sigma2 = knobs["tau"], knobs["alpha_p"], knobs["sigma2"]
    fixed = np.array([0, *existing_fixed_points(sigma2, eta, tau)])
    edge = 1.3 * fixed[2]
    times = np.append(0, np.geomspace(0.05, 40 / eta, 300))
    curves = []
    named: set[str] = set()
    for x, y in PORTRAIT:
        start = np.array((y * edge) ** 2 / alpha_p), np.array(x * edge)
        s, p = integrate(partial(dyn.modes, eta=eta, **knobs), start, times, method="LSODA")
        name = "to $p_+$" if p[-1] > fixed[1] else "to 0"
        label = "" if name in named else name
        curves.append(Curve(label, p, np.sqrt(alpha_p * np.abs(s)), int(name == "to 0")))
        named.add(name)
    line = np.linspace(1e-3, 1, 60) * edge
    q = np.asarray([dyn.separatrix(p, sigma2=sigma2, eta=eta, tau=tau) for p in line])
    return Panel(
        r"Modes run onto the parabola $s=p^2/\alpha_p$",
        "$p$",
        r"$\sqrt{\alpha_p s}$",
        (
            *curves,
            Curve("parabola, separatrix", line, line, predicted=True),
            Curve("", line, np.sqrt(q), predicted=True),
            Curve("$0, p_-, p_+$", fixed, fixed, 2, dots=True),
        ),
        xlim=(0, edge),
        ylim=(0, edge),
        legend="upper left",
    )


def collapse(*, sigma2: float = 0.1, alpha_p: float = 1.0, tau: float = 1.0) -> Result:
    """The region of collapse, τ² < 4η(1 + σ²), and what α_p does to the basin outside of it."""
    etas = tau**2 * np.linspace(0.0025, 0.2975, 60)
    sigmas = np.linspace(0.025, 2.975, 60)
    eta, sigma = np.meshgrid(etas, sigmas)
    of_sigma = _grid(tau, tau**2 / alpha_p, alpha_p=alpha_p, sigma2=sigma, eta=eta, tau=tau)
    predicted = tau**2 >= 4 * eta * (1 + sigma)
    first = np.mean((of_sigma > 0.25) == predicted)

    p, s = 0.05 * tau, 0.01 * tau**2
    alphas = np.geomspace(0.1, 100, 60)
    eta, alpha = np.meshgrid(etas, alphas)
    of_alpha = _grid(p, s, alpha_p=alpha, sigma2=sigma2, eta=eta, tau=tau)
    q = np.asarray([dyn.separatrix(p, sigma2=sigma2, eta=each, tau=tau) for each in etas])
    second = np.mean((of_alpha > 0.25) == (alpha * s > q))
    most = tau**2 / (4 * (1 + sigma2))
    beyond = of_alpha[eta > most]
    edge = Curve("", np.full(2, most), alphas[[0, -1]], predicted=True)
    return Result(
        "all collapses where τ² < 4η(1 + σ²), whatever α_p; outside, α_p shrinks the basin",
        (
            Finding("share of 3600 cells (η, σ²) as predicted", float(first), 0.99, "≥", 0),
            Finding(
                "share of 3600 cells (η, α_p) as the separatrix says", float(second), 0.99, "≥", 0
            ),
            Finding(
                "  collapsed where τ² < 4η(1 + σ²)", float(np.mean(beyond < 0.25)), 1, "≥", 0.005
            ),
        ),
        (
            Panel(
                r"Collapse where $\tau^2<4\eta(1+\sigma^2)$",
                r"weight decay $\eta$",
                r"augmentation $\sigma^2$",
                (
                    Curve(
                        r"$\tau^2=4\eta(1+\sigma^2)$",
                        tau**2 / (4 * (1 + sigmas)),
                        sigmas,
                        predicted=True,
                    ),
                ),
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


def _grid(p: float, s: float, **knobs: Any) -> Array:
    """Where p ends, over τ/(1 + σ²), for all cells of a diagram at once, from one start.

    A mode ends at 0, or at p₊, which is at least half of that.
    """
    start = np.full_like(knobs["eta"], s), np.full_like(knobs["eta"], p)
    times = np.array([0, 1000 / knobs["tau"] ** 2])
    _, course = integrate(
        partial(dyn.modes, **knobs), start, times, method="RK45", rtol=1e-4, atol=1e-7
    )
    ends: Array = course[-1] * (1 + knobs["sigma2"]) / knobs["tau"]
    return ends


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
    existing_fixed_points(sigma2, eta, 1.0)
    knobs: dict[str, Any] = {"sigma2": sigma2, "alpha_p": alpha_p, "eta": eta}
    rates = beta / 5, beta, 5 * beta
    on_border, basin = _ema_basin(tau, rates, knobs)
    of_speed, speed = _ema_speed(rates, knobs)
    of_alignment, alignment = _ema_alignment(outputs, tau, beta, seed, knobs)
    return Result(
        "an EMA keeps p±, grows slower, and shares p₋ as its border only from τ(0) = 1",
        (*on_border, *of_speed, *of_alignment),
        (basin, speed, *alignment),
    )


def _ema_basin(
    tau: float, rates: Sequence[float], knobs: dict[str, Any]
) -> tuple[list[Finding], Panel]:
    sigma2, eta = knobs["sigma2"], knobs["eta"]
    lower = float(dyn.fixed_points(sigma2=sigma2, eta=eta, tau=1.0)[0])
    starts = np.array([0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2])
    curves, findings = [], []
    for colour, beta in enumerate(rates):
        borders = np.asarray([border_of_ema(x, beta=beta, **knobs) for x in starts])
        curves.append(Curve(rf"EMA, $\beta={beta:g}$", starts, borders, colour, dots=True))
        findings.append(
            Finding(f"border of collapse, τ(0) = 1, β = {beta:g}: p₋", borders[5], lower)
        )
    measured = border_of_ema(tau, beta=rates[1], **knobs)
    fixed = float(dyn.fixed_points(sigma2=sigma2, eta=eta, tau=tau)[0])
    between = "below" if tau <= 1 else "above", "≤" if tau <= 1 else "≥"
    findings.append(
        Finding(
            f"  τ(0) = {tau:g}, β = {rates[1]:g}: {between[0]} p₋ of that τ, fixed",
            measured,
            np.inf if math.isnan(fixed) else fixed,
            between[1],
        )
    )
    findings.append(Finding("  but not p₋ of τ = 1", measured, lower, "≥" if tau <= 1 else "≤"))
    fine = np.linspace(2 * math.sqrt(eta * (1 + sigma2)), 1.25, 200)
    below = dyn.fixed_points(sigma2=sigma2, eta=eta, tau=fine)[0]
    return findings, Panel(
        r"EMA: a small $\tau(0)$ widens the basin",
        r"$\tau(0)$, of $W_a(0)=\tau(0)\,W(0)$",
        "collapse below this $p(0)$",
        (
            *curves,
            Curve(r"$p_-(\tau)$ for a fixed $\tau$; $p_-(1)$", fine, below, predicted=True),
            Curve("", np.array([0.1, 1.25]), np.full(2, lower), predicted=True),
        ),
        ylim=(0, 5 * lower),
        legend="upper right",
    )


def _ema_speed(rates: Sequence[float], knobs: dict[str, Any]) -> tuple[list[Finding], Panel]:
    sigma2, alpha_p, eta = knobs["sigma2"], knobs["alpha_p"], knobs["eta"]
    lower, upper = existing_fixed_points(sigma2, eta, 1.0)
    escapes = [float(dyn.escape_rate(sigma2=sigma2, eta=eta, beta=beta)) for beta in rates]
    times = np.linspace(0, 7 / escapes[0], 401)
    curves, findings = [], []
    for colour, (beta, escape) in enumerate(zip(rates, escapes, strict=True)):
        flow = partial(dyn.modes_ema, beta=beta, **knobs)
        p = lower * 1.5
        _, p_t, tau_t = integrate(
            flow, (np.array(p**2 / alpha_p), np.array(p), np.array(1.0)), times
        )
        curves += [
            Curve(rf"$p$, $\beta={beta:g}$", times, p_t, colour),
            Curve(r"$\tau$ (paler)" if beta == rates[-1] else "", times, tau_t, 3 + colour),
        ]
        p = lower * (1 + 1e-5)
        near = np.linspace(2 / escape, 6 / escape, 41)
        _, p_t, _ = integrate(
            flow,
            (np.array(p**2 / alpha_p), np.array(p), np.array(1.0)),
            np.append(0, near),
        )
        grown = p_t[1:] - lower
        findings += [
            Finding(f"rate at which p leaves p₋, β = {beta:g}", -decay_rate(near, grown), escape),
            Finding("  least τ on the way from 1.5 p₋ to p₊", tau_t.min(), 1, "≤"),
        ]
    return findings, Panel(
        r"A slow target lags: $\tau$ dips, $p$ grows slower",
        "time $t$",
        r"$p$ and $\tau=w_a/w$",
        (*curves, Curve("$p_+$", times[[0, -1]], np.full(2, upper), predicted=True)),
        legend="lower right",
    )


def _ema_alignment(
    outputs: int, tau: float, beta: float, seed: int, knobs: dict[str, Any]
) -> tuple[list[Finding], tuple[Panel, ...]]:
    """A small τ makes K larger for given F and W_p; but with it all is slower, and F smaller.

    So by the clock it aligns later. What counts for learning may be how far F and W_p are aligned
    by the time that F has grown: then the EMA's are the better aligned.
    """
    rng = np.random.default_rng(seed)
    W, W_p = 0.3 * random_matrix(outputs, outputs, rng), 0.3 * random_symmetric(outputs, rng)
    times = np.linspace(0, 200, 1001)
    sizes, shares, growths = [], [], []
    cases = (1.0, None), (tau, None), (tau, beta)
    for start, rate in cases:
        flow = partial(
            dyn.full,
            X=np.eye(outputs),
            X_prime=knobs["sigma2"] * np.eye(outputs),
            alpha_p=knobs["alpha_p"],
            eta=knobs["eta"],
            tau=start,
            beta=rate,
            predictor="symmetric",
        )
        W_t, W_p_t, _ = integrate(flow, (W, W_p, start * W), times)
        F_t = W_t @ W_t.swapaxes(1, 2)
        sizes.append(norm(dyn.commutator(F_t, W_p_t)))
        shares.append(sizes[-1] / (norm(F_t) * norm(W_p_t)))
        growths.append(np.trace(F_t, axis1=1, axis2=2) / np.trace(F_t[-1]))
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
    first, _, last = (share[np.argmax(g > 0.5)] for share, g in zip(shares, growths, strict=True))
    findings.append(
        Finding(
            f"  when tr F is half of its end, EMA from {tau:g} over τ = 1", last / first, 1, "≤"
        )
    )
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


def directpred(
    *,
    outputs: int = 12,
    sigma2: float = 0.1,
    alpha_p: float = 1.0,
    tau: float = 1.0,
    eta: float = 0.02,
    eps: float = 0.1,
    seed: int = 0,
) -> Result:
    """DirectPred on the same system: W_p set from F by Eq. 18, against a trained one.

    By Eq. 18, p_j = √s_j + ε max s. All modes end at p_j = p₊, so √s at r₊ with r + ε r² = p₊ for
    the largest, and the others with it. The largest collapses below r₋, of r + ε r² = p₋. Once
    ε max s > p₋, none of the others can, however small it is.
    """
    lower, upper = existing_fixed_points(sigma2, eta, tau)
    knobs: dict[str, Any] = {"sigma2": sigma2, "eta": eta, "tau": tau}
    by_rule = partial(dyn.modes_directpred, rule=Eq18(eps), **knobs)
    top, trained_top = _root_of_eq18(upper, eps) ** 2, upper**2 / alpha_p
    rescued = eps * top > lower
    findings, course, aligned = _spectra(outputs, alpha_p, eps, seed, knobs)

    # The modes alone, many at once; the trained ones start on the parabola.
    s = np.geomspace(1e-8, 0.3, 60) * tau**2
    times = np.array([0, 60 / eta])
    (by_rule_end,) = integrate(by_rule, (s,), times, rtol=1e-6, atol=0)
    trained_end, _ = integrate(
        partial(dyn.modes, alpha_p=alpha_p, **knobs),
        (s, np.sqrt(alpha_p * s)),
        times,
        rtol=1e-6,
        atol=1e-30,
    )
    threshold = Curve(
        r"$p_-^2/\alpha_p$",
        np.full(2, lower**2 / alpha_p),
        np.array([0, trained_top]),
        predicted=True,
    )
    least = bisect(lambda r: end(by_rule, (np.array([r**2]),), eta)[0] > top / 4, math.sqrt(top))
    on_parabola = border(alpha_p=alpha_p, **knobs) / math.sqrt(alpha_p)
    alive = int((by_rule_end[-1] > top / 4).sum())
    return Result(
        "W_p by Eq. 18 of F: aligned by construction; no mode collapses where ε max s > p₋",
        (
            *findings,
            Finding(
                f"modes alive of 60, ε max s {'>' if rescued else '<'} p₋, DirectPred",
                alive,
                60 if rescued else None,
                tolerance=0,
            ),
            Finding(
                "  trained, on the parabola",
                int((trained_end[-1] > trained_top / 4).sum()),
                int((s > lower**2 / alpha_p).sum()),
                tolerance=0,
            ),
            Finding("border of the largest √s: r₋", least, _root_of_eq18(lower, eps)),
            Finding("  trained, on the parabola: p₋/√α_p", on_parabola, lower / math.sqrt(alpha_p)),
        ),
        (
            course,
            Panel(
                "Where a mode ends, by where it starts",
                "$s_j(0)$",
                r"$s_j(\infty)$",
                (
                    Curve("DirectPred", s, by_rule_end[-1], 0, dots=True),
                    Curve("trained, on the parabola", s, trained_end[-1], 1, dots=True),
                    threshold,
                ),
                log="x",
                legend="center left",
            ),
            aligned,
        ),
    )


def _spectra(
    outputs: int, alpha_p: float, eps: float, seed: int, knobs: dict[str, Any]
) -> tuple[list[Finding], Panel, Panel]:
    """The full system: DirectPred, and trained from a W_p that is balanced, or random."""
    sigma2, eta, tau = knobs["sigma2"], knobs["eta"], knobs["tau"]
    lower, upper = existing_fixed_points(sigma2, eta, tau)
    rng, rule = np.random.default_rng(seed), Eq18(eps)
    # Singular values of W(0) over two decades: some modes start in the basin of collapse.
    roots = np.geomspace(0.003, 0.3, outputs) * tau
    u, v = (np.linalg.qr(rng.normal(size=(outputs, outputs)))[0] for _ in range(2))
    W, balanced = (u * roots) @ v, math.sqrt(alpha_p) * (u * roots) @ u.T
    X = np.eye(outputs)
    shown = np.linspace(0, 120 / tau**2, 241)
    times = np.append(shown, 2 * shown[-1] + 12 / eta)  # a mode near p₋ takes long to decide
    runs = {}
    for name, predictor, W_p in (
        ("DirectPred", "directpred", balanced),
        ("trained, on the parabola", "symmetric", balanced),
        ("trained, random start", "symmetric", 0.3 * random_symmetric(outputs, rng)),
    ):
        flow = partial(
            dyn.full,
            X=X,
            X_prime=sigma2 * X,
            alpha_p=alpha_p,
            eta=eta,
            tau=tau,
            predictor=predictor,
            rule=rule,
        )
        W_t, W_p_t, _ = integrate(flow, (W, W_p, np.zeros_like(W)), times, rtol=1e-7)
        F = W_t @ W_t.swapaxes(1, 2)
        if predictor == "directpred":
            W_p_t = np.asarray([eigh(each, rule) for each in F])
        misaligned = norm(dyn.commutator(F, W_p_t)) / (norm(F) * norm(W_p_t))
        runs[name] = np.linalg.eigvalsh(F), misaligned
    tops = {
        "DirectPred": _root_of_eq18(upper, eps) ** 2,
        "trained, on the parabola": upper**2 / alpha_p,
        "trained, random start": upper**2 / alpha_p,
    }
    survivors = {
        "DirectPred": outputs if eps * tops["DirectPred"] > lower else None,
        "trained, on the parabola": int((math.sqrt(alpha_p) * roots > lower).sum()),
        "trained, random start": None,
    }
    findings = []
    for name, (s, _) in runs.items():
        alive = int((s[-1] > tops[name] / 4).sum())
        findings += [
            Finding(f"modes alive of {outputs}, {name}", alive, survivors[name], tolerance=0),
            Finding("  largest eigenvalue of F in the end", s[-1, -1], tops[name]),
            Finding(
                "  time until half of them are there",
                times[np.argmax(s[:, outputs // 2] > 0.9 * tops[name])]
                if alive > outputs // 2
                else np.inf,
            ),
        ]
    findings.append(
        Finding("largest ‖L‖/(‖F‖‖W_p‖), DirectPred", runs["DirectPred"][1].max(), 1e-12, "≤")
    )
    names = "DirectPred", "trained, on the parabola"
    curves = [Curve(name, shown, runs[name][0][:-1], i) for i, name in enumerate(names)]
    ends = [np.full(2, tops[name]) for name in names]
    aligned = "DirectPred", "trained, random start"
    return (
        findings,
        Panel(
            "DirectPred leaves no mode behind",
            "time $t$",
            "eigenvalues of $F$",
            (
                *curves,
                Curve("where they end", shown[[0, -1]], ends[0], predicted=True),
                Curve("", shown[[0, -1]], ends[1], predicted=True),
            ),
            ylim=(-0.05 * max(tops.values()), 1.5 * max(tops.values())),
            legend="upper right",
        ),
        Panel(
            "DirectPred is aligned by construction",
            "time $t$",
            r"$\|[F,W_p]\|\,/\,\|F\|\|W_p\|$",
            tuple(
                Curve(name, shown, np.maximum(runs[name][1][:-1], 1e-17), 2 * i)
                for i, name in enumerate(aligned)
            ),
            log="y",
        ),
    )


def existing_fixed_points(sigma2: float, eta: float, tau: float) -> tuple[float, float]:
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
    lower, upper = dyn.fixed_points(sigma2=sigma2, eta=eta, tau=tau)
    return float(lower), float(upper)


def border(*, sigma2: float, alpha_p: float, tau: float, eta: float) -> float:
    """The least p on the parabola from which a mode does not collapse, by bisection."""
    flow = partial(dyn.modes, sigma2=sigma2, alpha_p=alpha_p, tau=tau, eta=eta)
    least = tau / (4 * (1 + sigma2))  # half of the least p₊ there is
    return bisect(lambda p: end(flow, (np.array(p**2 / alpha_p), np.array(p)), eta)[1] > least, tau)


def border_in_s(p: float, *, sigma2: float, alpha_p: float, tau: float, eta: float) -> float:
    """The least s with which a mode that starts at this p does not collapse, by bisection."""
    flow = partial(dyn.modes, sigma2=sigma2, alpha_p=alpha_p, tau=tau, eta=eta)
    least = tau / (4 * (1 + sigma2))
    return bisect(lambda s: end(flow, (np.array(s), np.array(p)), eta)[1] > least, tau**2 / alpha_p)


def border_of_ema(tau: float, *, sigma2: float, alpha_p: float, beta: float, eta: float) -> float:
    """The least p on the parabola from which a mode with τ(0) = τ does not collapse."""
    flow = partial(dyn.modes_ema, sigma2=sigma2, alpha_p=alpha_p, eta=eta, beta=beta)
    least = 1 / (4 * (1 + sigma2))
    return bisect(
        lambda p: end(flow, (np.array(p**2 / alpha_p), np.array(p), np.array(tau)), eta)[1] > least,
        1.0,
    )


def end(flow: Callable[..., Sequence[Array]], start: Sequence[Array], eta: float) -> list[float]:
    """Where the single numbers of a mode are after a time of 40 / η."""
    times = np.array([0, 40 / eta])
    courses = integrate(flow, start, times, method="LSODA", rtol=1e-6, atol=1e-12)
    return [float(course[-1].item()) for course in courses]


def bisect(alive: Callable[[float], bool], high: float) -> float:
    """Where a start begins to be alive, between 0 and a high one that is, to a relative 1e-5."""
    low = 0.0
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if alive(middle) else (middle, high)
    return (low + high) / 2


def _root_of_eq18(p: float, eps: float) -> float:
    """R ≥ 0 with r + ε r² = p: by Eq. 18, the root of the largest s."""
    return 2 * p / (1 + math.sqrt(1 + 4 * eps * p))
