"""Theorem 2, the need for both predictor and stop-gradient, as an experiment on the full system."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .claim import Curve, Finding, Panel, Result
from .equations import H, full, integrate
from .matrices import correlations, decay_rate, integral, norm, random_matrix


def theorem2(
    *,
    dim: int = 6,
    outputs: int = 6,
    sigma2: float = 0.5,
    alpha_p: float = 1.0,
    tau: float = 1.0,
    eta: float = 0.02,
    seed: int = 0,
) -> Result:
    """Theorem 2: without the stop-gradient, or without the predictor, W decays to 0."""
    rng = np.random.default_rng(seed)
    X, X_prime = correlations(dim, sigma2, rng)
    W, W_p = random_matrix(outputs, dim, rng), random_matrix(outputs, outputs, rng)
    data: dict[str, Any] = {"X": X, "X_prime": X_prime, "eta": eta, "tau": tau}
    times = np.linspace(0, 12 / (np.linalg.eigvalsh(X_prime)[0] + eta), 241)

    findings, sizes, rates = [], [], []
    for colour, (name, predictor, stop_gradient) in enumerate(
        (
            ("with both", "trained", True),
            ("no predictor", "none", True),
            ("no stop-gradient", "trained", False),
        )
    ):
        flow = partial(
            full, **data, alpha_p=alpha_p, predictor=predictor, stop_gradient=stop_gradient
        )
        W_t, W_p_t, _ = integrate(flow, (W, W_p, tau * W), times, atol=1e-20)
        size = norm(W_t) / norm(W)
        seen = slice(np.count_nonzero(size > 1e-15))
        t, size = times[seen], size[seen]
        sizes.append(Curve(name, t, size, colour))
        if name == "with both":
            findings.append(Finding("‖W‖/‖W(0)‖ in the end, with both", size[-1]))
            continue
        if predictor == "none":
            W_p_t = np.broadcast_to(np.eye(outputs), W_p_t.shape)
        Hs = np.asarray([H(each, **data, stop_gradient=stop_gradient) for each in W_p_t[seen]])
        w = W_t[seen].swapaxes(1, 2).reshape(len(t), -1)
        lowest = np.linalg.eigvalsh(Hs)[:, 0]
        slope = np.einsum("ti,tij,tj->t", w, Hs, w) / (w**2).sum(1)
        late = t > 0.8 * t[-1]
        findings += [
            Finding(f"λ_min(H), {name}: at least η", lowest.min(), eta, "≥"),
            Finding("  least of (rate of ‖W‖) − λ_min(H)", (slope - lowest).min(), 0, "≥"),
            Finding(
                "  rate of ‖W‖ in the end, against λ_min(H)",
                decay_rate(t[late], size[late]),
                lowest[late].mean(),
                "=" if predictor == "none" else "≥",
            ),
            Finding("  ‖W‖/‖W(0)‖ in the end", size[-1], 1e-4, "≤"),
        ]
        bound, bound_name = np.exp(-integral(lowest, t)), r"$e^{-\int\lambda_{\min}(H)dt}$"
        sizes.append(Curve(bound_name, t, bound, predicted=True))
        rates += [
            Curve(name, t, slope, colour),
            Curve(r"$\lambda_{\min}(H)$", t, lowest, predicted=True),
        ]
    return Result(
        "d vec(W)/dt = −H vec(W) with H ⪰ ηI, so W → 0, without either of the two",
        tuple(findings),
        (
            Panel(
                "Theorem 2: both are needed",
                "time $t$",
                r"$\|W\|\,/\,\|W(0)\|$",
                tuple(sizes),
                log="y",
                ylim=(1e-7, 1e4),
                legend="upper right",
            ),
            Panel(
                r"$W$ decays at least at the rate $\lambda_{\min}(H)$",
                "time $t$",
                r"$-\,d\,\ln\|W\|/dt$",
                tuple(rates),
            ),
        ),
    )
