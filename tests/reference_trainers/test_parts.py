"""The trainers' parts: recipe, data, model."""

from __future__ import annotations

from dataclasses import fields
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from directpred.reference_trainers import siamese
from directpred.reference_trainers.datasets import Memory, load
from directpred.reference_trainers.errors import UsageError
from directpred.reference_trainers.monitor import of_linear
from directpred.reference_trainers.networks import resnet
from directpred.reference_trainers.optimizers import (
    build_optimizer,
    build_schedule,
    learning_rate,
    target_momentum,
)
from directpred.reference_trainers.recipe import PREDICTORS, Recipe, descriptions
from directpred.reference_trainers.siamese import Siamese, follow, symmetrise
from directpred.reference_trainers.train import fit
from directpred.reference_trainers.views import build_views

CONFIGS = files("directpred.reference_trainers").joinpath("configs")


def config(name: str) -> Recipe:
    return Recipe.parse(yaml.safe_load(CONFIGS.joinpath(f"{name}.yaml").read_text("utf-8")))


def digits() -> Memory:
    source = load("digits", None).pretrain
    assert isinstance(source, Memory)
    return source


def built(recipe: Recipe) -> Siamese:
    """A model that is not in a trainer."""
    model = Siamese(recipe, 1, 10, build_views(recipe, 16, cropped=False))
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model


class Trainer:
    """What `Siamese.training_step` asks of one."""

    global_step, global_rank = 0, 0


def loss_of(model: Siamese, rows: int) -> Tensor:
    images = digits().images[:rows]
    model._trainer = None
    model._fabric = Trainer()  # type: ignore[assignment]
    return model.training_step((images, images), 0)


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
        ("predictor_lr", -1),
        ("predictor_weight_decay", "no"),
        ("symmetric", 1),
        ("rho", 1.0),
        ("predictor", 3),
        ("predictors", "mlp"),
        (7, 7),
    ],
)
def test_a_wrong_option_is_named(option: object, value: object) -> None:
    with pytest.raises(UsageError, match=str(option)):
        Recipe.parse({option: value})


def test_every_image_has_a_view_of_its_own() -> None:
    image = digits().images[:1].repeat(8, 1, 1, 1)
    for seen in build_views(Recipe(noise=0.0), 16, cropped=False)(image, image):
        assert seen.shape == (8, 1, 8, 8)
        assert len(seen.flatten(1).unique(dim=0)) == 8


def test_predictors_start_from_the_same_network() -> None:
    first, *others = (built(Recipe(predictor=name)).online.state_dict() for name in PREDICTORS)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_gradient_reaches_the_target_only_without_the_stop(
    predictor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(Recipe(predictor=predictor))
    targets: list[Tensor] = []

    def remember(p: Tensor, z: Tensor) -> Tensor:
        targets.append(z)
        return -(p * z).mean()

    monkeypatch.setattr(siamese, "regression_loss", remember)
    loss_of(model, 16)
    assert [z.requires_grad for z in targets] == 2 * [predictor == "no_stopgrad"]


def test_iso_has_the_value_of_the_cosine_and_another_gradient() -> None:
    losses, gradients = [], []
    for loss in ("cosine", "iso"):
        model = built(Recipe(loss=loss))
        for _ in range(2):  # the first step is applied with the identity, through which both go
            model.zero_grad()
            value = loss_of(model, 32)
            value.backward()
            model.predictor.step()
        losses.append(value.item())
        gradients.append(model.online.projector[-1].weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not torch.allclose(*gradients, rtol=1e-2)


def test_simsiam_has_the_online_network_for_a_target() -> None:
    model = built(Recipe(method="simsiam"))
    assert not any(name.startswith("target") for name, _ in model.named_parameters())
    loss_of(model, 16).backward()
    assert all(p.grad is not None for p in model.online.parameters())


def test_the_predictor_has_a_rate_and_a_decay_of_its_own() -> None:
    recipe = Recipe(predictor="linear", lr=0.1, predictor_lr=3, predictor_weight_decay=0.5)
    model = built(recipe)
    trunk, predictor = build_optimizer(recipe, model.online, model.predictor).param_groups
    assert (trunk["lr"], trunk["weight_decay"]) == (0.1, 4e-4)
    assert (predictor["lr"], predictor["weight_decay"]) == (pytest.approx(0.3), 0.5)
    assert predictor["params"] == list(model.predictor.parameters())
    schedule = build_schedule(Recipe(epochs=1, schedule="cosine"), optimizer_of(recipe), 2)
    schedule.optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.05, 0.15])


def optimizer_of(recipe: Recipe) -> torch.optim.Optimizer:
    model = built(recipe)
    return build_optimizer(recipe, model.online, model.predictor)


def test_to_make_symmetric_after_every_step_is_to_train_the_symmetric_part() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    ends = []
    for projected in (True, False):
        weight = torch.nn.Parameter(start.clone())
        symmetrise(weight)
        assert torch.equal(weight, (start + start.T) / 2)
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=0.3)
        for gradient in gradients:
            weight.grad = gradient.clone() if projected else (gradient + gradient.T) / 2
            optimizer.step()
            if projected:
                symmetrise(weight)
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)
    assert torch.equal(ends[0], ends[0].T)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_trained_linear_predictor_is_symmetric_where_it_should(
    symmetric: bool, tmp_path: Path
) -> None:
    recipe = Recipe(predictor="linear", symmetric=symmetric, epochs=1, batch_size=512)
    run = fit(recipe, tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    weight = saved["predictor.weight"]
    assert torch.equal(weight, weight.T) == symmetric
    assert not torch.equal(weight, built(recipe).predictor.weight)
    assert ("weight_eigenvalues" in run.history[0]) == symmetric
    assert ("weight_eigenvalues" in run.history[1]) == symmetric


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_told_of_a_linear_predictor(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    z, weight, layer, bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((50, 4), (4, 4), (4, 7), (4,))
    )
    weight = (weight + weight.T) / 2 if symmetric else weight
    last = torch.nn.Linear(7, 4)
    last.load_state_dict({"weight": torch.tensor(layer), "bias": torch.tensor(bias)})
    correlation = torch.tensor(z.T @ z / 50)
    projector = torch.nn.Sequential(torch.nn.ReLU(), last)
    told = of_linear(torch.tensor(weight), projector, correlation)

    s, u = np.linalg.eigh(z.T.astype(float) @ z / 50)
    expected = {
        "correlation_eigenvalues": s,
        "weight_diagonal": [x @ weight @ x for x in u.T],
        "weight_norms": [np.linalg.norm(weight @ x) for x in u.T],
        "projector_norms": [np.sqrt(((layer.T @ x) ** 2).sum() + (bias @ x) ** 2) for x in u.T],
    }
    expected["alignment"] = np.divide(expected["weight_diagonal"], expected["weight_norms"])
    if symmetric:
        expected["weight_eigenvalues"] = np.linalg.eigvalsh(weight.astype(float))
    assert told.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(told[name], values, rtol=1e-4, atol=1e-5)
    projector.append(torch.nn.BatchNorm1d(4))
    assert "projector_norms" not in of_linear(torch.tensor(weight), projector, correlation)


def test_the_target_follows() -> None:
    fast, slow = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = [p.detach().clone() for p in slow.parameters()]
    follow(slow, fast, 0.9)
    for p, old, new in zip(slow.parameters(), before, fast.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * new)


def test_schedules() -> None:
    recipe = Recipe(
        epochs=10, warmup=2, schedule="cosine", target_momentum=0.996, target_schedule="cosine"
    )
    rate = learning_rate(recipe, 5)
    assert [round(rate(step), 6) for step in range(11)] == [*(k / 10 for k in range(1, 11)), 1]
    assert rate(30) == pytest.approx(0.5)  # half of the 40 steps after the warmup
    assert rate(50) == pytest.approx(0)
    assert target_momentum(recipe, 0, 5) == pytest.approx(0.996)
    assert target_momentum(recipe, 25, 5) == pytest.approx(0.998)
    assert target_momentum(recipe, 50, 5) == pytest.approx(1)
    constant = Recipe(target_momentum=0.996)
    assert {learning_rate(constant, 5)(step) for step in range(200)} == {1.0}
    assert target_momentum(constant, 77, 5) == 0.996


def test_what_does_not_decay_is_not_adapted() -> None:
    model = built(Recipe(predictor="mlp", bn_affine=True))
    options = {"optimizer": "lars", "decay_all": False, "fixed_predictor_lr": True}
    optimizer = build_optimizer(Recipe(**options), model.online, model.predictor)
    groups = optimizer.param_groups
    assert [(group["weight_decay"], group["fixed_lr"]) for group in groups] == [
        *((4e-4, False), (0.0, False)),
        *((4e-4, True), (0.0, True)),
    ]
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    bias = next(p for p in model.online.parameters() if p.ndim == 1)
    bias.grad = torch.full_like(bias, 0.5)
    before = bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(bias, before - 0.03 * 0.5)  # plain SGD


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_have_the_published_stems(name: str, width: int) -> None:
    small, large = resnet(name, "cifar").eval(), resnet(name, "imagenet").eval()
    assert small(torch.zeros(1, 3, 32, 32)).shape == large(torch.zeros(1, 3, 32, 32)).shape
    assert small.conv1.kernel_size == (3, 3)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, torch.nn.Identity)
    assert large.conv1.kernel_size == (7, 7)
    assert large(torch.zeros(1, 3, 64, 64)).shape == (1, width)


@pytest.mark.parametrize("name", ["cifar10", "stl10", "imagenet_60", "simsiam_imagenet"])
def test_views_of_the_published_recipes(name: str) -> None:
    recipe = config(name)
    side = min(recipe.size, 96)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator)
    cropped = recipe.size > 96
    torch.manual_seed(0)
    first, second = build_views(recipe, 255, cropped)(raw, raw)
    assert first.shape == second.shape == (4, 3, side, side)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    again, _ = build_views(recipe, 255, cropped)(raw, raw)
    assert torch.equal(first, again)
    plain = build_views(recipe, 255, cropped).plain(raw)
    if recipe.normalize:
        assert plain.min() < -1
    else:
        torch.testing.assert_close(plain, raw.float() / 255)


def test_the_published_small_image_recipe() -> None:
    """By the table of the published trainer's options, written down again."""
    for name, size, epochs in (("cifar10", 32, 100), ("stl10", 96, 100), ("stl10_300", 96, 300)):
        recipe = config(name)
        assert (recipe.size, recipe.epochs, recipe.batch_size) == (size, epochs, 128)
        assert (recipe.backbone, recipe.hidden, recipe.dim) == ("resnet18", 512, 128)
        assert (recipe.optimizer, recipe.lr, recipe.momentum) == ("sgd", 0.03, 0.9)
        assert (recipe.weight_decay, recipe.decay_all, recipe.schedule) == (4e-4, True, "constant")
        assert (recipe.target_momentum, recipe.target_schedule) == (0.996, "constant")
        assert (recipe.predictor, recipe.rho, recipe.eps, recipe.freq) == (
            *("boost_scale", 0.3, 0.01, 1),
        )
        assert (recipe.crop, recipe.flip, recipe.jitter_p, recipe.grayscale) == (
            *(0.08, 0.5, 0.8, 0.2),
        )
    assert config("stl10").jitter == (0.8, 0.8, 0.8, 0.2)
    assert config("cifar10").jitter == (0.4, 0.4, 0.4, 0.1)
    assert (config("stl10").blur, config("cifar10").blur) == (1.0, 0.0)
