"""The trainers' parts: recipe, data, model."""

from __future__ import annotations

from dataclasses import fields
from importlib.resources import files

import pytest
import torch
import yaml
from torch import Tensor

from directpred.reference_trainers import byol
from directpred.reference_trainers.byol import BYOL
from directpred.reference_trainers.data import Batches, digits, views
from directpred.reference_trainers.errors import UsageError
from directpred.reference_trainers.recipe import PREDICTORS, Recipe, descriptions


def test_bundled_config_spells_out_the_defaults() -> None:
    text = files("directpred.reference_trainers").joinpath("configs/digits.yaml").read_text("utf-8")
    options = yaml.safe_load(text)
    assert options.keys() == {field.name for field in fields(Recipe)}
    assert Recipe.parse(options) == Recipe()


def test_every_option_is_described() -> None:
    assert descriptions().keys() == {field.name for field in fields(Recipe)}


def test_values_may_be_spelled_as_strings() -> None:
    # PyYAML reads 3e-4 as a string.
    assert Recipe.parse({"lr": "3e-4", "epochs": "7", "eps": "null"}) == Recipe(lr=3e-4, epochs=7)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 2.5),
        ("epochs", True),
        ("epochs", None),
        ("lr", float("nan")),
        ("lr", [1]),
        ("eps", -1),
        ("rho", 1.0),
        ("predictor", 3),
        ("predictors", "mlp"),
        (7, 7),
    ],
)
def test_a_wrong_option_is_named(option: object, value: object) -> None:
    with pytest.raises(UsageError, match=str(option)):
        Recipe.parse({option: value})


def test_digits_are_split_by_class() -> None:
    data = digits()
    assert len(data.train.inputs) == 1347
    assert len(data.test.inputs) == 450
    assert data.train.inputs.min() == 0
    assert data.train.inputs.max() == 1
    assert data.test.labels.bincount().min() >= 43


def test_batches_go_on_where_a_run_had_stopped() -> None:
    images = torch.arange(10)
    batches = Batches(images, 3, seed=0)
    epochs = [[batch.tolist() for batch in batches] for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [3, 3]
    assert epochs[0] != epochs[1]
    assert len({image for batch in epochs[0] for image in batch}) == 9

    resumed = Batches(images, 3, seed=0, done=1)
    assert [batch.tolist() for batch in resumed] == epochs[0][1:]
    assert [batch.tolist() for batch in resumed] == epochs[1]


def test_every_image_has_a_view_of_its_own() -> None:
    image = digits().train.inputs[:1]
    seen = views(Recipe(noise=0.0))(image.repeat(8, 1, 1, 1))
    assert seen.shape == (8, 1, 8, 8)
    assert len(seen.flatten(1).unique(dim=0)) == 8


def test_predictors_start_from_the_same_network() -> None:
    first, *others = (BYOL(Recipe(predictor=name)).online.state_dict() for name in PREDICTORS)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_gradient_reaches_the_target_only_without_the_stop(
    predictor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BYOL(Recipe(predictor=predictor))
    targets: list[Tensor] = []

    def remember(p: Tensor, z: Tensor) -> Tensor:
        targets.append(z)
        return -(p * z).mean()

    monkeypatch.setattr(byol, "regression_loss", remember)
    model.training_step(digits().train.inputs[:16], 0)
    assert [z.requires_grad for z in targets] == 2 * [predictor == "no_stopgrad"]


def test_iso_has_the_value_of_the_cosine_and_another_gradient() -> None:
    images = digits().train.inputs[:32]
    losses, gradients = [], []
    for loss in ("cosine", "iso"):
        model = BYOL(Recipe(loss=loss))
        for _ in range(2):  # the first step is applied with the identity, through which both go
            model.zero_grad()
            value = model.training_step(images, 0)
            value.backward()
            model.predictor.step()
        losses.append(value.item())
        gradients.append(model.online.projector[-1].weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not torch.allclose(*gradients, rtol=1e-2)
