"""DirectPred in place of a trained predictor, as experiments on modes and full system."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from directpred.solvers import eigh
from directpred.spectrum import Eq18

from .basin import border, existing_fixed_points, parabola
from .claim import Curve, Finding, Panel, Result
from .equations import Array, full, integrate, modes, modes_directpred
from .matrices import misalignment, random_symmetric

RULE, BALANCED, RANDOM = "DirectPred", "trained, on the parabola", "trained, random start"


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
    knobs: dict[str, Any] = {"sigma2": sigma2, "eta": eta, "tau": tau}
    of_full, course, aligned = _full(outputs, seed, alpha_p, eps, knobs)
    of_modes, ends = _modes(alpha_p, eps, knobs)
    return Result(
        "W_p by Eq. 18 of F: aligned by construction; no mode collapses where ε max s > p₋",
        (*of_full, *of_modes),
        (course, ends, aligned),
    )


def _tops(alpha_p: float, eps: float, knobs: dict[str, Any]) -> tuple[dict[str, float], bool]:
    """Where the largest s ends, by predictor; and whether Eq. 18 then lets no mode collapse."""
    lower, upper = existing_fixed_points(**knobs)
    of_rule, of_trained = _root_of_eq18(upper, eps) ** 2, upper**2 / alpha_p
    tops = {RULE: of_rule, BALANCED: of_trained, RANDOM: of_trained}
    return tops, eps * of_rule > lower


def _modes(alpha_p: float, eps: float, knobs: dict[str, Any]) -> tuple[list[Finding], Panel]:
    """The modes alone, many at once; the trained ones start on the parabola."""
    eta, tau, (lower, _) = knobs["eta"], knobs["tau"], existing_fixed_points(**knobs)
    tops, rescued = _tops(alpha_p, eps, knobs)
    by_rule = partial(modes_directpred, rule=Eq18(eps, normalize=False), **knobs)
    trained = partial(modes, alpha_p=alpha_p, **knobs)
    s = np.geomspace(1e-8, 0.3, 60) * tau**2
    times = np.array([0, 60 / eta])
    start = s, np.sqrt(alpha_p * s)
    ends = {
        RULE: integrate(by_rule, (s,), times, rtol=1e-6, atol=0)[0][-1],
        BALANCED: integrate(trained, start, times, rtol=1e-6, atol=1e-30)[0][-1],
    }
    alive = {name: int((end > tops[name] / 4).sum()) for name, end in ends.items()}
    survivors = int((s > lower**2 / alpha_p).sum())
    # The largest mode, by √s.
    r_minus = border(
        by_rule,
        lambda r: (np.array([r**2]),),
        top=tops[RULE],
        eta=eta,
        high=math.sqrt(tops[RULE]),
    )
    p_minus = border(trained, lambda p: parabola(p, alpha_p), top=tops[BALANCED], eta=eta, high=tau)
    sign = ">" if rescued else "<"
    of_rule, root = _root_of_eq18(lower, eps), math.sqrt(alpha_p)
    threshold, height = np.full(2, lower**2 / alpha_p), np.array([0, tops[BALANCED]])
    return [
        Finding(
            f"modes alive of 60, ε max s {sign} p₋, DirectPred",
            alive[RULE],
            60 if rescued else None,
            tolerance=0,
        ),
        Finding("  trained, on the parabola", alive[BALANCED], survivors, tolerance=0),
        Finding("border of the largest √s: r₋", r_minus, of_rule),
        Finding("  trained, on the parabola: p₋/√α_p", p_minus / root, lower / root),
    ], Panel(
        "Where a mode ends, by where it starts",
        "$s_j(0)$",
        r"$s_j(\infty)$",
        (
            Curve(RULE, s, ends[RULE], 0, dots=True),
            Curve(BALANCED, s, ends[BALANCED], 1, dots=True),
            Curve(r"$p_-^2/\alpha_p$", threshold, height, predicted=True),
        ),
        log="x",
        legend="center left",
    )


def _full(
    outputs: int, seed: int, alpha_p: float, eps: float, knobs: dict[str, Any]
) -> tuple[list[Finding], Panel, Panel]:
    """The full system: DirectPred, and trained from a W_p that is balanced, or random."""
    sigma2, eta, tau = knobs["sigma2"], knobs["eta"], knobs["tau"]
    tops, rescued = _tops(alpha_p, eps, knobs)
    lower, _ = existing_fixed_points(**knobs)
    rng, rule, eye = np.random.default_rng(seed), Eq18(eps, normalize=False), np.eye(outputs)
    # Singular values of W(0) over two decades: some modes start in the basin of collapse.
    roots = np.geomspace(0.003, 0.3, outputs) * tau
    u, v = (np.linalg.qr(rng.normal(size=(outputs, outputs)))[0] for _ in range(2))
    W, balanced = (u * roots) @ v, math.sqrt(alpha_p) * (u * roots) @ u.T
    shown = np.linspace(0, 120 / tau**2, 241)
    times = np.append(shown, 2 * shown[-1] + 12 / eta)  # a mode near p₋ takes long to decide
    theory = {"X": eye, "X_prime": sigma2 * eye, "alpha_p": alpha_p, "eta": eta, "tau": tau}
    spectra: dict[str, Array] = {}
    misaligned: dict[str, Array] = {}
    for name, predictor, W_p in (
        (RULE, "directpred", balanced),
        (BALANCED, "symmetric", balanced),
        (RANDOM, "symmetric", 0.3 * random_symmetric(outputs, rng)),
    ):
        flow = partial(full, **theory, predictor=predictor, rule=rule)
        W_t, W_p_t, _ = integrate(flow, (W, W_p, np.zeros_like(W)), times, rtol=1e-7)
        F = W_t @ W_t.swapaxes(1, 2)
        if predictor == "directpred":
            W_p_t = np.asarray([eigh(each, rule) for each in F])
        spectra[name], misaligned[name] = np.linalg.eigvalsh(F), misalignment(F, W_p_t)
    survivors = {
        RULE: outputs if rescued else None,
        BALANCED: int((math.sqrt(alpha_p) * roots > lower).sum()),
        RANDOM: None,
    }
    findings = []
    for name, s in spectra.items():
        alive = int((s[-1] > tops[name] / 4).sum())
        there = s[:, outputs // 2] > 0.9 * tops[name]
        until = times[np.argmax(there)] if alive > outputs // 2 else math.inf
        findings += [
            Finding(f"modes alive of {outputs}, {name}", alive, survivors[name], tolerance=0),
            Finding("  largest eigenvalue of F in the end", s[-1, -1], tops[name]),
            Finding("  time until half of them are there", until),
        ]
    most = misaligned[RULE].max()
    findings.append(Finding("largest ‖L‖/(‖F‖‖W_p‖), DirectPred", most, 1e-12, "≤"))
    ends = np.broadcast_to([tops[RULE], tops[BALANCED]], (2, 2))
    highest = max(tops.values())
    return (
        findings,
        Panel(
            "DirectPred leaves no mode behind",
            "time $t$",
            "eigenvalues of $F$",
            (
                Curve(RULE, shown, spectra[RULE][:-1], 0),
                Curve(BALANCED, shown, spectra[BALANCED][:-1], 1),
                Curve("where they end", shown[[0, -1]], ends, predicted=True),
            ),
            ylim=(-0.05 * highest, 1.5 * highest),
            legend="upper right",
        ),
        Panel(
            "DirectPred is aligned by construction",
            "time $t$",
            r"$\|[F,W_p]\|\,/\,\|F\|\|W_p\|$",
            tuple(
                Curve(name, shown, np.maximum(misaligned[name][:-1], 1e-17), colour)
                for name, colour in ((RULE, 0), (RANDOM, 2))
            ),
            log="y",
        ),
    )


def _root_of_eq18(p: float, eps: float) -> float:
    """R ≥ 0 with r + ε r² = p: by Eq. 18, the root of the largest s."""
    return 2 * p / (1 + math.sqrt(1 + 4 * eps * p))
