"""The full system with every knob, beside the two systems that it reduces to."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from directpred.spectrum import Eq18

from ..errors import UsageError
from .claim import Curve, Finding, Panel, Result
from .equations import Array, commutator, full, imbalance, integrate, modes, reduced, set_predictor
from .matrices import correlations, norm, random_matrix, random_symmetric


def simulate(
    *,
    dim: int = 8,
    outputs: int = 6,
    sigma2: float = 0.1,
    alpha_p: float = 1.0,
    tau: float = 1.0,
    beta: float | None = None,
    eta: float = 0.02,
    eps: float = 0.1,
    seed: int = 0,
    time: float = 80.0,
    predictor: str = "symmetric",
    stop_gradient: bool = True,
    isotropic: bool = True,
    aligned: bool = True,
) -> Result:
    """The full system with every knob, against the reduced system and the modes.

    The three agree where their assumptions hold: X = I and X′ = σ²I (``isotropic``), a fixed τ, a
    symmetric predictor that is trained, the stop-gradient, and for the modes a start with shared
    eigenvectors (``aligned``).

    Raises:
        UsageError: A target that moves by β, without the stop-gradient.
    """
    if beta is not None and not stop_gradient:
        raise UsageError("--no-stop-gradient takes a target W_a = τW; leave out --beta")
    rng, rule = np.random.default_rng(seed), Eq18(eps, normalize=False)
    X, X_prime = correlations(dim, sigma2, rng, isotropic)
    W, W_p = 0.4 * random_matrix(outputs, dim, rng), 0.4 * random_symmetric(outputs, rng)
    s, u = np.linalg.eigh(W @ X @ W.T)
    if aligned:
        W_p = (u * np.linspace(0.1, 0.4, outputs)) @ u.T
    times = np.linspace(0, time, 241)
    theory: dict[str, Any] = {"alpha_p": alpha_p, "eta": eta, "tau": tau}
    flow = partial(
        full,
        X=X,
        X_prime=X_prime,
        **theory,
        beta=beta,
        stop_gradient=stop_gradient,
        predictor=predictor,
        rule=rule,
    )
    W_t, trained, _ = integrate(flow, (W, W_p, tau * W), times)
    pairs = zip(W_t, trained, strict=True)
    W_p_t = np.asarray([set_predictor(*pair, X, predictor, rule) for pair in pairs])
    F_t = W_t @ X @ W_t.swapaxes(1, 2)
    F_r, W_p_r = integrate(partial(reduced, **theory, sigma2=sigma2), (F_t[0], W_p), times)
    # The modes take what W_p has along the eigenvectors of F.
    start = np.maximum(s, 0), np.diagonal(u.T @ W_p @ u)
    s_t, p_t = integrate(partial(modes, **theory, sigma2=sigma2), start, times)
    of_modes = (u * s_t[:, None, :]) @ u.T

    reducible = isotropic and beta is None and predictor == "symmetric" and stop_gradient
    separable = reducible and aligned
    gaps = [norm(F_t - other).max() / norm(F_t).max() for other in (F_r, of_modes)]
    alike = [1e-5 if comparable else None for comparable in (reducible, separable)]
    balance = (
        Curve(r"$WW^\top-\alpha_p^{-1}W_p^\top W_p$", times, norm(imbalance(W_t, W_p_t, alpha_p))),
        Curve("$[F,W_p]$", times, norm(commutator(F_t, W_p_t)), 1),
    )
    title = "Three systems, one course" if separable else "The full system"
    spectrum = r"eigenvalues of $F=WXW^\top$"
    return Result(
        "full system, reduced system and modes agree where their assumptions hold",
        (
            Finding("‖F − F of the reduced system‖/‖F‖", gaps[0], alike[0], "≤"),
            Finding("‖F − F of the modes‖/‖F‖", gaps[1], alike[1], "≤"),
            Finding("largest eigenvalue of F in the end", np.linalg.eigvalsh(F_t[-1])[-1]),
            Finding("‖W‖/‖W(0)‖ in the end", float(norm(W_t[-1]) / norm(W))),
            Finding("‖[F, W_p]‖ in the end", float(norm(commutator(F_t[-1], W_p_t[-1])))),
        ),
        (
            Panel(title, "time $t$", spectrum, _eigenvalues(times, F_t, F_r, s_t)),
            Panel(
                "The predictor",
                "time $t$",
                "eigenvalues of $W_p$",
                _eigenvalues(times, W_p_t, W_p_r, p_t),
            ),
            Panel("Balance and alignment", "time $t$", "norm", balance, log="y"),
        ),
    )


def _eigenvalues(
    times: Array, of_full: Array, of_reduced: Array, of_modes: Array
) -> tuple[Curve, ...]:
    """Of the symmetric parts, (t, n, n), beside those of the modes, (t, n)."""
    symmetric, few = (of_full + of_full.swapaxes(1, 2)) / 2, slice(None, None, 12)
    return (
        Curve("full system", times, np.linalg.eigvalsh(symmetric)),
        Curve("reduced system", times, np.linalg.eigvalsh(of_reduced), predicted=True),
        Curve("modes", times[few], of_modes[few], 2, dots=True),
    )
