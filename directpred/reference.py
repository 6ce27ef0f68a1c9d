"""DirectPred in plain PyTorch: the whole method, without options, checks or speed.

To read, and to adapt. Everything else in this package computes the same, and its tests hold it to
this. Source: Tian, Chen, Ganguli, ICML 2021 (arXiv 2102.06810), and the code published with it.
"""

import torch

RHO = 0.3  # weight of the old correlation, Eq. 19
EPS = 0.1  # boost of small eigenvalues, Eq. 18


class DirectPred(torch.nn.Module):
    """A linear predictor that is computed from its input, features z (n, dim), instead of trained.

    Use it where the learned predictor stood, and call `step` after `optimizer.step()`.
    """

    weight: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(dim))
        self.correlation: torch.Tensor | None = None
        self.views: list[torch.Tensor] = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Apply the weight of the step before; remember the features."""
        self.views.append(z.detach())
        return z @ self.weight

    @torch.no_grad()
    def step(self) -> None:
        """Set the weight from the features of all views since the last step."""
        z = torch.cat(self.views)
        batch = z.T @ z / len(z)
        old = batch if self.correlation is None else self.correlation
        self.correlation = RHO * old + (1 - RHO) * batch  # Eq. 19
        s, u = torch.linalg.eigh(self.correlation)  # ascending
        p = (s.clamp(min=0) / s[-1]).sqrt() + EPS  # Eq. 18, over the largest
        self.weight.copy_(u @ torch.diag(p) @ u.T)
        self.views = []
