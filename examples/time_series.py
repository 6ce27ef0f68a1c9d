"""Does SimSiam collapse on windows of a three-axis sensor? In numbers, for every predictor.

The windows are synthetic: eight activities, each with a frequency, harmonics and a pose of its own,
worn at an angle that differs from person to person. The encoder is a 1-D ResNet. Printed, one value
a seed: the last loss (-2 is perfect); spread and effective rank of what the projector gives for
windows of other people; condition of the predictor; their accuracy; the warnings in training.

python examples/time_series.py [SEEDS [STEPS]]
"""

import sys
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import directpred as dp
from directpred.metrics import diagnose
from directpred.monitor import CollapseMonitor, CollapseWarning
from directpred.torch import DirectPredHead

DIM, BATCH, LENGTH, CLASSES = 64, 128, 64, 8
PREDICTORS = {
    "none": nn.Identity,
    "learned, linear": lambda: nn.Linear(DIM, DIM, bias=False),
    "learned, 2-layer": lambda: nn.Sequential(*layer(DIM, 32), nn.Linear(32, DIM)),
    "Eq18(normalize=False)": lambda: DirectPredHead(DIM, dp.Eq18(normalize=False)),
    "Eq18()": lambda: DirectPredHead(DIM),
    "BoostScale()": lambda: DirectPredHead(DIM, dp.BoostScale()),
}


def layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]


def random_rotation(n: int, angle: float) -> Tensor:
    """Rotations (n, 3, 3) about random axes, by a random angle of this deviation."""
    x, y, z = torch.randn(3, n) * angle / 3**0.5
    o = torch.zeros(n)
    return torch.matrix_exp(torch.stack([o, -z, y, z, o, -x, -y, x, o], 1).view(n, 3, 3))


def record(people: int, windows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows (n, 3, 2 · LENGTH) at 32 Hz, and the activity of each (n,)."""
    fixed = torch.Generator().manual_seed(1)  # the activities are the same in every set
    pose = F.normalize(torch.randn(CLASSES, 3, generator=fixed), dim=1)
    strength = torch.randn(CLASSES, 3, 3, generator=fixed) * torch.tensor([0.6, 0.4, 0.2])
    torch.manual_seed(seed)
    n = people * CLASSES * windows
    person = torch.arange(n) // (CLASSES * windows)
    activity = torch.arange(n) // windows % CLASSES
    pace = 1 + 0.1 * torch.randn(people)[person] + 0.05 * torch.randn(n)
    pace = pace * torch.linspace(0.8, 2.2, CLASSES)[activity]
    t = torch.arange(2 * LENGTH) / 32
    phase = 2 * torch.pi * (pace[:, None] * t + torch.rand(n, 1))
    lag = 2 * torch.pi * torch.rand(CLASSES, 3, 3, 1, generator=fixed)[activity]
    waves = torch.sin(phase[:, None, None] * torch.arange(1, 4)[:, None] + lag)
    signal = pose[activity][..., None] + (strength[activity][..., None] * waves).sum(2)
    signal = random_rotation(people, 0.3)[person] @ signal
    return signal + 0.15 * torch.randn_like(signal), activity


def augment(x: Tensor) -> Tensor:
    """One view: a random crop in time, a turn of the sensor, a change of scale, noise."""
    start = torch.randint(LENGTH, (len(x), 1, 1)) + torch.arange(LENGTH)
    x = x.gather(2, start.expand(-1, 3, -1))
    x = random_rotation(len(x), 0.8) @ x * (1 + 0.2 * torch.randn(len(x), 1, 1))
    return x + 0.3 * torch.randn_like(x)


def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    padded = nn.Conv1d(inputs, outputs, 5, stride=stride, padding=2, bias=False)
    return [padded, nn.BatchNorm1d(outputs)]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        body = [*conv(inputs, outputs, 2), nn.ReLU(), *conv(outputs, outputs, 1)]
        self.body, self.shortcut = nn.Sequential(*body), nn.Conv1d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SimSiam(nn.Module):
    def __init__(self, predictor: str, final_norm: bool) -> None:
        super().__init__()
        pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten()]
        self.encoder = nn.Sequential(Block(3, 16), Block(16, 32), Block(32, 64), *pool)
        last = [nn.BatchNorm1d(DIM, affine=False)] if final_norm else []
        self.projector = nn.Sequential(*layer(64, 128), nn.Linear(128, DIM), *last)
        self.predictor = PREDICTORS[predictor]()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))
        cos = F.cosine_similarity
        return -(cos(self.predictor(z1), z2.detach()) + cos(self.predictor(z2), z1.detach())).mean()


def knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    nearest = (F.normalize(test) @ F.normalize(train).T).topk(20).indices
    return 100 * float((labels[nearest].mode().values == truth).float().mean())


def run(predictor: str, final_norm: bool, seed: int, steps: int) -> tuple[float, ...]:
    x, labels = record(people=20, windows=10, seed=seed)
    x_test, truth = record(people=10, windows=10, seed=100 + seed)
    torch.manual_seed(seed)
    model = SimSiam(predictor, final_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if isinstance(model.predictor, DirectPredHead):
        model.predictor.attach(optimizer)
    CollapseMonitor(model.projector, every=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CollapseWarning)
        for _ in range(steps):
            batch = x[torch.randint(len(x), (BATCH,))]
            loss = model(augment(batch), augment(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        features, test = (model.encoder(w[..., LENGTH // 2 : -LENGTH // 2]) for w in (x, x_test))
        measured = diagnose(model.projector(test))
    weight = getattr(model.predictor, "weight", torch.zeros(DIM, DIM)).detach()
    accuracy, condition = knn(features, labels, test, truth), torch.linalg.cond(weight).item()
    figures = loss.item(), measured["spread"], measured["effective_rank"], condition, accuracy
    return *figures, len(caught)


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 250
    torch.set_num_threads(1)
    print("| ends in | predictor | loss | spread | rank | condition | k-NN, % | warned |")
    print(8 * "| --- ", end="|\n")
    for end in ("Linear", "BatchNorm"):
        for name in PREDICTORS:
            runs = [run(name, end == "BatchNorm", seed, steps) for seed in range(seeds)]
            cells = (", ".join(f"{x:.3g}" for x in column) for column in zip(*runs, strict=True))
            print("|", " | ".join([end, name, *cells]).replace("nan", "–"), "|", flush=True)


if __name__ == "__main__":
    main()
