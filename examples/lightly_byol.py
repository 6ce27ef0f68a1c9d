"""BYOL with lightly on scikit-learn's digits, as a user of lightly writes it.

python examples/lightly_byol.py [SEED [EPOCHS]]
"""

import copy
import sys

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 30
torch.manual_seed(seed)


class BYOL(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(128, 256, 64)
        self.prediction_head = BYOLPredictionHead(64, 256, 64)

        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()


def convolution(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


class Images(torch.utils.data.Dataset):
    def __init__(self, digits, transform):
        self.images = [Image.fromarray(np.uint8(x * 15.9)).resize((16, 16)) for x in digits]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index].convert("RGB"))


digits = load_digits()
train, test, train_labels, test_labels = train_test_split(
    digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0
)
# Digits are not mirrored, and are small.
mild = {"input_size": 16, "min_scale": 0.6, "hf_prob": 0.0, "gaussian_blur": 0.0}
transform = BYOLTransform(BYOLView1Transform(**mild), BYOLView2Transform(**mild))
dataloader = torch.utils.data.DataLoader(
    Images(train, transform), batch_size=128, shuffle=True, drop_last=True
)

backbone = nn.Sequential(
    *convolution(3, 32),
    *convolution(32, 64),
    *convolution(64, 128),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
)
model = BYOL(backbone)
criterion = NegativeCosineSimilarity()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=4e-4)

for epoch in range(epochs):
    total = 0.0
    momentum = cosine_schedule(epoch, epochs, 0.98, 1)
    for x0, x1 in dataloader:
        update_momentum(model.backbone, model.backbone_momentum, m=momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
        p0, p1 = model(x0), model(x1)
        z0, z1 = model.forward_momentum(x0), model.forward_momentum(x1)
        loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        total += loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch:2}, loss {total / len(dataloader):.4f}", flush=True)


def embed(digits):
    """Features of the backbone, and normalised projections."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    dataset = Images(digits, lambda image: normalize(to_tensor(image), mean, std))
    with torch.no_grad():
        features = model.backbone(torch.stack(list(dataset)))
        return features, nn.functional.normalize(model.projection_head(features))


model.eval()
(seen, _), (unseen, projections) = embed(train), embed(test)
mean, std = seen.mean(0), seen.std(0) + 1e-6
probe = LogisticRegression(max_iter=2000).fit((seen - mean) / std, train_labels)
accuracy = 100 * probe.score((unseen - mean) / std, test_labels)
spread = float(projections.std(0).mean() * projections.shape[1] ** 0.5)
print(f"linear probe {accuracy:.1f} %, spread of the projections {spread:.2f} (1: isotropic)")
