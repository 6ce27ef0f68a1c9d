"""The evaluations of frozen features, against plain NumPy and scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from directpred.reference_trainers import probes
from directpred.reference_trainers.probes import (
    Accuracy,
    Split,
    knn,
    linear_probe,
    logistic_regression,
)

Evaluation = Callable[[Split, Split], Accuracy]

EVALUATIONS: dict[str, Evaluation] = {
    "linear_probe": lambda train, test: linear_probe(train, test, 10, epochs=8, lr=3e-2).last,
    "logistic_regression": logistic_regression,
    "knn": lambda train, test: knn(train, test, 10),
}
every_evaluation = pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)


def clouds(
    rows: int, noise: float, seed: int, width: int = 16, classes: int = 10, dtype: str = "float64"
) -> Split:
    """Classes around fixed centres; the columns differ in scale and mean."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    inputs = centres[labels] + noise * rng.normal(size=(rows, width))
    inputs = 3 + inputs * np.linspace(0.1, 5, width)
    return Split(torch.from_numpy(inputs.astype(dtype)), torch.from_numpy(labels))


def top(scores: np.ndarray, labels: np.ndarray, count: int) -> float:
    """The share of rows, in percent, whose label is among the highest scores."""
    right = [
        label in np.argsort(-row, kind="stable")[:count]
        for row, label in zip(scores, labels, strict=True)
    ]
    return 100 * sum(right) / len(right)


def adam_by_hand(
    train: Split, test: Split, classes: int, epochs: int, lr: float, decay: float, batch: int
) -> list[Accuracy]:
    """The linear probe in NumPy, from the same start and in the same order (seed 0)."""
    scaler = StandardScaler().fit(train.inputs.numpy())
    x, x_test = (scaler.transform(split.inputs.numpy()) for split in (train, test))
    y, y_test = train.labels.numpy(), test.labels.numpy()
    rows, width = x.shape
    random = torch.Generator().manual_seed(0)
    w = torch.empty(classes, width, dtype=torch.float64)
    b = torch.empty(classes, dtype=torch.float64)
    for start in (w, b):
        start.uniform_(-1 / np.sqrt(width), 1 / np.sqrt(width), generator=random)
    theta = np.concatenate((w.numpy(), b.numpy()[:, None]), axis=1)
    first, second, step = np.zeros_like(theta), np.zeros_like(theta), 0
    x, x_test = (np.concatenate((part, np.ones((len(part), 1))), axis=1) for part in (x, x_test))

    history = []
    for _ in range(epochs):
        order = torch.randperm(rows, generator=random).numpy()
        for i in range(0, rows, batch):
            chosen = order[i : i + batch]
            gradient = np.zeros_like(theta)
            for row, label in zip(x[chosen], y[chosen], strict=True):
                scores = theta @ row
                p = np.exp(scores - scores.max())
                gradient += np.outer(p / p.sum() - np.eye(classes)[label], row) / len(chosen)
            gradient += decay * theta
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
            theta -= lr * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        scores = x_test @ theta.T
        history.append(Accuracy(top(scores, y_test, 1), top(scores, y_test, 5)))
    return history


@pytest.mark.parametrize(
    ("lr", "decay", "batch"), [(3e-3, 1e-3, 128), (1e-2, 1.0, 50), (1e-2, 0.0, 1000)]
)
def test_linear_probe_is_adam_written_by_hand(lr: float, decay: float, batch: int) -> None:
    train, test = clouds(300, 2.0, seed=0), clouds(1000, 2.0, seed=1)
    result = linear_probe(
        train, test, 10, epochs=4, lr=lr, weight_decay=decay, batch_size=batch, seed=0
    )
    expected = adam_by_hand(train, test, 10, 4, lr, decay, batch)
    assert len(set(expected)) == 4  # or the comparison would say little
    np.testing.assert_allclose(result.history, expected)
    assert result.last == result.history[-1]
    assert result.best.top1 == max(accuracy.top1 for accuracy in expected)
    assert result.best == result.history[result.best_epoch - 1]


def test_linear_probe_ends_at_the_optimum() -> None:
    train, test = clouds(2000, 2.0, seed=0), clouds(5000, 2.0, seed=1)
    ours = linear_probe(train, test, 10, epochs=600, lr=1e-2, batch_size=2000).last
    scaler = StandardScaler().fit(train.inputs)
    exact = LogisticRegression(C=1 / (1e-3 * 2000), max_iter=1000, tol=1e-8)
    exact.fit(scaler.transform(train.inputs), train.labels)
    scores = exact.decision_function(scaler.transform(test.inputs))
    assert ours.top1 == pytest.approx(top(scores, test.labels.numpy(), 1), abs=0.5)
    assert ours.top5 == pytest.approx(top(scores, test.labels.numpy(), 5), abs=0.5)


def test_the_best_epoch_is_the_first_of_the_best() -> None:
    train, test = clouds(500, 0.1, seed=0), clouds(100, 0.1, seed=1)
    result = linear_probe(train, test, 10, epochs=30, lr=1e-2)
    assert result.best == result.last == (100.0, 100.0)
    assert 1 < result.best_epoch < 30
    assert all(accuracy.top1 < 100 for accuracy in result.history[: result.best_epoch - 1])


def test_a_diverged_linear_probe_is_never_right() -> None:
    train, test = clouds(200, 0.1, seed=0), clouds(50, 0.1, seed=1)
    assert linear_probe(train, test, 10, epochs=1, lr=float("inf")).last == (0.0, 0.0)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    train, test = (clouds(600, 2.0, seed, dtype="float32") for seed in (0, 1))
    scaler = StandardScaler().fit(train.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(max_iter=100).fit(scaler.transform(train.inputs), train.labels)
    x, y = scaler.transform(test.inputs), test.labels.numpy()
    expected = 100 * model.score(x, y), top(model.decision_function(x), y, 5)
    assert logistic_regression(train, test) == pytest.approx(expected)


def test_logistic_regression_of_classes_that_are_not_in_train() -> None:
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    train = Split(x, torch.tensor([2, 7]).repeat(20))
    test = Split(x[:4], torch.tensor([2, 7, 3, 9]))
    assert logistic_regression(train, test).top1 == 50


def neighbours_by_hand(train: Split, test: Split, k: int, temperature: float) -> Accuracy:
    x, x_test = train.inputs.double().numpy(), test.inputs.double().numpy()
    votes = np.zeros((len(x_test), 10))
    for i, row in enumerate(x_test):
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in x]
        for j in np.argsort(cosines)[-k:]:
            votes[i, train.labels[j]] += np.exp(cosines[j] / temperature)
    labels = test.labels.numpy()
    return Accuracy(top(votes, labels, 1), top(votes, labels, 5))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 10.0), (200, 0.07)])
@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_knn_is_a_plain_loop(
    k: int, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_TEST_ROWS", chunk)
    monkeypatch.setattr(probes, "_TRAIN_ROWS", chunk)
    train, test = clouds(230, 1.5, seed=0), clouds(150, 1.5, seed=1)
    expected = neighbours_by_hand(train, test, k, temperature)
    assert knn(train, test, 10, k, temperature) == pytest.approx(expected)


def test_knn_stands_a_small_temperature() -> None:
    train, test = clouds(230, 1.5, seed=0), clouds(150, 1.5, seed=1)
    nearest = knn(train, test, 10, neighbours=1)
    assert knn(train, test, 10, temperature=1e-5).top1 == nearest.top1


def test_knn_of_features_that_collapsed() -> None:
    train, test = (Split(torch.zeros(30, 4), torch.arange(30) % 3) for _ in range(2))
    assert 0 <= knn(train, test, 3).top1 <= 100


@every_evaluation
def test_separable_classes_are_told_apart(evaluate: Evaluation) -> None:
    train, test = clouds(500, 0.05, seed=0), clouds(200, 0.05, seed=1)
    assert evaluate(train, test) == (100.0, 100.0)


@every_evaluation
def test_shuffled_labels_are_guessed_at(evaluate: Evaluation) -> None:
    train, test = clouds(2000, 0.05, seed=0), clouds(2000, 0.05, seed=1)
    labels = torch.from_numpy(np.random.default_rng(2).integers(10, size=2000))
    accuracy = evaluate(train, Split(test.inputs, labels))
    assert accuracy.top1 == pytest.approx(10, abs=2)
    assert accuracy.top5 == pytest.approx(50, abs=4)


@pytest.mark.parametrize("classes", [2, 5])
def test_top5_of_five_classes_is_100(classes: int) -> None:
    train, test = (clouds(300, 9.0, seed, classes=classes) for seed in (0, 1))
    for accuracy in (
        linear_probe(train, test, classes, epochs=1).last,
        logistic_regression(train, test),
        knn(train, test, classes),
    ):
        assert accuracy.top1 < 100
        assert accuracy.top5 == 100


@every_evaluation
def test_results_repeat_and_leave_the_global_generators_alone(evaluate: Evaluation) -> None:
    train, test = (clouds(400, 2.0, seed, dtype="float32") for seed in (0, 1))
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    first = evaluate(train, test)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    torch.manual_seed(8)
    assert evaluate(train, test) == first


def test_another_seed_is_another_order() -> None:
    train, test = clouds(400, 3.0, seed=0), clouds(2000, 3.0, seed=1)
    first, second = (linear_probe(train, test, 10, epochs=3, seed=seed) for seed in (0, 1))
    assert first.history != second.history


@every_evaluation
def test_the_inputs_stay_as_they_are(evaluate: Evaluation) -> None:
    train, test = (clouds(100, 2.0, seed) for seed in (0, 1))
    copies = [part.clone() for part in (*train, *test)]
    evaluate(Split(train.inputs.requires_grad_(), train.labels), test)
    assert all(torch.equal(part, copy) for part, copy in zip((*train, *test), copies, strict=True))


@every_evaluation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(evaluate: Evaluation, dtype: torch.dtype) -> None:
    train, test = (clouds(300, 2.0, seed) for seed in (0, 1))
    train, test = (Split(split.inputs.to(dtype), split.labels) for split in (train, test))
    wide = (Split(split.inputs.float(), split.labels.int()) for split in (train, test))
    assert evaluate(train, test) == evaluate(*wide)


def test_a_constant_feature_counts_for_nothing() -> None:
    train, test = (clouds(300, 2.0, seed, dtype="float32") for seed in (0, 1))
    for value in (0.0, 0.1, -1e6):
        constant = (
            Split(torch.cat((split.inputs, torch.full((300, 1), value)), 1), split.labels)
            for split in (train, test)
        )
        standard, other = probes._standardise(*(split.inputs for split in constant))
        assert not standard[:, -1].abs().max() > 1
        scaler = StandardScaler().fit(train.inputs.double())
        np.testing.assert_allclose(standard[:, :-1], scaler.transform(train.inputs), atol=1e-5)
        np.testing.assert_allclose(other[:, :-1], scaler.transform(test.inputs), atol=1e-5)


# ---- Errors

GOOD = clouds(40, 1.0, seed=0)


@every_evaluation
@pytest.mark.parametrize("which", ["train", "test"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (Split(GOOD.inputs[:0], GOOD.labels[:0]), ValueError, "empty"),
        (Split(GOOD.inputs[:, :0], GOOD.labels), ValueError, "empty"),
        (Split(GOOD.inputs, GOOD.labels[:-1]), ValueError, r"\(39,\)"),
        (Split(GOOD.inputs[:, :, None], GOOD.labels), ValueError, r"\(40, 16, 1\)"),
        (Split(GOOD.inputs, GOOD.labels - 10), ValueError, "label -10"),
        (Split(GOOD.inputs, GOOD.labels.double()), TypeError, "float64"),
        (Split(GOOD.inputs.long(), GOOD.labels), TypeError, "int64"),
        (Split(GOOD.inputs.where(GOOD.inputs > 0, np.nan), GOOD.labels), ValueError, "finite"),
        (Split(GOOD.inputs.where(GOOD.inputs > 0, np.inf), GOOD.labels), ValueError, "finite"),
        (Split(GOOD.inputs.where(GOOD.inputs > 0, -np.inf), GOOD.labels), ValueError, "finite"),
    ],
)
def test_a_wrong_split_is_named(
    evaluate: Evaluation, which: str, wrong: Split, error: type[Exception], message: str
) -> None:
    train, test = (wrong, GOOD) if which == "train" else (GOOD, wrong)
    with pytest.raises(error, match=message) as caught:
        evaluate(train, test)
    assert which in str(caught.value)


@every_evaluation
def test_widths_must_agree(evaluate: Evaluation) -> None:
    with pytest.raises(ValueError, match=r"16 .* 15"):
        evaluate(GOOD, Split(GOOD.inputs[:, 1:], GOOD.labels))


@pytest.mark.parametrize("name", ["linear_probe", "knn"])
def test_labels_must_be_of_a_class(name: str) -> None:
    with pytest.raises(ValueError, match="test has a label 12, but there are 10 classes"):
        EVALUATIONS[name](GOOD, Split(GOOD.inputs, GOOD.labels.clone().fill_(12)))


def test_more_neighbours_than_rows() -> None:
    with pytest.raises(ValueError, match="40 rows of train, not 41"):
        knn(GOOD, GOOD, 10, neighbours=41)
    assert knn(GOOD, GOOD, 10, neighbours=40).top5 > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        knn(GOOD, GOOD, 10, temperature=temperature)


@pytest.mark.parametrize("option", ["epochs", "batch_size"])
def test_there_is_at_least_one(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=option):
        linear_probe(GOOD, GOOD, 10, **options)


# ---- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_epochs_do_not_synchronise() -> None:
    splits = [clouds(1000, 1.0, seed) for seed in (0, 1)]
    train, test = (Split(split.inputs.cuda(), split.labels.cuda()) for split in splits)

    def synchronisations(epochs: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                linear_probe(train, test, 10, epochs=epochs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    linear_probe(train, test, 10, epochs=1)  # libraries load, handles are made
    assert synchronisations(1) == synchronisations(5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_accuracies_of_a_cpu() -> None:
    cpu = [clouds(1000, 1.0, seed) for seed in (0, 1)]
    gpu = [Split(split.inputs.cuda(), split.labels.cuda()) for split in cpu]
    assert knn(*gpu, 10) == pytest.approx(knn(*cpu, 10), abs=0.1)
    assert logistic_regression(*gpu) == logistic_regression(*cpu)
    there, here = (linear_probe(*splits, 10, lr=1e-2).last.top1 for splits in (gpu, cpu))
    assert there == pytest.approx(here, abs=1)
