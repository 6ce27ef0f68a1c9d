"""How good are the frozen features? A linear probe and the nearest neighbours."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from directpred.reference_trainers.data import Split


def linear_probe(train: Split, test: Split) -> float:
    """Top-1 accuracy of a logistic regression on features standardised on the train split.

    Args:
        train: (n, d) features and (n,) labels to fit.
        test: (m, d) features and (m,) labels to score.

    Returns:
        Accuracy in percent.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings():
        # A fixed number of iterations is part of the protocol, as is the published 50 epochs.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.inputs.numpy(), train.labels.numpy())
    return 100.0 * float(model.score(test.inputs.numpy(), test.labels.numpy()))


def knn(train: Split, test: Split, neighbours: int = 20) -> float:
    """Top-1 accuracy of the nearest neighbours by cosine, weighted by closeness.

    Args:
        train: (n, d) features and (n,) labels to look among.
        test: (m, d) features and (m,) labels to score.
        neighbours: How many vote.

    Returns:
        Accuracy in percent.
    """
    model = KNeighborsClassifier(neighbours, metric="cosine", weights="distance")
    model.fit(train.inputs.numpy(), train.labels.numpy())
    return 100.0 * float(model.score(test.inputs.numpy(), test.labels.numpy()))
