"""Theorem 3, alignment, as an experiment on the reduced system."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .claim import Curve, Finding, Panel, Result
from .equations import K, commutator, integrate, reduced
from .matrices import integral, norm, random_matrix, random_symmetric


def theorem3(
    *,
    outputs: int = 6,
    sigma2: float = 0.1,
    alpha_p: float = 1.0,
    tau: float = 1.0,
    eta: float = 0.02,
    seed: int = 0,
) -> Result:
    """Theorem 3: F and W_p align where λ_min(K) > 0, and need not where it is not."""
    rng = np.random.default_rng(seed)
    knobs: dict[str, Any] = {"alpha_p": alpha_p, "sigma2": sigma2, "eta": eta, "tau": tau}
    noise, psd = random_symmetric(outputs, rng), random_matrix(outputs, outputs, rng)
    psd = psd @ psd.T
    # K ≻ 0 for certain where F ≻ τ² / (2 (1 + σ²)² α_p) I; the second start has little F, and p
    # near τ / (2 (1 + σ²)), where K is least.
    enough, least_at = tau**2 / ((1 + sigma2) ** 2 * alpha_p), tau / (2 * (1 + sigma2))
    eye = np.eye(outputs)
    starts = {
        "much F": (enough * (eye + psd), least_at * noise),
        "little F": (enough / 100 * (eye / 10 + psd), least_at * (eye + noise / 4)),
    }
    times = np.linspace(0, 30 / tau, 601)
    findings, sizes, eigenvalues = [], [], []
    for colour, (name, start) in enumerate(starts.items()):
        F, W_p = integrate(partial(reduced, **knobs), start, times, atol=1e-14)
        size = norm(commutator(F, W_p))
        lowest = np.linalg.eigvalsh(K(F, W_p, **knobs))[:, 0]
        exponent = integral(lowest, times)
        bound = size[0] * np.exp(-2 * exponent)
        seen = size > 1e-9 * size[0]
        sizes += [
            Curve(name, times[seen], size[seen], colour),
            Curve(r"$e^{-2\int\lambda_{\min}(K)dt}$", times[seen], bound[seen], predicted=True),
        ]
        eigenvalues.append(Curve(name, times, lowest, colour))
        over = (size / bound)[seen].max()
        findings.append(Finding(f"largest ‖L‖ over its bound, {name}", over, 1, "≤", 1e-6))
        if name == "much F":
            last = np.flatnonzero(seen)[-1]
            rate = -np.log(size[last] / size[0]) / times[last]
            findings += [
                Finding("  least λ_min(K)", lowest.min(), 0, "≥"),
                Finding("  mean rate of ‖L‖", rate, 2 * exponent[last] / times[last], "≥"),
            ]
        else:
            grown, most = size.max() / size[0], (bound / bound[0]).max()
            findings += [
                Finding("  λ_min(K) at the start", lowest[0], 0, "≤"),
                Finding("  ‖L‖ grows, by a factor > 1", grown, 1, "≥"),
                Finding("  and below its bound's", grown, most, "≤"),
                Finding("  ‖L‖ in the end, over its start", size[-1] / size[0]),
            ]
    zero = Curve("above, alignment is certain", times, np.zeros_like(times), predicted=True)
    return Result(
        "L = [F, W_p] obeys L̇ = −(LK + KL): it decays where λ_min(K) > 0",
        tuple(findings),
        (
            Panel(
                "Theorem 3: alignment, and its bound",
                "time $t$",
                "$\\|[F,W_p]\\|$",
                tuple(sizes),
                log="y",
                legend="lower right",
            ),
            Panel(
                r"The condition, $\lambda_{\min}(K)>0$",
                "time $t$",
                r"$\lambda_{\min}(K)$",
                (*eigenvalues, zero),
            ),
        ),
    )
