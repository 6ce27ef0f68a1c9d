"""How good are frozen features? The published linear probe, logistic regression, neighbours.

All take features and labels on one device and compute there, but for scikit-learn's logistic
regression. None draws from the global random generators.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TEST_ROWS, _TRAIN_ROWS = 1024, 16384  # of the similarities that are in memory at a time


class Split(NamedTuple):
    """Labelled inputs.

    Attributes:
        inputs: Images (n, channels, height, width), float32 in [0, 1], or features (n, d) of them.
        labels: (n,), int64.
    """

    inputs: Tensor
    labels: Tensor


class Accuracy(NamedTuple):
    """Accuracies in percent.

    Attributes:
        top1: How often the right class has the highest score.
        top5: How often it is among the five highest; 100 for up to 5 classes.
    """

    top1: float
    top5: float


@dataclass(frozen=True)
class ProbeResult:
    """What a linear probe reached on the test split.

    Attributes:
        last: After the last epoch.
        best: After the epoch with the highest top-1 (the first of several). Choosing it by the
            test split, as is published, flatters.
        best_epoch: Its number, from 1 on.
        history: After every epoch.
    """

    last: Accuracy
    best: Accuracy
    best_epoch: int
    history: list[Accuracy]


@torch.no_grad()
def linear_probe(
    train: Split,
    test: Split,
    classes: int,
    *,
    epochs: int = 50,
    lr: float = 3e-4,
    weight_decay: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
) -> ProbeResult:
    """The linear probe that was published with DirectPred for CIFAR-10 and STL-10.

    A logistic regression on features standardised on the train split, trained by Adam in shuffled
    batches and evaluated after every epoch (facebookresearch/luckmatters, ssl/real-dataset; FACTS,
    section 2). The host waits for the device before the first epoch and after the last.

    Beside the features it takes the memory of a standardised copy of both splits.

    Args:
        train: (n, d) floating features and (n,) integer labels to fit. Half precision is computed
            in float32.
        test: (m, d) features and (m,) labels to score.
        classes: How many there are; labels are in [0, classes).
        epochs: Passes over the train split.
        lr: Adam's step, constant.
        weight_decay: Times weight and bias, added to their gradient, as `torch.optim.Adam` does.
        batch_size: Rows a step; the last batch of an epoch may be smaller.
        seed: Decides the start and the order. The same seed gives the same result on a CPU with
            the same number of threads.

    Returns:
        The accuracies of every epoch.

    Raises:
        TypeError: Features are not floating, or labels not integers.
        ValueError: No rows; shapes, widths or devices that do not fit; labels out of range;
            features that are not finite; ``epochs``, ``classes`` or ``batch_size`` below 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    _check(train, test, classes)
    inputs, test_inputs = _standardise(train.inputs, test.inputs)
    labels, test_labels = train.labels.long()[:, None], test.labels.long()
    device, (rows, width) = inputs.device, inputs.shape

    random = torch.Generator(device).manual_seed(seed)
    weight, bias = inputs.new_empty(classes, width), inputs.new_empty(classes)
    for parameter in (weight, bias):  # as nn.Linear starts
        parameter.uniform_(-(width**-0.5), width**-0.5, generator=random)
    optimizer = torch.optim.Adam([weight, bias], lr, weight_decay=weight_decay, fused=True)
    minus_one = inputs.new_full((1, 1), -1.0)

    correct = []
    for _ in range(epochs):
        for batch in torch.randperm(rows, generator=random, device=device).split(batch_size):
            x, y = inputs.index_select(0, batch), labels.index_select(0, batch)
            # The gradient of the mean cross-entropy, written out to save autograd's overhead.
            residual = torch.addmm(bias, x, weight.T).softmax(1)
            residual.scatter_add_(1, y, minus_one.expand_as(y)).div_(len(y))
            weight.grad, bias.grad = residual.T @ x, residual.sum(0)
            optimizer.step()
        correct.append(_correct(torch.addmm(bias, test_inputs, weight.T), test_labels))

    history = [_percent(counts, len(test_labels)) for counts in torch.stack(correct).tolist()]
    best = max(range(epochs), key=lambda epoch: history[epoch].top1)
    return ProbeResult(history[-1], history[best], best + 1, history)


def logistic_regression(train: Split, test: Split) -> Accuracy:
    """scikit-learn's logistic regression, on features standardised on the train split.

    It has the L2 penalty that is scikit-learn's default and at most 100 iterations of L-BFGS. It
    suits some thousand rows; `linear_probe` is for more.

    Args:
        train: (n, d) floating features and (n,) integer labels to fit, of two classes at least.
        test: (m, d) features and (m,) labels to score.

    Returns:
        The accuracies. A class that is not in the train split is never right.

    Raises:
        TypeError: As `linear_probe`.
        ValueError: As `linear_probe`, or the train split has a single class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = 1 + max(
        int(split.labels.max()) if len(split.labels) else 0 for split in (train, test)
    )
    _check(train, test, classes)
    fit, score = (_at_least_float32(split.inputs.detach()).cpu() for split in (train, test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings():
        # A fixed number of iterations is part of the protocol, as is the published 50 epochs.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(fit.numpy(), train.labels.cpu().numpy())
    scores = torch.full((len(score), classes), -1.0, dtype=torch.float64)
    scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(
        model.predict_proba(score.numpy())
    ).double()
    return _percent(_correct(scores, test.labels.cpu().long()).tolist(), len(score))


@torch.no_grad()
def knn(
    train: Split, test: Split, classes: int, neighbours: int = 20, temperature: float = 0.07
) -> Accuracy:
    """The nearest neighbours by cosine vote, each with weight exp(cosine / temperature).

    The evaluation of Wu et al., "Unsupervised feature learning via non-parametric instance
    discrimination" (CVPR 2018), who take 200 neighbours. As there, classes without a vote fill up
    the top five where fewer than five have one.

    Beside the features it takes about 130 kB · (d + 1024), whatever their number: 0.4 GB for the
    2048 dimensions of a ResNet-50.

    Args:
        train: (n, d) floating features and (n,) integer labels to look among. A row of zeros has
            a cosine of 0 to all. Half precision is computed in float32.
        test: (m, d) features and (m,) labels to score.
        classes: How many there are; labels are in [0, classes).
        neighbours: How many vote.
        temperature: The smaller, the more the nearest count.

    Returns:
        The accuracies.

    Raises:
        TypeError: As `linear_probe`.
        ValueError: As `linear_probe`, or there are fewer rows than ``neighbours``, or the
            temperature is not positive.
    """
    _check(train, test, classes)
    if not 1 <= neighbours <= len(train.inputs):
        raise ValueError(
            f"neighbours must be from 1 to the {len(train.inputs)} rows of train, not {neighbours}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    train_labels, test_labels = train.labels.long(), test.labels.long()
    correct = test_labels.new_zeros(2)
    for x, y in zip(test.inputs.split(_TEST_ROWS), test_labels.split(_TEST_ROWS), strict=True):
        cosines, rows = _nearest(x, train.inputs, neighbours)
        # Over the largest, which changes no order, so that a small temperature does not overflow.
        weights = ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp()
        votes = weights.new_zeros(len(y), classes).scatter_add_(1, train_labels[rows], weights)
        correct += _correct(votes, y)
    return _percent(correct.tolist(), len(test_labels))


def _nearest(x: Tensor, train: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The cosines of the nearest rows of ``train`` and their numbers, both (len(x), count)."""
    x = F.normalize(_at_least_float32(x))
    cosines, rows = (
        x.new_empty(len(x), 0),
        torch.empty(len(x), 0, dtype=torch.long, device=x.device),
    )
    for first, part in zip(
        range(0, len(train), _TRAIN_ROWS), train.split(_TRAIN_ROWS), strict=True
    ):
        near = (x @ F.normalize(_at_least_float32(part)).T).topk(
            min(count, len(part)), sorted=False
        )
        cosines, rows = torch.cat((cosines, near[0]), 1), torch.cat((rows, near[1] + first), 1)
        cosines, kept = cosines.topk(min(count, cosines.shape[1]), sorted=False)
        rows = rows.gather(1, kept)
    return cosines, rows


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of ``train``, over its standard deviation; constant columns become 0."""
    deviation, mean = torch.std_mean(_at_least_float32(train), 0, correction=0)
    rounding = torch.finfo(train.dtype).eps * mean.abs()
    deviation = deviation.where(deviation > rounding, 1.0)
    first, second = (
        split.to(mean.dtype, copy=True).sub_(mean).div_(deviation) for split in (train, test)
    )
    return first, second


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _correct(scores: Tensor, labels: Tensor) -> Tensor:
    """How many of the labels (n,) have the highest score of (n, classes), and one of the 5 highest.

    Of equal scores the first counts as higher, as in `torch.argmax`, and NaN as wrong.
    """
    label = labels[:, None]
    own = scores.gather(1, label)
    before = torch.arange(scores.shape[1], device=scores.device) < label
    rank = (~(scores <= own) | ((scores == own) & before)).sum(1)
    return torch.stack(((rank < 1).sum(), (rank < min(5, scores.shape[1])).sum()))


def _percent(counts: list[int], rows: int) -> Accuracy:
    return Accuracy(*(100.0 * count / rows for count in counts))


def _check(train: Split, test: Split, classes: int) -> None:
    """Raise `TypeError` or `ValueError` for what the evaluations cannot take."""
    if classes < 1:
        raise ValueError(f"classes must be at least 1, not {classes}")
    for name, (inputs, labels) in (("train", train), ("test", test)):
        if not inputs.is_floating_point():
            raise TypeError(f"the features of {name} are {inputs.dtype}, not floating")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"the labels of {name} are {labels.dtype}, not integers")
        if inputs.ndim != 2 or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{name} must be features (n, d) and labels (n,), not {tuple(inputs.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if not inputs.numel():
            raise ValueError(f"{name} is empty: its features are {tuple(inputs.shape)}")
    if train.inputs.shape[1] != test.inputs.shape[1]:
        raise ValueError(
            f"train has {train.inputs.shape[1]} features and test {test.inputs.shape[1]}"
        )
    if len(devices := {str(tensor.device) for tensor in (*train, *test)}) > 1:
        raise ValueError(
            f"features and labels are on several devices: {', '.join(sorted(devices))}"
        )
    for name, (inputs, labels) in (("train", train), ("test", test)):
        lowest, highest = (int(label) for label in labels.aminmax())
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{name} has a label {wrong}, but there are {classes} classes")
        # Extremes, which NaN passes through, take no memory; isfinite takes that of the features.
        if not torch.stack(inputs.aminmax()).isfinite().all():
            raise ValueError(f"the features of {name} are not finite")
