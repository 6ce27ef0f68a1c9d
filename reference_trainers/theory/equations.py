"""The theory of Tian, Chen and Ganguli (ICML 2021, arXiv 2102.06810) as differential equations.

A linear online network W (n, d), a predictor W_p (n, n) and a target W_a (n, d) descend

    J = ½ E‖W_p W x₁ − sg(W_a x₂)‖² + weight decay,

x₁ and x₂ being two augmentations of one datum, with X = E[x̄ x̄ᵀ] the correlation of the data's means
over augmentations and X′ the augmentations' expected covariance, both (d, d). The time of the
gradient flow is in units of 1 / learning rate of W.

================================================================================ ==================
equation                                                                         here
================================================================================ ==================
Ẇ_p = α_p (−W_p W (X + X′) + W_a X) Wᵀ − η W_p                                   `full`
Ẇ = W_pᵀ (−W_p W (X + X′) + W_a X) − η W,  Ẇ_a = β (W − W_a)                     `full`
Theorem 1: W Wᵀ − α_p⁻¹ W_pᵀ W_p = e^{−2ηt} C                                    `imbalance`
Theorem 2: d vec(W)/dt = −H vec(W), H ⪰ 0                                        `H`
Ḟ = −(1 + σ²){W_p², F} + τ{W_p, F} − 2ηF                                         `reduced`
Ẇ_p = −½ α_p (1 + σ²){W_p, F} + α_p τ F − η W_p                                  `reduced`
Theorem 3: L = [F, W_p] obeys L̇ = −(L K + K L)                                   `commutator`, `K`
ṡ_j = 2 p_j s_j (τ − (1 + σ²)p_j) − 2η s_j                                       `modes`
ṗ_j = α_p s_j (τ − (1 + σ²)p_j) − η p_j                                          `modes`
τ̇ = β (1 − τ) − τ ẇ/w, w = √s                                                    `modes_ema`
p_j = √s_j + ε max s (Eq. 18), and ṡ_j as above                                  `modes_directpred`
p± = (τ ± √(τ² − 4η(1 + σ²))) / (2(1 + σ²))                                      `fixed_points`
the border of the basin of collapse, off the parabola s = p² / α_p               `separatrix`
================================================================================ ==================

`reduced` follows from `full` for X = I, X′ = σ² I, W_a = τW, a W_p that is kept symmetric, and
F = W Wᵀ; `modes` from `reduced` where F and W_p share their eigenvectors, s_j and p_j being their
eigenvalues. With q = α_p s the modes do not depend on α_p at all, so that α_p decides only how
large a given s counts. A fixed τ is a clock: F/τ², W_p/τ, η/τ² and τ²t obey the reduced system with
τ = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from directpred.solvers import eigh
from directpred.spectrum import Eq18, Rule

from ..errors import UserError

Array = NDArray[np.floating[Any]]
Number = float | Array
"""A number, or an array of them for a whole diagram at once."""


def integrate(
    flow: Callable[..., Sequence[Array]],
    start: Sequence[Number],
    times: Array,
    *,
    method: str = "DOP853",
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> list[Array]:
    """Integrate an autonomous system of arrays by scipy's `solve_ivp`.

    Args:
        flow: From the arrays of the state to their derivatives.
        start: The state at ``times[0]``, numbers or arrays of any shapes.
        times: Where to tell the state, (t,), ascending.
        method: Of `solve_ivp`; LSODA where scales of time differ much.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Returns:
        For every array of the state its course, (t, *shape).

    Raises:
        UserError: The solver gave up.
    """
    shapes = [np.shape(x) for x in start]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def unpack(y: Array) -> list[Array]:
        parts = np.split(y, ends)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def pack(arrays: Sequence[Number]) -> Array:
        return np.concatenate([np.ravel(x) for x in arrays])

    solved = solve_ivp(
        lambda _, y: pack(flow(*unpack(y))),
        (times[0], times[-1]),
        pack(start),
        method=method,
        t_eval=times,
        rtol=rtol,
        atol=atol,
    )
    if not solved.success:
        raise UserError(
            f"the equations cannot be integrated to t = {times[-1]:g}: {solved.message}"
        )
    courses = np.split(solved.y.T, ends, axis=1)
    return [x.reshape(len(times), *shape) for x, shape in zip(courses, shapes, strict=True)]


def full(
    W: Array,
    W_p: Array,
    W_a: Array,
    *,
    X: Array,
    X_prime: Array,
    alpha_p: float,
    eta: float,
    tau: float = 1.0,
    beta: float | None = None,
    stop_gradient: bool = True,
    predictor: str = "trained",
    rule: Rule | None = None,
) -> tuple[Array, Array, Array]:
    """The full matrix system: Ẇ, Ẇ_p and Ẇ_a.

    Args:
        W: The online network, (n, d).
        W_p: The predictor, (n, n); read where it is trained, see `set_predictor`.
        W_a: The target, (n, d); read where there is a β.
        X: Correlation of the data, (d, d).
        X_prime: X′, covariance of the augmentations, (d, d).
        alpha_p: Learning rate of the predictor over that of W.
        eta: Weight decay.
        tau: W_a = τW, where there is no β.
        beta: Rate of the target, Ẇ_a = β(W − W_a).
        stop_gradient: Whether W learns through its own branch alone; without it also through that
            of the target W_a = τW. With a β the target is no function of W, and has to be left.
        predictor: How W_p comes about: ``trained`` by the gradient, ``symmetric`` by the symmetric
            part of it, ``directpred`` from F by the rule; ``none`` is W_p = I.
        rule: For ``directpred``, from the eigenvalues of F = W X Wᵀ to those of W_p.

    Returns:
        The derivatives, in the shapes of W, W_p and W_a; those of what is not integrated are 0.
    """
    W_p = set_predictor(W, W_p, X, predictor, rule)
    target = W_a if beta is not None else tau * W
    G = -W_p @ W @ (X + X_prime) + target @ X
    W_dot = W_p.T @ G - eta * W
    if not stop_gradient:
        W_dot += tau * (W_p @ W @ X - target @ (X + X_prime))
    W_p_dot = np.zeros_like(W_p)
    if predictor in ("trained", "symmetric"):
        W_p_dot = alpha_p * G @ W.T - eta * W_p
    if predictor == "symmetric":
        W_p_dot = (W_p_dot + W_p_dot.T) / 2
    return W_dot, W_p_dot, np.zeros_like(W) if beta is None else beta * (W - W_a)


def set_predictor(W: Array, W_p: Array, X: Array, predictor: str, rule: Rule | None) -> Array:
    """The predictor in use: the trained W_p, the identity, or what the rule makes of F.

    Arguments as for `full`; returns W_p, (n, n).
    """
    if predictor == "none":
        return np.eye(len(W))
    if predictor == "directpred":
        weight: Array = eigh(W @ X @ W.T, rule or Eq18(normalize=False))
        return weight
    return W_p


def imbalance(W: Array, W_p: Array, alpha_p: float) -> Array:
    """W Wᵀ − α_p⁻¹ W_pᵀ W_p, (n, n), or (t, n, n) of a course, which decays as e^{−2ηt}."""
    return W @ W.swapaxes(-1, -2) - W_p.swapaxes(-1, -2) @ W_p / alpha_p


def H(
    W_p: Array,
    *,
    X: Array,
    X_prime: Array,
    eta: float,
    tau: float = 1.0,
    stop_gradient: bool,
) -> Array:
    """H of Theorem 2, with W_a = τW: d vec(W)/dt = −H vec(W), vec stacking the columns.

    Without the stop-gradient, for any W_p,

        H = X′ ⊗ (W_pᵀ W_p + τ² I) + X ⊗ (W_p − τI)ᵀ(W_p − τI) + η I ⪰ η I.

    With it, H = (X + X′) ⊗ W_pᵀ W_p − τ X ⊗ W_pᵀ + η I, which may have any sign; without a
    predictor, W_p = I, this is X′ ⊗ I + (1 − τ) X ⊗ I + η I, ⪰ η I for τ ≤ 1.

    Returns:
        (n d, n d).
    """
    eye = np.eye(len(W_p))
    decay = eta * np.eye(len(W_p) * len(X))
    if stop_gradient:
        return np.kron(X + X_prime, W_p.T @ W_p) - tau * np.kron(X, W_p.T) + decay
    gap = W_p - tau * eye
    return np.kron(X_prime, W_p.T @ W_p + tau**2 * eye) + np.kron(X, gap.T @ gap) + decay


def reduced(
    F: Array, W_p: Array, *, alpha_p: float, sigma2: float, eta: float, tau: float
) -> tuple[Array, Array]:
    """The reduced system: Ḟ and Ẇ_p, both (n, n), of symmetric F and W_p."""
    a = 1 + sigma2
    F_dot = -a * _anticommutator(W_p @ W_p, F) + tau * _anticommutator(W_p, F) - 2 * eta * F
    W_p_dot = -alpha_p / 2 * a * _anticommutator(W_p, F) + alpha_p * tau * F - eta * W_p
    return F_dot, W_p_dot


def commutator(F: Array, W_p: Array) -> Array:
    """L = [F, W_p], (n, n), or (t, n, n) of a course: 0 where the eigenvectors are shared."""
    return F @ W_p - W_p @ F


def K(F: Array, W_p: Array, *, alpha_p: float, sigma2: float, eta: float, tau: float) -> Array:
    """K of Theorem 3, (n, n), or (t, n, n) of a course: L̇ = −(LK + KL) for L = [F, W_p].

    K = (1 + σ²)(½ α_p F + W_p²) − τ W_p + 3/2 η I. L is antisymmetric and K symmetric, so
    d‖L‖²/dt = −4 tr(Lᵀ K L) and ‖L(t)‖ ≤ ‖L(0)‖ exp(−2 ∫ λ_min(K) dt).
    """
    a = 1 + sigma2
    return a * (alpha_p / 2 * F + W_p @ W_p) - tau * W_p + 1.5 * eta * np.eye(F.shape[-1])


def modes(
    s: Array, p: Array, *, alpha_p: Number, sigma2: Number, eta: Number, tau: Number
) -> tuple[Array, Array]:
    """The decoupled modes: ṡ and ṗ, of s and p of any one shape; s − p²/α_p decays as e^{−2ηt}."""
    pull = tau - (1 + sigma2) * p
    return 2 * p * s * pull - 2 * eta * s, alpha_p * s * pull - eta * p


def modes_ema(
    s: Array, p: Array, tau: Array, *, alpha_p: Number, sigma2: Number, eta: Number, beta: Number
) -> tuple[Array, Array, Array]:
    """The modes with a target w_a = τw that follows w = √s by ẇ_a = β(w − w_a): ṡ, ṗ and τ̇.

    A mode that grows at the rate g leaves its target behind at τ = β / (β + g). One at rest has
    τ = 1, so the fixed points are those of `modes` with τ = 1.
    """
    s_dot, p_dot = modes(s, p, alpha_p=alpha_p, sigma2=sigma2, eta=eta, tau=tau)
    growth = p * (tau - (1 + sigma2) * p) - eta
    return s_dot, p_dot, beta * (1 - tau) - tau * growth


def modes_directpred(
    s: Array, *, rule: Rule, sigma2: float, eta: float, tau: float
) -> tuple[Array]:
    """The modes where a rule sets p from s, (n,), ascending as rules take them: ṡ, (n,)."""
    p = rule(np.maximum(s, 0))  # a step of the solver may try less
    return (2 * s * (p * (tau - (1 + sigma2) * p) - eta),)


def fixed_points(*, sigma2: Number, eta: Number, tau: Number) -> tuple[Array, Array]:
    """p₋ (unstable) and p₊ (stable) of the modes; NaN where all collapses, τ² < 4η(1 + σ²).

    On the parabola s = p²/α_p, ṗ = −p((1 + σ²)p² − τp + η) whatever α_p, which enters only by
    s± = p±²/α_p.
    """
    a, tau = 1 + np.asarray(sigma2), np.asarray(tau)
    square = np.asarray(tau**2 - 4 * np.asarray(eta) * a)
    root = np.sqrt(np.where(square >= 0, square, np.nan))
    # p₋ p₊ = η / (1 + σ²): for a small η the difference would be of rounding only.
    upper = (tau + root) / (2 * a)
    return np.asarray(eta / (a * upper)), upper


def escape_rate(*, sigma2: float, eta: float, beta: Number) -> Number:
    """The rate λ at which a mode with an EMA target leaves p₋.

    In (p, τ) on the parabola the linear system at p₋ has the trace −2(1 + σ²)p² − β and the
    determinant −βp(1 − 2(1 + σ²)p), so it is a saddle for every β > 0, and λ < p(1 − 2(1 + σ²)p),
    the rate of a target without delay.
    """
    p, a = fixed_points(sigma2=sigma2, eta=eta, tau=1.0)[0], 1 + sigma2
    half_trace = -(a * p**2 + beta / 2)
    rate: Number = half_trace + np.sqrt(half_trace**2 + beta * p * (1 - 2 * a * p))
    return rate


def separatrix(p: float, *, sigma2: float, eta: float, tau: float) -> float:
    """Q = α_p s above which a mode that starts at this p does not collapse.

    The border of the basin of collapse is the stable manifold of the saddle (p₋, q₋ = p₋²), which
    the flow, turned round, follows from the saddle along its eigenvector of the eigenvalue −2η.

    Args:
        p: Where the mode starts, > 0.
        sigma2: σ².
        eta: η, > 0.
        tau: τ.

    Returns:
        The border; infinity where every mode collapses.
    """
    a = 1 + sigma2
    saddle = float(fixed_points(sigma2=sigma2, eta=eta, tau=tau)[0])
    if np.isnan(saddle):
        return np.inf
    towards = np.sign(p - saddle)
    if towards == 0:
        return saddle**2
    # (J + 2η) v = 0 for the Jacobian J at the saddle, whose lower right entry is 0.
    v = np.array([1.0, -(saddle**2) * (tau - 2 * a * saddle) / eta])
    start = np.array([saddle, saddle**2]) + 1e-6 * saddle * towards * v
    flow = partial(modes, alpha_p=1.0, sigma2=sigma2, eta=eta, tau=tau)

    def backward(_: float, y: Array) -> Array:
        q_dot, p_dot = flow(y[1], y[0])
        return -np.asarray([p_dot, q_dot])

    def arrived(_: float, y: Array) -> float:
        return float(y[0] - p)

    arrived.terminal = True  # type: ignore[attr-defined]
    solved = solve_ivp(backward, (0, 1e3 / eta), start, "LSODA", events=arrived, rtol=1e-9, atol=0)
    return float(solved.y_events[0][0][1])


def _anticommutator(A: Array, B: Array) -> Array:
    return A @ B + B @ A
