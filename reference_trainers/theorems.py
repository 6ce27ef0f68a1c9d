"""Theorems 1 to 3 and the systems they are about, each as an experiment.

A claim is a function of the knobs it has, all by keyword and with defaults, to a `Result`: what was
predicted, and what the integrated equations of `dynamics` do. The claims about single modes are in
`basins`; what is printed and drawn is in `theory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from directpred.spectrum import Eq18

from . import dynamics as dyn
from .dynamics import Array, integrate
from .errors import UsageError


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        what: The quantity.
        measured: On the integrated equations.
        predicted: By the theory; None where it says nothing.
        relation: Of the measured to the predicted: "=", "≤" or "≥".
        tolerance: Of the comparison, relative to the predicted (and to 1e-6 at least).
    """

    what: str
    measured: float
    predicted: float | None = None
    relation: str = "="
    tolerance: float = 0.01

    @property
    def holds(self) -> bool | None:
        """Whether the prediction came true; None where there is none."""
        if self.predicted is None:
            return None
        slack = self.tolerance * max(abs(self.predicted), 1e-6)
        above = bool(self.measured >= self.predicted - slack)
        below = bool(self.measured <= self.predicted + slack)
        return {"=": above and below, "≥": above, "≤": below}[self.relation]


@dataclass(frozen=True)
class Curve:
    """A line in a panel.

    Attributes:
        label: Its name in the legend; "" for none.
        x: (m,).
        y: (m,), or (m, k) for k lines of one name.
        colour: Which of the palette.
        predicted: Whether it is the theory's: dashed, over what is measured.
        dots: Whether its points are drawn, and no line.
    """

    label: str
    x: Array
    y: Array
    colour: int = 0
    predicted: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Cells:
    """A phase diagram: values (len(y), len(x)) in [0, 1], 0 for collapse."""

    x: Array
    y: Array
    values: Array


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        title: What is seen.
        x: Label of the axis.
        y: Label of the axis.
        curves: The lines.
        log: The axes that are logarithmic: "", "x", "y" or "xy".
        cells: Shades below the lines.
        ylim: Limits, where not those of the data.
        xlim: Likewise.
        legend: Where matplotlib puts it.
        texts: Words in the plot: (x, y, text).
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    log: str = ""
    cells: Cells | None = None
    ylim: tuple[float, float] | None = None
    xlim: tuple[float, float] | None = None
    legend: str = "best"
    texts: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True)
class Result:
    """What a claim came to: the claim in a sentence, the lines of the table, the figure."""

    claim: str
    findings: tuple[Finding, ...]
    panels: tuple[Panel, ...]


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
    start = (
        random_matrix(outputs, dim, rng),
        random_matrix(outputs, outputs, rng),
        random_matrix(outputs, dim, rng),
    )
    times = np.linspace(0, 4 / eta, 161)
    findings, sizes = [], []
    for colour, rate in enumerate((eta / 4, eta / 2, eta)):
        flow = partial(dyn.full, X=X, X_prime=X_prime, alpha_p=alpha_p, eta=rate, beta=beta)
        W, W_p, _ = integrate(flow, start, times)
        C = dyn.imbalance(W, W_p, alpha_p)
        size = norm(C) / norm(C[0])
        seen = size > 1e-5
        findings.append(
            Finding(f"rate of ‖WWᵀ − W_pᵀW_p/α_p‖, η = {rate:g}", decay_rate(times, size), 2 * rate)
        )
        sizes += [
            Curve(rf"$\eta={rate:g}$", times[seen], size[seen], colour),
            Curve("", times[seen], np.exp(-2 * rate * times[seen]), predicted=True),
        ]
    apart = norm(C - C[0] * np.exp(-2 * eta * times)[:, None, None]).max()
    findings.append(
        Finding("  largest ‖C(t) − e^{−2ηt} C(0)‖/‖C(0)‖", apart / norm(C[0]), 1e-6, "≤")
    )
    sizes[-1] = Curve(r"$e^{-2\eta t}$", sizes[-1].x, sizes[-1].y, predicted=True)
    encoder = np.linalg.eigvalsh(W @ W.swapaxes(1, 2))
    predictor = np.linalg.eigvalsh(W_p.swapaxes(1, 2) @ W_p) / alpha_p
    return Result(
        "W Wᵀ − α_p⁻¹ W_pᵀ W_p = e^{−2ηt} C, for any X, X′ and target",
        tuple(findings),
        (
            Panel(
                r"Theorem 1: balance at the rate $2\eta$",
                "time $t$",
                r"$\|WW^\top-\alpha_p^{-1}W_p^\top W_p\|$, relative",
                tuple(sizes),
                log="y",
            ),
            Panel(
                "In the end they share one spectrum",
                "time $t$",
                "eigenvalues",
                (
                    Curve(r"$WW^\top$", times, encoder),
                    Curve(r"$\alpha_p^{-1}W_p^\top W_p$", times, predictor, predicted=True),
                ),
            ),
        ),
    )


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

    def follow(**options: Any) -> tuple[Array, Array, Array]:
        flow = partial(dyn.full, alpha_p=alpha_p, **data, **options)
        W_t, W_p_t, _ = integrate(flow, (W, W_p, tau * W), times, atol=1e-20)
        return W_t, W_p_t, norm(W_t) / norm(W)

    *_, size = follow()
    findings = [Finding("‖W‖/‖W(0)‖ in the end, with both", size[-1])]
    sizes, rates = [Curve("with both", times, size)], []
    for colour, name, options in (
        (1, "no predictor", {"predictor": "none"}),
        (2, "no stop-gradient", {"stop_gradient": False}),
    ):
        W_t, W_p_t, size = follow(**options)
        seen = slice(np.count_nonzero(size > 1e-15))
        W_t, W_p_t, size, course = W_t[seen], W_p_t[seen], size[seen], times[seen]
        stop_gradient = name == "no predictor"
        if stop_gradient:
            W_p_t = np.broadcast_to(np.eye(outputs), W_p_t.shape)
        least, rate = [], []
        for w, weight in zip(W_t.swapaxes(1, 2).reshape(len(W_t), -1), W_p_t, strict=True):
            H = dyn.H(weight, **data, stop_gradient=stop_gradient)
            least.append(np.linalg.eigvalsh(H)[0])
            rate.append(w @ H @ w / (w @ w))
        lowest, slope = np.asarray(least), np.asarray(rate)
        late = course > 0.8 * course[-1]
        findings += [
            Finding(f"λ_min(H), {name}: at least η", lowest.min(), eta, "≥"),
            Finding("  least of (rate of ‖W‖) − λ_min(H)", (slope - lowest).min(), 0, "≥"),
            Finding(
                "  rate of ‖W‖ in the end, against λ_min(H)",
                decay_rate(course[late], size[late]),
                lowest[late].mean(),
                "=" if stop_gradient else "≥",
            ),
            Finding("  ‖W‖/‖W(0)‖ in the end", size[-1], 1e-4, "≤"),
        ]
        bound = np.exp(-integral(lowest, course))
        sizes += [Curve(name, course, size, colour), Curve("", course, bound, predicted=True)]
        rates += [Curve(name, course, slope, colour), Curve("", course, lowest, predicted=True)]
    sizes[-1] = Curve(r"$e^{-\int\lambda_{\min}(H)dt}$", course, bound, predicted=True)
    rates[-1] = Curve(r"$\lambda_{\min}(H)$", course, lowest, predicted=True)
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
    much = enough * (eye + psd), least_at * noise
    little = enough / 100 * (eye / 10 + psd), least_at * (eye + noise / 4)
    times = np.linspace(0, 30 / tau, 601)
    findings, sizes, eigenvalues = [], [], []
    for colour, name, start in ((0, "much F", much), (1, "little F", little)):
        F, W_p = integrate(partial(dyn.reduced, **knobs), start, times, atol=1e-14)
        size = norm(dyn.commutator(F, W_p))
        lowest = np.linalg.eigvalsh(dyn.K(F, W_p, **knobs))[:, 0]
        exponent = integral(lowest, times)
        seen = size > 1e-9 * size[0]
        bound = size[0] * np.exp(-2 * exponent)
        sizes += [
            Curve(name, times[seen], size[seen], colour),
            Curve("", times[seen], bound[seen], predicted=True),
        ]
        eigenvalues.append(Curve(name, times, lowest, colour))
        over = (size / bound)[seen].max()
        findings.append(Finding(f"largest ‖L‖ over its bound, {name}", over, 1, "≤", 1e-6))
        if name == "much F":
            last = np.flatnonzero(seen)[-1]
            rate = -math.log(size[last] / size[0]) / times[last]
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
    sizes[-1] = Curve(r"$e^{-2\int\lambda_{\min}(K)dt}$", sizes[-1].x, sizes[-1].y, predicted=True)
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
    rng, rule = np.random.default_rng(seed), Eq18(eps)
    X, X_prime = correlations(dim, sigma2, rng, isotropic)
    W, W_p = 0.4 * random_matrix(outputs, dim, rng), 0.4 * random_symmetric(outputs, rng)
    s, u = np.linalg.eigh(W @ X @ W.T)
    if aligned:
        W_p = (u * np.linspace(0.1, 0.4, outputs)) @ u.T
    times = np.linspace(0, time, 241)
    flow = partial(
        dyn.full,
        X=X,
        X_prime=X_prime,
        alpha_p=alpha_p,
        eta=eta,
        tau=tau,
        beta=beta,
        stop_gradient=stop_gradient,
        predictor=predictor,
        rule=rule,
    )
    W_t, trained, _ = integrate(flow, (W, W_p, tau * W), times)
    pairs = zip(W_t, trained, strict=True)
    W_p_t = np.asarray([dyn.set_predictor(*pair, X, predictor, rule) for pair in pairs])
    F_t = W_t @ X @ W_t.swapaxes(1, 2)
    theory: dict[str, Any] = {"alpha_p": alpha_p, "sigma2": sigma2, "eta": eta, "tau": tau}
    F_r, W_p_r = integrate(partial(dyn.reduced, **theory), (F_t[0], W_p), times)
    # The modes take what W_p has along the eigenvectors of F.
    start = np.maximum(s, 0), np.diagonal(u.T @ W_p @ u)
    s_t, p_t = integrate(partial(dyn.modes, **theory), start, times)

    reducible = isotropic and beta is None and predictor == "symmetric" and stop_gradient
    of_modes = (u * s_t[:, None, :]) @ u.T
    largest, few = norm(F_t).max(), slice(None, None, 12)

    def eigenvalues(full: Array, of_reduced: Array, of_the_modes: Array) -> tuple[Curve, ...]:
        symmetric = (full + full.swapaxes(1, 2)) / 2
        return (
            Curve("full system", times, np.linalg.eigvalsh(symmetric)),
            Curve("reduced system", times, np.linalg.eigvalsh(of_reduced), predicted=True),
            Curve("modes", times[few], of_the_modes[few], 2, dots=True),
        )

    return Result(
        "full system, reduced system and modes agree where their assumptions hold",
        (
            Finding(
                "‖F − F of the reduced system‖/‖F‖",
                norm(F_t - F_r).max() / largest,
                1e-5 if reducible else None,
                "≤",
            ),
            Finding(
                "‖F − F of the modes‖/‖F‖",
                norm(F_t - of_modes).max() / largest,
                1e-5 if reducible and aligned else None,
                "≤",
            ),
            Finding("largest eigenvalue of F in the end", np.linalg.eigvalsh(F_t[-1])[-1]),
            Finding("‖W‖/‖W(0)‖ in the end", float(norm(W_t[-1]) / norm(W))),
            Finding("‖[F, W_p]‖ in the end", float(norm(dyn.commutator(F_t[-1], W_p_t[-1])))),
        ),
        (
            Panel(
                "Three systems, one course" if reducible and aligned else "The full system",
                "time $t$",
                r"eigenvalues of $F=WXW^\top$",
                eigenvalues(F_t, F_r, s_t),
            ),
            Panel(
                "The predictor", "time $t$", "eigenvalues of $W_p$", eigenvalues(W_p_t, W_p_r, p_t)
            ),
            Panel(
                "Balance and alignment",
                "time $t$",
                "norm",
                (
                    Curve(
                        r"$WW^\top-\alpha_p^{-1}W_p^\top W_p$",
                        times,
                        norm(dyn.imbalance(W_t, W_p_t, alpha_p)),
                    ),
                    Curve("$[F,W_p]$", times, norm(dyn.commutator(F_t, W_p_t)), 1),
                ),
                log="y",
            ),
        ),
    )


def correlations(
    dim: int, sigma2: float, rng: np.random.Generator, isotropic: bool = False
) -> tuple[Array, Array]:
    """X and X′, (dim, dim): I and σ²I, or with eigenvalues of 0.4 to 2 times that, turned."""
    if isotropic:
        return np.eye(dim), sigma2 * np.eye(dim)
    spread = np.geomspace(0.4, 2.0, dim)
    bases = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2)]
    X, X_prime = ((basis * spread) @ basis.T for basis in bases)
    return X, sigma2 * X_prime


def random_matrix(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """A (rows, columns) matrix of normal numbers, with a spectral norm of about 1."""
    return rng.normal(size=(rows, columns)) / math.sqrt(rows + columns)


def random_symmetric(dim: int, rng: np.random.Generator) -> Array:
    """The symmetric part of such a (dim, dim) matrix."""
    matrix = random_matrix(dim, dim, rng)
    return (matrix + matrix.T) / 2


def norm(x: Array) -> Array:
    """Frobenius norms of the matrices in the last two axes."""
    norms: Array = np.linalg.norm(x, axis=(-2, -1))
    return norms


def integral(y: Array, x: Array) -> Array:
    """The integral from the first x to each, by the trapezoidal rule; all (m,)."""
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])


def decay_rate(times: Array, size: Array) -> float:
    """The rate of an exponential decay, fitted down to 1e-5 of its start."""
    seen = size > 1e-5 * size[0]
    return float(-np.polyfit(times[seen], np.log(size[seen]), 1)[0])
