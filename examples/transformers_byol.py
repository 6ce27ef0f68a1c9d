"""SimSiam by Hugging Face's Trainer on scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments


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
        loss2 = -cos(self.predictor(z2), z1.detach()).mean()
        return {"loss": loss1 + loss2}


images = torch.from_numpy(load_digits().data).float().div(16)
model = SimSiam()
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="trained",
        num_train_epochs=2,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[{"images": image} for image in images],
)
trainer.train()
