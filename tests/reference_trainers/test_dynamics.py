"""`directpred dynamics`: the equations against the loss they descend, and each claim's number."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the train extra")

import matplotlib.image
import sympy
import torch

from directpred import DirectPred, Eq18
from directpred.reference_trainers.cli import main
from directpred.reference_trainers.errors import UserError
from directpred.reference_trainers.theory import command, knobs
from directpred.reference_trainers.theory import equations as dyn
from directpred.reference_trainers.theory.claim import Finding

SMALL = {"alpha_p": 1.7, "sigma2": 0.3, "eta": 0.07, "tau": 0.8}


# The equations


def symbols(shape: tuple[int, int], name: str, symmetric: bool = False) -> np.ndarray:
    entries = np.empty(shape, dtype=object)
    for i, j in np.ndindex(shape):
        at = (min(i, j), max(i, j)) if symmetric else (i, j)
        entries[i, j] = sympy.Symbol(f"{name}_{at[0]}{at[1]}")
    return entries


def is_zero(expressions: Any) -> bool:
    return all(sympy.expand(sympy.nsimplify(x)) == 0 for x in np.ravel(expressions))


def loss(W, W_p, target, means, offsets):
    """J over all pairs of augmentations x = mean + offset; offsets are (data, augmentations, d)."""
    x = means[:, None, :] + offsets
    predicted, aimed = x @ W.T @ W_p.T, x @ target.T
    gap = predicted[:, :, None, :] - aimed[:, None, :, :]
    return 0.5 * (gap**2).sum(-1).mean()


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"tau": 0.7}, lambda W, W_a: 0.7 * W.detach()),
        ({"beta": 0.3}, lambda W, W_a: W_a),
        ({"tau": 0.7, "stop_gradient": False}, lambda W, W_a: 0.7 * W),
    ],
)
def test_the_flow_descends_the_loss(rng, options, target) -> None:
    n, d = 3, 4
    W, W_a, W_p = rng.normal(size=(n, d)), rng.normal(size=(n, d)), rng.normal(size=(n, n))
    means, offsets = rng.normal(size=(5, d)), rng.normal(size=(5, 6, d))
    offsets -= offsets.mean(1, keepdims=True)
    X = means.T @ means / 5
    X_prime = np.einsum("iaj,iak->jk", offsets, offsets) / 30
    alpha_p, eta = 1.7, 0.07

    w, w_p = (torch.tensor(x, requires_grad=True) for x in (W, W_p))
    fixed = map(torch.tensor, (W_a, means, offsets))
    w_a, *data = fixed
    loss(w, w_p, target(w, w_a), *data).backward()

    W_dot, W_p_dot, W_a_dot = dyn.full(
        W, W_p, W_a, X=X, X_prime=X_prime, alpha_p=alpha_p, eta=eta, **options
    )
    np.testing.assert_allclose(W_dot, -w.grad.numpy() - eta * W, atol=1e-12)
    np.testing.assert_allclose(W_p_dot, -alpha_p * w_p.grad.numpy() - eta * W_p, atol=1e-12)
    np.testing.assert_allclose(W_a_dot, options.get("beta", 0) * (W - W_a), atol=1e-12)


def test_theorem_1_is_an_identity_of_the_flow() -> None:
    """Symbolically, of the code: d(WWᵀ − W_pᵀW_p/α_p)/dt = −2η times that."""
    W, W_p, W_a = symbols((2, 3), "w"), symbols((2, 2), "p"), symbols((2, 3), "a")
    X, X_prime = symbols((3, 3), "x", symmetric=True), symbols((3, 3), "y", symmetric=True)
    alpha_p, eta, beta = sympy.symbols("alpha_p eta beta")
    W_dot, W_p_dot, _ = dyn.full(
        W, W_p, W_a, X=X, X_prime=X_prime, alpha_p=alpha_p, eta=eta, beta=beta
    )
    change = W_dot @ W.T + W @ W_dot.T - (W_p_dot.T @ W_p + W_p.T @ W_p_dot) / alpha_p
    assert is_zero(change + 2 * eta * dyn.imbalance(W, W_p, alpha_p))
    assert not is_zero(change + eta * dyn.imbalance(W, W_p, alpha_p))


@pytest.mark.parametrize("predictor", ["trained", "none"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_theorem_2_is_an_identity_of_the_flow(rng, predictor, stop_gradient) -> None:
    n, d, eta, tau = 3, 4, 0.07, 0.8
    W, W_p = rng.normal(size=(n, d)), rng.normal(size=(n, n))
    roots = rng.normal(size=(2, d, d))
    X, X_prime = roots @ roots.swapaxes(1, 2)
    data = {"X": X, "X_prime": X_prime, "eta": eta, "tau": tau, "stop_gradient": stop_gradient}
    W_dot, W_p_dot, _ = dyn.full(W, W_p, W, alpha_p=1.0, predictor=predictor, **data)
    H = dyn.H(np.eye(n) if predictor == "none" else W_p, **data)
    np.testing.assert_allclose(W_dot.ravel("F"), -H @ W.ravel("F"), rtol=1e-12)
    np.testing.assert_allclose(H, H.T if predictor == "none" or not stop_gradient else H)
    if not stop_gradient or predictor == "none":
        assert np.linalg.eigvalsh(H)[0] >= eta
    assert W_p_dot.any() == (predictor == "trained")


def test_theorem_3_is_an_identity_of_the_flow() -> None:
    """Symbolically, of the code: dL/dt = −(LK + KL)."""
    F, W_p = symbols((3, 3), "f", symmetric=True), symbols((3, 3), "p", symmetric=True)
    theory = dict(zip(SMALL, sympy.symbols("alpha_p sigma2 eta tau"), strict=True))
    F_dot, W_p_dot = dyn.reduced(F, W_p, **theory)
    L, K = dyn.commutator(F, W_p), dyn.K(F, W_p, **theory)
    change = dyn.commutator(F_dot, W_p) + dyn.commutator(F, W_p_dot)
    assert is_zero(change + L @ K + K @ L)
    assert not is_zero(change + L @ K)


def test_the_reduced_system_follows_from_the_full_one(rng) -> None:
    W, W_p = rng.normal(size=(3, 5)), rng.normal(size=(3, 3))
    W_p = W_p + W_p.T
    alpha_p, sigma2, eta, tau = SMALL.values()
    W_dot, W_p_dot, _ = dyn.full(
        *(W, W_p, W),
        X=np.eye(5),
        X_prime=sigma2 * np.eye(5),
        alpha_p=alpha_p,
        eta=eta,
        tau=tau,
        predictor="symmetric",
    )
    F_dot_r, W_p_dot_r = dyn.reduced(W @ W.T, W_p, **SMALL)
    np.testing.assert_allclose(W_dot @ W.T + W @ W_dot.T, F_dot_r, atol=1e-12)
    np.testing.assert_allclose(W_p_dot, W_p_dot_r, atol=1e-12)


def test_a_fixed_target_is_a_clock(rng) -> None:
    F, W_p = (x + x.T for x in rng.normal(size=(2, 3, 3)))
    alpha_p, sigma2, eta, tau = SMALL.values()
    F_dot, W_p_dot = dyn.reduced(F, W_p, **SMALL)
    scaled = {"alpha_p": alpha_p, "sigma2": sigma2, "eta": eta / tau**2, "tau": 1.0}
    F_dot_1, W_p_dot_1 = dyn.reduced(F / tau**2, W_p / tau, **scaled)
    np.testing.assert_allclose(F_dot, F_dot_1 * tau**4, atol=1e-12)
    np.testing.assert_allclose(W_p_dot, W_p_dot_1 * tau**3, atol=1e-12)


def test_the_modes_follow_from_the_reduced_system(rng) -> None:
    u, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    s, p = rng.uniform(0, 1, 4), rng.normal(size=4)
    F_dot, W_p_dot = dyn.reduced((u * s) @ u.T, (u * p) @ u.T, **SMALL)
    s_dot, p_dot = dyn.modes(s, p, **SMALL)
    np.testing.assert_allclose(F_dot, (u * s_dot) @ u.T, atol=1e-12)
    np.testing.assert_allclose(W_p_dot, (u * p_dot) @ u.T, atol=1e-12)


def test_the_parabola_and_its_fixed_points_symbolically() -> None:
    s, p, alpha_p, sigma2, eta, tau = sympy.symbols("s p alpha_p sigma2 eta tau", positive=True)
    flow = partial(dyn.modes, alpha_p=alpha_p, sigma2=sigma2, eta=eta, tau=tau)
    s_dot, p_dot = flow(s, p)
    assert is_zero(s_dot - 2 * p * p_dot / alpha_p + 2 * eta * (s - p**2 / alpha_p))
    on_parabola = p_dot.subs(s, p**2 / alpha_p)
    assert is_zero(on_parabola + p * ((1 + sigma2) * p**2 - tau * p + eta))
    # With q = α_p s nothing depends on α_p.
    for rate in (alpha_p * s_dot, p_dot):
        assert alpha_p not in sympy.expand(rate.subs(s, sympy.Symbol("q") / alpha_p)).free_symbols


def test_the_target_of_a_mode_symbolically() -> None:
    """With w = √s and w_a = τw, ẇ_a = β(w − w_a) is τ̇ of `modes_ema`."""
    s, p, tau, alpha_p, sigma2, eta, beta = sympy.symbols(
        "s p tau alpha_p sigma2 eta beta", positive=True
    )
    s_dot, _, tau_dot = dyn.modes_ema(s, p, tau, alpha_p=alpha_p, sigma2=sigma2, eta=eta, beta=beta)
    w = sympy.sqrt(s)
    w_dot = s_dot / (2 * w)
    assert sympy.simplify(tau_dot * w + tau * w_dot - beta * (w - tau * w)) == 0


def test_fixed_points_are_at_rest_and_of_the_stability_that_is_said() -> None:
    alpha_p, sigma2, eta, tau = SMALL.values()
    roots = np.sort(np.roots([1 + sigma2, -tau, eta]))
    np.testing.assert_allclose(dyn.fixed_points(sigma2=sigma2, eta=eta, tau=tau), roots)
    s, p = sympy.symbols("s p")
    flow = sympy.Matrix(dyn.modes(s, p, **SMALL))
    for root, stable in zip(roots, (False, True), strict=True):
        at = {s: root**2 / alpha_p, p: root}
        assert np.abs(np.array(flow.subs(at), dtype=float)).max() < 1e-15
        jacobian = np.array(flow.jacobian([s, p]).subs(at), dtype=float)
        eigenvalues = np.sort(np.linalg.eigvals(jacobian).real)
        assert eigenvalues[0] == pytest.approx(-2 * eta) or stable
        assert (eigenvalues[1] < 0) == stable
    assert np.isnan(dyn.fixed_points(sigma2=sigma2, eta=0.2, tau=tau)).all()
    assert np.isinf(dyn.separatrix(0.1, sigma2=sigma2, eta=0.2, tau=tau))


@pytest.mark.parametrize("beta", [0.01, 0.3, 20.0])
def test_a_mode_leaves_its_fixed_point_at_the_rate_of_the_linear_system(beta: float) -> None:
    sigma2, eta = 0.3, 0.07
    p_minus = dyn.fixed_points(sigma2=sigma2, eta=eta, tau=1.0)[0]
    s, p, tau = sympy.symbols("s p tau")
    flow = sympy.Matrix(dyn.modes_ema(s, p, tau, alpha_p=1.7, sigma2=sigma2, eta=eta, beta=beta))
    at = {s: p_minus**2 / 1.7, p: p_minus, tau: 1.0}
    jacobian = np.array(flow.jacobian([s, p, tau]).subs(at), dtype=float)
    eigenvalues = np.linalg.eigvals(jacobian).real
    rate = dyn.escape_rate(sigma2=sigma2, eta=eta, beta=beta)
    assert eigenvalues.max() == pytest.approx(rate)
    assert (eigenvalues > 0).sum() == 1


def test_directpred_in_the_flow_is_the_predictor_of_the_package(rng) -> None:
    W = rng.normal(size=(4, 6))
    X = np.diag(rng.uniform(0.5, 2, 6))
    features = np.linalg.cholesky(X) @ W.T * np.sqrt(6)  # their correlation is W X Wᵀ
    weight = DirectPred(4, rule=Eq18(0.2)).update(features)
    rest = {"X": X, "X_prime": 0.1 * np.eye(6), "alpha_p": 1.0, "eta": 0.07}
    ours = dyn.full(W, np.zeros((4, 4)), W, predictor="directpred", rule=Eq18(0.2), **rest)
    theirs = dyn.full(W, weight, W, **rest)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10)
    assert not ours[1].any()

    # And its modes: with X = I the eigenvectors of F stay.
    s, u = np.linalg.eigh(W @ W.T)
    data = {"X": np.eye(6), "X_prime": 0.1 * np.eye(6), "alpha_p": 1.0, "eta": 0.07}
    W_dot, _, _ = dyn.full(W, weight, W, predictor="directpred", rule=Eq18(0.2), **data)
    (s_dot,) = dyn.modes_directpred(s, rule=Eq18(0.2), sigma2=0.1, eta=0.07, tau=1.0)
    np.testing.assert_allclose(W_dot @ W.T + W @ W_dot.T, (u * s_dot) @ u.T, atol=1e-9)


def test_integrate_keeps_shapes_and_solves() -> None:
    times = np.linspace(0, 2, 5)
    A = np.array([[1.0, 2.0], [3.0, 4.0]])
    decaying, number = dyn.integrate(lambda x, y: (-x, 2 * y), (A, np.array(1.0)), times)
    np.testing.assert_allclose(decaying, A * np.exp(-times)[:, None, None], rtol=1e-7)
    np.testing.assert_allclose(number, np.exp(2 * times), rtol=1e-7)
    with pytest.raises(UserError, match="cannot be integrated to t = 2"):
        dyn.integrate(lambda x: (x**2,), (np.array(1.0),), times)  # infinite at t = 1


# The claims, by the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``directpred dynamics``, all claims."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["dynamics", "--out", str(out), "--name", "all"]) == 0
    return out / "all"


@pytest.fixture(scope="module")
def measured(run: Path) -> dict[str, dict[str, float]]:
    results = json.loads((run / "summary.json").read_text("utf-8"))["results"]
    # Of lines of one name the last counts.
    return {
        claim: {line["what"]: line["measured"] for line in result["findings"]}
        for claim, result in results.items()
    }


@pytest.fixture(scope="module")
def points(run: Path) -> list[dict[str, str]]:
    with (run / "dynamics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_writes_everything(run: Path, points: list[dict[str, str]]) -> None:
    names = {path.name for path in run.iterdir()}
    pictures = {f"{claim}.png" for claim in (*knobs.CLAIMS, "dynamics")}
    assert names == {"summary.json", "dynamics.csv", *pictures}
    for picture in pictures:
        height, width, _ = matplotlib.image.imread(run / picture).shape
        assert width > height > 400
    assert {point["claim"] for point in points} == set(knobs.CLAIMS)
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["status"] == "finished"
    assert summary["versions"]["scipy"]


def test_what_holds_and_what_does_not(run: Path) -> None:
    """All predictions but that of a small τ, which helps K: by the clock it aligns later."""
    results = json.loads((run / "summary.json").read_text("utf-8"))["results"]
    failed = [
        line["what"]
        for result in results.values()
        for line in result["findings"]
        if line["holds"] is False
    ]
    assert len(failed) == 2
    assert all(what.startswith("‖L‖/(‖F‖‖W_p‖) at t = 20") for what in failed)


def test_theorem_1_decays_at_twice_the_weight_decay(measured) -> None:
    for eta in (0.0125, 0.025, 0.05):
        rate = measured["theorem1"][f"rate of ‖WWᵀ − W_pᵀW_p/α_p‖, η = {eta:g}"]
        assert rate == pytest.approx(2 * eta, rel=1e-6)


def test_theorem_2_collapses_at_the_least_eigenvalue(measured, points) -> None:
    ends = {}
    for point in points:
        if point["claim"] == "theorem2" and point["panel"] == "1" and point["kind"] == "measured":
            ends[point["label"]] = float(point["y"])
    assert ends["with both"] > 0.5
    assert ends["no predictor"] < 1e-5
    assert ends["no stop-gradient"] < 1e-10
    # H = X′ ⊗ I + η I without a predictor; the least eigenvalue of X′ is 0.4 σ².
    x, y = np.array(
        [
            [float(point["x"]), float(point["y"])]
            for point in points
            if (point["claim"], point["panel"], point["label"]) == ("theorem2", "1", "no predictor")
        ]
    ).T
    late = x > 40
    assert -np.polyfit(x[late], np.log(y[late]), 1)[0] == pytest.approx(0.4 * 0.5 + 0.02, rel=1e-3)


def test_theorem_3_aligns_within_its_bound_and_need_not_before(measured) -> None:
    found = measured["theorem3"]
    assert found["largest ‖L‖ over its bound, much F"] <= 1 + 1e-6
    assert found["largest ‖L‖ over its bound, little F"] <= 1 + 1e-6
    assert found["least λ_min(K)"] > 0.3
    assert found["λ_min(K) at the start"] < -0.1
    assert found["‖L‖ grows, by a factor > 1"] > 10
    assert found["‖L‖ in the end, over its start"] < 1e-3


def test_fixed_points_and_the_border_of_collapse(measured) -> None:
    found = measured["fixed-points"]
    p_minus, p_plus = np.sort(np.roots([1.1, -1, 0.16]))
    assert found["p₋, η = 0.16: border of collapse by bisection"] == pytest.approx(
        p_minus, rel=1e-4
    )
    assert found["p₊, η = 0.16: where modes end"] == pytest.approx(p_plus, rel=1e-6)
    assert found["largest relative error of p₋, 11 values of η"] < 1e-4
    assert found["rate of s − p²/α_p"] == pytest.approx(0.32, rel=1e-5)


def test_collapse_where_the_theory_says(points) -> None:
    cells = [point for point in points if point["claim"] == "collapse" and point["value"]]
    table = np.array([[float(cell[key]) for key in ("panel", "x", "y", "value")] for cell in cells])
    panel, eta, other, value = table.T
    first = panel == 1
    assert first.sum() == 3600
    alive = value > 0.25
    predicted = 4 * eta * (1 + other) <= 1
    assert (alive == predicted)[first].mean() > 0.99
    assert 0.2 < alive[first].mean() < 0.8
    # A larger α_p never kills a mode, and beyond the fixed points none lives.
    assert not alive[~first & (4 * eta * 1.1 > 1)].any()
    grid = alive[~first].reshape(60, 60)
    assert (grid[1:] >= grid[:-1]).all()
    assert grid[-1].mean() > 3 * grid[0].mean()


def test_ema_shares_the_border_from_one_and_widens_the_basin_below(measured, points) -> None:
    p_minus = np.roots([1.1, -1, 0.04]).min()
    borders: dict[str, dict[float, float]] = {}
    for point in points:
        if (point["claim"], point["panel"], point["kind"]) == ("ema", "1", "measured"):
            borders.setdefault(point["label"], {})[float(point["x"])] = float(point["y"])
    slow, middle, fast = borders.values()
    for border in (slow, middle, fast):
        assert border[1.0] == pytest.approx(p_minus, rel=1e-4)
        assert border[1.2] < p_minus
    for tau in (0.15, 0.3, 0.5, 0.7):
        assert slow[tau] > middle[tau] > fast[tau] > p_minus
    found = measured["ema"]
    assert (
        found["rate at which p leaves p₋, β = 0.02"] < found["rate at which p leaves p₋, β = 0.5"]
    )
    assert found["‖L‖ at t = 3, EMA from 0.5 over τ = 1"] < 1
    # By the clock the EMA aligns later, by the growth of F earlier.
    assert found["‖L‖/(‖F‖‖W_p‖) at t = 20, EMA from 0.5 over τ = 1"] > 10
    assert found["when tr F is half of its end, EMA from 0.5 over τ = 1"] < 0.1


def test_directpred_lets_no_mode_collapse(measured) -> None:
    found = measured["directpred"]
    assert found["modes alive of 12, DirectPred"] == 12
    # Singular values of W(0), against p₋.
    p_minus = np.roots([1.1, -1, 0.02]).min()
    survivors = (np.geomspace(0.003, 0.3, 12) > p_minus).sum()
    assert found["modes alive of 12, trained, on the parabola"] == survivors < 12
    assert found["largest ‖L‖/(‖F‖‖W_p‖), DirectPred"] < 1e-12
    r_minus = np.roots([0.1, 1, -p_minus]).max()
    assert found["border of the largest √s: r₋"] == pytest.approx(r_minus, rel=1e-3)


def findings(directory: Path, claim: str) -> dict[str, dict[str, Any]]:
    results = json.loads((directory / "summary.json").read_text("utf-8"))["results"]
    return {line["what"]: line for line in results[claim]["findings"]}


@pytest.mark.parametrize(
    ("options", "alive", "comparable"),
    [
        ("--no-aligned --alpha-p 2", True, True),
        ("--predictor trained --beta 0.5 --no-isotropic", True, False),
        ("--predictor directpred --outputs 3 --dim 5", True, False),
        ("--no-stop-gradient --predictor trained", False, False),
        ("--predictor none --time 200", False, False),
    ],
)
def test_simulate_turns_every_knob(
    options: str, alive: bool, comparable: bool, tmp_path: Path
) -> None:
    where = ["--out", str(tmp_path), "--name", "one"]
    assert main(["dynamics", "simulate", *options.split(), *where]) == 0
    found = findings(tmp_path / "one", "simulate")
    assert (found["largest eigenvalue of F in the end"]["measured"] > 0.1) == alive
    assert found["‖F − F of the reduced system‖/‖F‖"]["holds"] is (True if comparable else None)
    if "--no-aligned" in options:
        assert found["‖F − F of the modes‖/‖F‖"]["measured"] > 1e-3
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"summary.json", "dynamics.csv", "simulate.png"}


def test_a_claim_at_other_knobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--eta", "0.1", "--dim", "3", "--outputs", "2", "--seed", "5"]
    where = ["--out", str(tmp_path), "--name", "mine"]
    assert main(["dynamics", "theorem1", *options, *where]) == 0
    found = findings(tmp_path / "mine", "theorem1")
    assert found["rate of ‖WWᵀ − W_pᵀW_p/α_p‖, η = 0.1"]["measured"] == pytest.approx(0.2, rel=1e-5)
    assert "theorem1" in capsys.readouterr().out


def test_without_its_boost_directpred_rescues_no_mode(tmp_path: Path) -> None:
    where = ["--out", str(tmp_path), "--name", "bare"]
    assert main(["dynamics", "directpred", "--eps", "0", *where]) == 0
    found = findings(tmp_path / "bare", "directpred")
    assert found["modes alive of 12, DirectPred"]["measured"] == 7
    assert found["modes alive of 12, DirectPred"]["predicted"] is None
    assert not any(line["holds"] is False for line in found.values())


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("theorem9", 2, "theorem9"),
        ("theorem1 --tau 1", 2, "theorem1 has no option --tau; it has --alpha-p, --beta"),
        ("theorem1 --eta 0", 2, "--eta: must be a number above 0, not '0'"),
        ("theorem1 --eta inf", 2, "--eta: must be a number above 0, not 'inf'"),
        ("theorem1 --outputs 1", 2, "--outputs: must be a whole number at least 2, not '1'"),
        ("theorem1 --seed x", 2, "--seed: must be a whole number at least 0, not 'x'"),
        ("simulate --predictor magic", 2, "magic"),
        ("simulate --beta 1 --no-stop-gradient", 2, "leave out --beta"),
        ("fixed-points --eta 1", 2, "fixed-points: without fixed points p± all collapses"),
        ("theorem1 --name taken", 1, "taken exists already"),
    ],
)
def test_mistakes(
    arguments: str,
    status: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").mkdir()
    assert main(["dynamics", *arguments.split(), "--out", str(tmp_path)]) == status
    complaint = capsys.readouterr().err
    assert complaint.startswith("directpred: ")
    assert expected in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_line_knows_the_claims_and_their_knobs() -> None:
    assert tuple(command.CLAIMS) == knobs.CLAIMS
    assert set().union(*map(command.knobs_of, command.CLAIMS)) == set(knobs.KNOBS)


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        ("=", 2.01, True),
        ("=", 2.03, False),
        ("=", 1.97, False),
        ("≥", 1.9, False),
        ("≥", 3.0, True),
        ("≤", 2.1, False),
        ("≤", 1.0, True),
        ("=", float("nan"), False),
    ],
)
def test_a_prediction_can_fail(relation: str, measured: float, holds: bool) -> None:
    assert Finding("", measured, 2.0, relation).holds is holds
    assert Finding("", measured, None, relation).holds is None
