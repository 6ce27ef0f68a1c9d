"""SimSiam in a loop of accelerate on scikit-learn's digits."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn


class SimSiam(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.projector = nn.Linear(128, 32)
        self.predictor = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, images):
        z1, z2 = (
            self.projector(self.encoder(images + 0.2 * torch.randn_like(images))) for _ in range(2)
        )
        cos = nn.functional.cosine_similarity
        loss1 = -cos(self.predictor(z1), z2.detach()).mean()
        return loss1 - cos(self.predictor(z2), z1.detach()).mean()


accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
images = torch.from_numpy(load_digits().data).float().div(16)
model = SimSiam()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(images, 64, shuffle=True, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(2):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(f"epoch {epoch}, loss {loss.item():.4f}")
