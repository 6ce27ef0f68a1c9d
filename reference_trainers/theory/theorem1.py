"""Theorem 1, balance, as an experiment on the full system."""

from __future__ import annotations

from functools import partial

import numpy as np

from .claim import Curve, Finding, Panel, Result
from .equations import full, imbalance, integrate
from .matrices import correlations, decay_rate, norm, random_matrix


def theorem1(
    *,
    dim: int = 8,
    outputs: int = 5,
    sigma2: float = 0.25,
    alpha_p: float = 2.0,
    beta: float = 0.5,
    eta: float = 0.05,
    seed: int = 0,
) -> Result:
    """Theorem 1: encoder and predictor balance at the rate 2η, for any data and target."""
    rng = np.random.default_rng(seed)
    X, X_prime = correlations(dim, sigma2, rng)
    shapes = (outputs, dim), (outputs, outputs), (outputs, dim)
    start = [random_matrix(*shape, rng) for shape in shapes]
    times = np.linspace(0, 4 / eta, 161)
    findings, sizes = [], []
    for colour, rate in enumerate((eta / 4, eta / 2, eta)):
        flow = partial(full, X=X, X_prime=X_prime, alpha_p=alpha_p, eta=rate, beta=beta)
        W, W_p, _ = integrate(flow, start, times)
        C = imbalance(W, W_p, alpha_p)
        size, predicted = norm(C) / norm(C[0]), np.exp(-2 * rate * times)
        seen = size > 1e-5
        sizes += [
            Curve(rf"$\eta={rate:g}$", times[seen], size[seen], colour),
            Curve(r"$e^{-2\eta t}$", times[seen], predicted[seen], predicted=True),
        ]
        findings.append(
            Finding(f"rate of ‖WWᵀ − W_pᵀW_p/α_p‖, η = {rate:g}", decay_rate(times, size), 2 * rate)
        )
    apart = norm(C - C[0] * predicted[:, None, None]).max() / norm(C[0])
    findings.append(Finding("  largest ‖C(t) − e^{−2ηt} C(0)‖/‖C(0)‖", apart, 1e-6, "≤"))
    encoder = np.linalg.eigvalsh(W @ W.swapaxes(1, 2))
    predictor = np.linalg.eigvalsh(W_p.swapaxes(1, 2) @ W_p) / alpha_p
    spectra = (
        Curve(r"$WW^\top$", times, encoder),
        Curve(r"$\alpha_p^{-1}W_p^\top W_p$", times, predictor, predicted=True),
    )
    y = r"$\|WW^\top-\alpha_p^{-1}W_p^\top W_p\|$, relative"
    return Result(
        "W Wᵀ − α_p⁻¹ W_pᵀ W_p = e^{−2ηt} C, for any X, X′ and target",
        tuple(findings),
        (
            Panel(r"Theorem 1: balance at the rate $2\eta$", "time $t$", y, tuple(sizes), log="y"),
            Panel("In the end they share one spectrum", "time $t$", "eigenvalues", spectra),
        ),
    )
