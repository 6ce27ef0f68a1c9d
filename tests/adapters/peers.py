"""The codebases whose predictor is replaced, each as its users run it, on real digits.

A `Peer` has the model, its optimizer, and one step of the codebase's own training loop.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

REPOSITORY = Path(__file__).parents[2]
ROWS = 16
SOURCES = {
    "simsiam": "DIRECTPRED_SIMSIAM",
    "pytorch_byol": "DIRECTPRED_PYTORCH_BYOL",
    "luckmatters": "DIRECTPRED_LUCKMATTERS",
    "solo_learn": "DIRECTPRED_SOLO_LEARN",
    "deepmind_byol": "DIRECTPRED_DEEPMIND_BYOL",
    "moco_v3": "DIRECTPRED_MOCO_V3",
    "bolts": "DIRECTPRED_BOLTS",
    "bgrl": "DIRECTPRED_BGRL",
}
"""The environment variable that points at a checkout of each codebase that is no package."""


def source(name):
    """The checkout of a codebase; without one the test is skipped."""
    folder = os.environ.get(SOURCES[name])
    if not folder:
        pytest.skip(f"{SOURCES[name]} does not point at a checkout of {name}")
    return Path(folder)


@contextlib.contextmanager
def importable(folder):
    """The modules of a checkout, for the time of an import."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def views(step, size=16, rows=ROWS):
    """Two views (rows, 3, size, size) of the same digits, the same ones for the same step."""
    images = torch.from_numpy(load_digits().images).float() / 16
    generator = torch.Generator().manual_seed(step)
    chosen = images[torch.randint(len(images), (rows,), generator=generator)]
    batch = nn.functional.interpolate(chosen[:, None], size=(size, size)).expand(-1, 3, -1, -1)
    return [batch + 0.2 * torch.randn(batch.shape, generator=generator) for _ in range(2)]


def backbone(width=16):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def record(head):
    """The features of each step, list by list of views, as they enter the head from now on."""
    batches, steps = [], []

    def see(module, args):
        if module.training:
            if steps[-1:] != [int(module.step_count)]:
                steps.append(int(module.step_count))
                batches.append([])
            (z,) = args[0] if isinstance(args[0], list) else args  # mmpretrain gives a list
            batches[-1].append(z.detach().double().numpy())

    head.register_forward_pre_hook(see)
    return batches


class Peer:
    """What the tests need of a codebase; a subclass makes `model` in `build` and takes a `loss`."""

    size = 16

    def __init__(self):
        torch.manual_seed(0)
        self.model = self.build()
        self.optimizer = self.make_optimizer()
        self.taken = 0

    def make_optimizer(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self):
        loss = self.loss(*views(self.taken, self.size))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        return loss.item()

    def save(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, saved):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


class LightlyBYOL(Peer):
    adapter, predictor = "lightly", "prediction_head"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from lightly.models import modules, utils

            self.backbone = backbone()
            self.projection_head = modules.BYOLProjectionHead(16, 32, 8)
            self.prediction_head = modules.BYOLPredictionHead(8, 32, 8)
            self.target = nn.Sequential(backbone(), modules.BYOLProjectionHead(16, 32, 8))
            utils.deactivate_requires_grad(self.target)

        def forward(self, x):
            return self.prediction_head(self.projection_head(self.backbone(x)))

    def build(self):
        return self.Model()

    def loss(self, x1, x2):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.utils import update_momentum

        criterion, model = NegativeCosineSimilarity(), self.model
        update_momentum(model.backbone, model.target[0], m=0.9)
        update_momentum(model.projection_head, model.target[1], m=0.9)
        with torch.no_grad():
            t1, t2 = model.target(x1), model.target(x2)
        return 0.5 * (criterion(model(x1), t2) + criterion(model(x2), t1))


class LightlySimSiam(Peer):
    adapter, predictor = "lightly", "prediction_head"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from lightly.models import modules

            self.backbone = backbone()
            self.projection_head = modules.SimSiamProjectionHead(16, 32, 8)
            self.prediction_head = modules.SimSiamPredictionHead(8, 4, 8)

        def forward(self, x):
            z = self.projection_head(self.backbone(x))
            return z.detach(), self.prediction_head(z)

    def build(self):
        return self.Model()

    def loss(self, x1, x2):
        from lightly.loss import NegativeCosineSimilarity

        criterion = NegativeCosineSimilarity()
        (z1, p1), (z2, p2) = self.model(x1), self.model(x2)
        return 0.5 * (criterion(p1, z2) + criterion(p2, z1))


class ByolPytorch(Peer):
    adapter, predictor = "byol_pytorch", "online_predictor"
    momentum = True

    def build(self):
        from byol_pytorch import BYOL

        return BYOL(
            backbone(),
            image_size=self.size,
            hidden_layer=-1,
            projection_size=8,
            projection_hidden_size=32,
            augment_fn=nn.Identity(),
            use_momentum=self.momentum,
            use_simplicial_embeddings=False,
        )

    def loss(self, x1, x2):
        self.model.augment1, self.model.augment2 = Fixed(x1), Fixed(x2)
        return self.model(x1)

    def step(self):
        loss = super().step()
        if self.momentum:
            self.model.update_moving_average()
        return loss


class Fixed(nn.Module):
    """An augmentation of byol-pytorch that gives the view it is told to."""

    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x):
        return self.view


class ByolPytorchSimSiam(ByolPytorch):
    momentum = False


class SimSiam(Peer):
    """facebookresearch/simsiam: the step of its `train()`, which itself needs CUDA."""

    adapter, predictor, size = "simsiam", "predictor", 32

    def build(self):
        torchvision = pytest.importorskip("torchvision")
        with importable(source("simsiam")):
            from simsiam.builder import SimSiam as Model
        return Model(torchvision.models.resnet18, dim=32, pred_dim=8)

    def make_optimizer(self):
        groups = [
            {"params": self.model.encoder.parameters(), "fix_lr": False},
            {"params": self.model.predictor.parameters(), "fix_lr": True},
        ]
        return torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=1e-4)

    def loss(self, x1, x2):
        criterion = nn.CosineSimilarity(dim=1)
        p1, p2, z1, z2 = self.model(x1=x1, x2=x2)
        return -(criterion(p1, z2).mean() + criterion(p2, z1).mean()) * 0.5


class MMPretrainBYOL(Peer):
    adapter, predictor, size = "mmpretrain", "head.predictor", 32
    kind = "BYOL"

    def build(self):
        from mmengine.logging import MessageHub
        from mmpretrain.models import selfsup

        # The runner's: BYOL's schedule of the target reads it.
        MessageHub.get_current_instance().update_info("max_iters", 1000)

        def neck(**options):
            options = {"num_layers": 2, "with_bias": True, "with_last_bn": False} | options
            return {"type": "NonLinearNeck", "norm_cfg": {"type": "BN1d"}, **options}

        return getattr(selfsup, self.kind)(
            backbone={
                "type": "mmpretrain.ResNet",
                "depth": 18,
                "stem_channels": 8,
                "base_channels": 8,
                "norm_cfg": {"type": "BN"},
            },
            neck={
                **neck(in_channels=64, hid_channels=32, out_channels=16),
                "_scope_": "mmpretrain",
            },
            head={
                "type": "mmpretrain.LatentPredictHead",
                "loss": {"type": "CosineSimilarityLoss"},
                "predictor": neck(
                    in_channels=16, hid_channels=32, out_channels=16, with_avg_pool=False
                ),
            },
        )

    def loss(self, x1, x2):
        return self.model([x1, x2], None, mode="loss")["loss"]


class MMPretrainSimSiam(MMPretrainBYOL):
    kind = "SimSiam"


PEERS = [
    MMPretrainBYOL,
    MMPretrainSimSiam,
    LightlyBYOL,
    LightlySimSiam,
    ByolPytorch,
    ByolPytorchSimSiam,
    SimSiam,
]
