"""BYOL with stable-pretraining on scikit-learn's digits, as its docstring of `byol` has it."""

import lightning.pytorch as pl
import stable_pretraining as spt
import torch
from sklearn.datasets import load_digits
from stable_pretraining.callbacks import TeacherStudentCallback
from stable_pretraining.forward import byol
from torch import nn
from torchvision import transforms

pl.seed_everything(0)
images = torch.from_numpy(load_digits().images).float().div(16)[:, None]
crop = transforms.RandomResizedCrop(8, scale=(0.6, 1.0))
pairs = [{"views": [{"image": crop(x)}, {"image": crop(x)}]} for x in images]

module = spt.Module(
    forward=byol,
    backbone=spt.TeacherStudentWrapper(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
    ),
    projector=spt.TeacherStudentWrapper(nn.Linear(128, 32)),
    predictor=nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)),
    byol_loss=spt.losses.BYOLLoss(),
    optim={"optimizer": {"type": "Adam", "lr": 3e-4}},
)
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    callbacks=[TeacherStudentCallback()],
)
trainer.fit(module, torch.utils.data.DataLoader(pairs, batch_size=128, shuffle=True))
