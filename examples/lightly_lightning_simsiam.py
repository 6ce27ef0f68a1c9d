"""SimSiam with lightly and Lightning on scikit-learn's digits, as a user of both writes it."""

import lightning.pytorch as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from sklearn.datasets import load_digits
from torch import nn
from torchvision import transforms


class SimSiam(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU())
        self.projection_head = SimSiamProjectionHead(128, 128, 32)
        self.prediction_head = SimSiamPredictionHead(32, 16, 32)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch, batch_idx):
        (z0, p0), (z1, p1) = self(batch[0]), self(batch[1])
        loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


pl.seed_everything(0)
images = torch.from_numpy(load_digits().images).float().div(16)[:, None]
crop = transforms.RandomResizedCrop(8, scale=(0.6, 1.0))
pairs = [(crop(x), crop(x)) for x in images]

model = SimSiam()
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(model, torch.utils.data.DataLoader(pairs, batch_size=128, shuffle=True, drop_last=True))
