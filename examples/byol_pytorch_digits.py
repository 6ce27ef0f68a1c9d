"""byol-pytorch on scikit-learn's digits, as its README uses it."""

import torch
from byol_pytorch import BYOL
from sklearn.datasets import load_digits
from torch import nn
from torchvision import transforms

torch.manual_seed(0)
images = torch.from_numpy(load_digits().images).float().div(16)[:, None].expand(-1, 3, -1, -1)
net = nn.Sequential(
    *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
)
learner = BYOL(
    net,
    image_size=8,
    hidden_layer=-1,
    projection_size=32,
    projection_hidden_size=128,
    use_simplicial_embeddings=False,
    augment_fn=transforms.RandomResizedCrop(8, scale=(0.6, 1.0)),
)
optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)

for epoch in range(3):
    for batch in images[torch.randperm(len(images))].split(128)[:-1]:
        loss = learner(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
    print(f"epoch {epoch}, loss {loss.item():.4f}")
