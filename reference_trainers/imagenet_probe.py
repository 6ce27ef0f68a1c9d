"""The linear probe of BYOL and SimSiam on ImageNet: a linear layer on frozen features.

With augmentation, every epoch passes all images through the encoder: hence a Lightning module, for
several GPUs and reduced precision. `probes.linear_probe` is for features that stay the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from .probes import Accuracy


class ImageNetProbe(L.LightningModule):
    """A linear layer on a frozen encoder, for ``trainer.fit(probe, train, test)``.

    ``train`` and ``test`` are iterables, but no lists, ``train`` with a length, of batches: images
    (n, c, h, w), normalised floats, and labels (n,), int64. To train on, random resized crops of
    224 pixels, flipped half the time; to evaluate on, the centre of 224 of images resized to 256.

    The layer is trained on the mean cross-entropy by SGD with Nesterov momentum 0.9, without weight
    decay, with a cosine from ``lr`` to 0 over all steps: the settings of deepmind-research/byol
    (eval_experiment.py), there for 80 epochs. It starts as in facebookresearch/simsiam
    (main_lincls.py, where LARS trains it for 90 epochs). ``max_epochs`` is the trainer's.

    Args:
        encoder: From images to (n, width). The probe has a copy of it, always in eval mode.
        width: Of its features.
        classes: How many there are; labels are in [0, classes).
        lr: At the start; BYOL's is 0.2 · images in a batch, over all ranks / 256.
        seed: Decides where the layer starts.

    Attributes:
        history: The accuracies on ``test`` after every epoch.

    Raises:
        ValueError: In the fit: the number of training steps is not known.
    """

    def __init__(
        self, encoder: nn.Module, width: int, classes: int, lr: float, seed: int = 0
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.head = nn.utils.skip_init(nn.Linear, width, classes)  # draws nothing
        nn.init.normal_(self.head.weight, 0, 0.01, torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        self.top1 = MulticlassAccuracy(classes, top_k=1, average="micro")
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.lr = lr
        self.history: list[Accuracy] = []
        self.train()

    def train(self, mode: bool = True) -> ImageNetProbe:
        """Set the mode of everything but the encoder, whose statistics are frozen too."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """From images to the scores (n, classes)."""
        scores: Tensor = self.head(self.encoder(images))
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what is right in one batch."""
        scores = self(batch[0])
        for metric in (self.top1, self.top5):
            metric.update(scores, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Keep the accuracies, over all ranks."""
        if not self.trainer.sanity_checking:
            top1, top5 = (100.0 * float(metric.compute()) for metric in (self.top1, self.top5))
            self.history.append(Accuracy(top1, top5))
        self.top1.reset()
        self.top5.reset()

    def configure_optimizers(self) -> Any:
        """SGD, and the cosine over all steps."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # -1 where the batches have no length
            raise ValueError("the cosine needs max_epochs, and training batches with a length")
        optimizer = SGD(self.head.parameters(), self.lr, momentum=0.9, nesterov=True)
        cosine = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]
