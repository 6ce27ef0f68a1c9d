"""solo-learn: the method `directpred`, made from its own YAML files and trained by its own code."""

import copy
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

import oracle

torch = pytest.importorskip("torch")
pl = pytest.importorskip("lightning.pytorch")
OmegaConf = pytest.importorskip("omegaconf").OmegaConf
for needed in ("hydra", "timm", "wandb", "torchvision"):
    pytest.importorskip(needed)
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

import directpred as dp  # noqa: E402
from peers import ROWS, record, source, views  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate"),
]
STEPS = 4
"""An epoch."""
EPOCHS = 5


@pytest.fixture(scope="module")
def solo():
    folder = str(source("solo_learn"))
    sys.path.insert(0, folder)
    try:
        adapter = importlib.import_module("directpred.adapters.solo_learn")
        for module in ("args.pretrain", "utils.checkpointer"):
            importlib.import_module(f"solo.{module}")
    finally:
        sys.path.remove(folder)
    return adapter


@pytest.fixture(autouse=True)
def plain_trainer(monkeypatch):
    """stable-pretraining, installed for other tests, adds 14 callbacks to any trainer."""
    connector = "lightning.pytorch.trainer.connectors.callback_connector"
    monkeypatch.setattr(f"{connector}._load_external_callbacks", lambda group: [], raising=False)


def config(base="byol", method="directpred", changes=(), **method_kwargs):
    """solo-learn's YAML file for CIFAR-10, made small, as main_pretrain.py reads it."""
    folder = source("solo_learn") / "scripts/pretrain/cifar"
    cfg = OmegaConf.load(folder / f"{base}.yaml")
    kind = "asymmetric" if base == "byol" else "symmetric_weak"
    cfg.augmentations = OmegaConf.load(folder / f"augmentations/{kind}.yaml")
    cfg.method, cfg.max_epochs, cfg.optimizer.batch_size = method, EPOCHS, ROWS
    cfg.scheduler.warmup_epochs = 1
    cfg.data.dataset = "stl10"  # for CIFAR the ResNet begins without strides, which takes long
    cfg.method_kwargs.update(proj_hidden_dim=32, proj_output_dim=8, pred_hidden_dim=16)
    if method == "directpred":
        del cfg.method_kwargs.pred_hidden_dim
        cfg.method_kwargs.update({"base": base, **method_kwargs})
    for key, value in dict(changes).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return sys.modules["solo.args.pretrain"].parse_cfg(cfg)


def build(solo, base="byol", method="directpred", **options):
    torch.manual_seed(0)
    return solo.METHODS[method](config(base, method, **options))


class Crops(Dataset):
    """Two views of STEPS batches of digits, the same in every epoch, as solo-learn has them."""

    def __init__(self, small=0):
        batches = [views(step, 32) for step in range(STEPS)]
        self.crops = [torch.cat(view) for view in zip(*batches, strict=True)]
        self.crops += [crop[:, :, :16, :16] for crop in self.crops[:small]]

    def __len__(self):
        return len(self.crops[0])

    def __getitem__(self, index):
        return index, [crop[index] for crop in self.crops], index % 10


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(trainer.callback_metrics["train_neg_cos_sim_step"].item())


def fit(model, folder, callbacks=(), checkpoint=None):
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=model.max_epochs,
        accumulate_grad_batches=model.accumulate_grad_batches,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[losses, *callbacks],
    )
    data = Crops(model.num_small_crops)
    trainer.fit(model, DataLoader(data, ROWS), ckpt_path=checkpoint)
    return trainer, losses.values


bases = pytest.mark.parametrize("base", ["byol", "simsiam"])


@bases
def test_the_weight_is_that_of_the_features_and_the_loss_falls(solo, base, tmp_path):
    model = build(solo, base, rule="boost_scale", eps=0.02, rho=0.5)
    assert isinstance(model, solo.METHODS[base])
    batches = record(model.predictor)
    trainer, losses = fit(model, tmp_path)
    assert int(model.predictor.step_count) == EPOCHS * STEPS == trainer.global_step
    assert {len(batch) for batch in batches} == {2}
    expected = oracle.weight(batches, 0.5, lambda s: oracle.boost_scale(s, 0.02, 0.5, False, 1e-4))
    np.testing.assert_allclose(model.predictor.weight, expected, atol=1e-4)
    assert np.mean(losses[-STEPS:]) < np.mean(losses[:STEPS]) - 0.05
    assert model.predictor._watch.followed() is None  # detached again
    (optimizer,) = trainer.optimizers
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    assert list(groups) == ["backbone", "classifier", "projector", "predictor"]
    assert groups["predictor"] == []


@pytest.mark.parametrize("between", ["hold", "train"])
@pytest.mark.parametrize("exclude", [False, True])
def test_groups_and_learning_rates_of_the_optimizer(solo, between, exclude, tmp_path):
    changes = {"max_epochs": 2, "optimizer.exclude_bias_n_norm_wd": exclude}
    model = build(solo, "simsiam", between=between, freq=5, changes=changes)
    trainer, _ = fit(model, tmp_path)
    (optimizer,) = trainer.optimizers
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = ["backbone", "classifier", "projector", "predictor"]
    assert [name for name in groups if not name.endswith("_no_decay")] == (
        names[:3] if exclude and between == "hold" else names  # solo-learn leaves out empty ones
    )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    trained = [*model.backbone.parameters(), *model.classifier.parameters()]
    assert held == {*trained, *model.projector.parameters(), *model.predictor.parameters()}
    assert groups["backbone"]["lr"] < model.lr / 2  # at the end of a cosine
    if between == "train":
        assert groups["predictor"]["lr"] == model.lr


@bases
def test_a_checkpoint_of_solo_learn_continues_identically(solo, base, tmp_path):
    # solo-learn does not save its tau: with another final one it starts anew.
    options = {"changes": {"momentum": {"base_tau": 0.9, "final_tau": 0.9}, "max_epochs": 3}}
    whole, resumed = build(solo, base, **options), build(solo, base, **options)
    checkpointer = sys.modules["solo.utils.checkpointer"].Checkpointer
    saving = checkpointer(whole.cfg, tmp_path / "saved", keep_prev=True)
    _, losses = fit(whole, tmp_path, [saving])
    (middle,) = (tmp_path / "saved").glob("*/*-ep=1.ckpt")
    _, rest = fit(resumed, tmp_path, checkpoint=middle)
    assert rest == losses[2 * STEPS :]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # As main_knn.py and main_umap.py load it.
    cfg = OmegaConf.create(json.loads((middle.parent / "args.json").read_text()))
    loaded = solo.METHODS["directpred"].load_from_checkpoint(middle, strict=False, cfg=cfg)
    assert type(loaded) is type(whole)
    assert int(loaded.predictor.step_count) == 2 * STEPS


@bases
def test_accumulated_batches_are_one_step(solo, base, tmp_path):
    model = build(solo, base, changes={"accumulate_grad_batches": 2, "max_epochs": 2})
    batches = record(model.predictor)
    fit(model, tmp_path)
    assert int(model.predictor.step_count) == STEPS
    assert [len(batch) for batch in batches] == [4] * STEPS
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(model.predictor.weight, expected, atol=1e-4)


def test_small_crops_enter_too(solo, tmp_path):
    cfg = config("byol", changes={"max_epochs": 1})
    cfg.data.num_small_crops = 2
    model = solo.METHODS["directpred"](cfg)
    batches = record(model.predictor)
    fit(model, tmp_path)
    assert [len(batch) for batch in batches] == [4] * STEPS
    expected = oracle.weight(batches, 0.3, lambda s: oracle.eq18(s, 0.1))
    np.testing.assert_allclose(model.predictor.weight, expected, atol=1e-3)


def test_a_fork_keeps_its_own_method_and_may_lack_one(solo, monkeypatch):
    class Own:
        """What a fork calls directpred."""

    monkeypatch.setitem(solo.METHODS, "directpred", Own)
    monkeypatch.delitem(solo.METHODS, "simsiam")
    monkeypatch.delattr(sys.modules["solo.methods"], "SimSiam")
    monkeypatch.delitem(sys.modules, solo.__name__)
    again = importlib.import_module(solo.__name__)
    try:
        assert again.METHODS["directpred"] is Own
        assert again.METHODS[again.NAME] is again.DirectPred
        assert list(again.BASES) == ["byol"]
        cfg = config("byol")
        assert again.METHODS["directpred_head"](cfg).predictor.dim == 8
    finally:
        del again.METHODS[again.NAME]


@bases
def test_a_model_that_is_built_takes_the_head_and_gives_it_back(solo, base, tmp_path):
    model = build(solo, base, method=base, changes={"max_epochs": 1})
    learned = model.predictor
    head = solo.replace_predictor(model, rho=0.5)
    trainer, _ = fit(model, tmp_path, [solo.DirectPredCallback()])
    assert model.predictor is head
    assert int(head.step_count) == STEPS
    assert trainer.optimizers[0].param_groups[-1]["params"] == []
    assert solo.restore(model) is learned is model.predictor


@pytest.mark.parametrize(
    ("rule", "kind", "fields"),
    [
        ("eq18", "Eq18", {"eps": 0.2}),
        ("directset", "DirectSet", {"alpha": 1.0, "eps": 0.2}),
        ("directcopy", "DirectCopy", {"eps": 0.2}),
        ("boost_scale", "BoostScale", {"power": 0.4, "inside": True, "floor": 0.1}),
    ],
)
def test_the_keys_arrive_at_the_rule_and_the_head(solo, rule, kind, fields):
    options = {"rho": 0.7, "freq": 3, "center": True, "solver": "eigh", "nonfinite": "raise"}
    given = build(solo, rule=rule, **fields, **options).predictor.options._asdict()
    assert given == {"rule": getattr(dp, kind)(**fields), **options}


def test_copies(solo):
    model = build(solo, "simsiam")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert all(
            torch.equal(x, twin.state_dict()[name]) for name, x in model.state_dict().items()
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base", "bylo", "base 'bylo'; known: byol, simsiam"),
        ("rule", "eq19", "rule 'eq19'; known: eq18, directset, directcopy, boost_scale"),
        (
            "epz",
            0.1,
            r"\['epz'\]; known with rule eq18: \['base', 'rule', 'eps', 'normalize', 'rho'",
        ),
        ("alpha", 0.5, r"unknown in method_kwargs: \['alpha'\]"),
        ("eps", -1, "eps must be ≥ 0, got -1"),
        ("eps", "big", "wrong value among .*'eps': 'big'"),
        ("rho", 1.5, r"rho must be in \[0, 1\), got 1.5"),
        ("rho", "big", "wrong value among .*'rho': 'big'"),
        ("freq", 0, "freq must be an integer ≥ 1, got 0"),
        ("between", "both", "'hold' or 'train', got 'both'"),
        ("solver", "svd", "got 'svd'"),
        ("nonfinite", "keep", "got 'keep'"),
    ],
)
def test_wrong_values_are_errors(solo, key, value, message):
    with pytest.raises(ValueError, match=message):
        build(solo, **{"changes": {f"method_kwargs.{key}": value}})


@bases
def test_main_pretrain_runs_with_one_more_line(base, tmp_path):
    """The script and the YAML files of the checkout: a line added in one, one changed in each."""
    folder = source("solo_learn")
    before = "from solo.methods import METHODS\n"
    script = (folder / "main_pretrain.py").read_text()
    assert before in script
    script = script.replace(before, before + "import directpred.adapters.solo_learn\n")
    (tmp_path / "main_pretrain.py").write_text(script)
    shutil.copytree(folder / "scripts/pretrain/cifar", tmp_path / "scripts")
    yaml = tmp_path / f"scripts/{base}.yaml"
    yaml.write_text(yaml.read_text().replace(f'method: "{base}"', 'method: "directpred"'))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(views(0, 32)[0]):
        save_image(image, tmp_path / f"images/{i}.png")
    small = [
        f"++method_kwargs.base={base}",
        "++method_kwargs.rule=directcopy",
        "method_kwargs.proj_hidden_dim=32",
        "method_kwargs.proj_output_dim=8",
        "data.dataset=custom",
        "data.train_path=images",
        "~data.val_path",
        "+data.no_labels=true",
        "data.num_workers=0",
        "optimizer.batch_size=4",
        "max_epochs=1",
        "+scheduler.warmup_epochs=0.5",
        "wandb.enabled=false",
        "accelerator=cpu",
        "devices='1'",
        "strategy=auto",
        "precision=32",
        "sync_batchnorm=false",
    ]
    command = [sys.executable, "main_pretrain.py", "--config-path=scripts"]
    subprocess.run(
        [*command, f"--config-name={base}.yaml", *small],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
            "SPT_CACHE_DIR": str(tmp_path / "cache"),  # stable-pretraining's callbacks write there
        },
        check=True,
        timeout=300,
    )
    (saved,) = tmp_path.glob("trained_models/directpred/*/*-ep=0.ckpt")
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert int(state["predictor.step_count"]) == ROWS // 4
    assert int(state["predictor.skipped"]) == 0
    s, vectors = torch.linalg.eigh(state["predictor.correlation"].double())
    expected = vectors @ torch.diag(s + 0.3 * s[-1]) @ vectors.T
    torch.testing.assert_close(state["predictor.weight"].double(), expected, atol=1e-5, rtol=1e-4)
