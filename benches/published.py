"""The published DirectPred algorithm, written from its description, to be measured against.

It stores the outer product of every row and averages them, decomposes the correlation as if it
were not symmetric, and sets W = U diag(max((s / max s)^½ + eps, 1e-4)) Uᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Published(nn.Module):
    """The published predictor: apply, observe, and `step` after the optimizer's.

    Args:
        dim: Width of the features.
        rho: Weight of the old correlation in the moving average.
        eps: Boost of the normalised eigenvalues.
    """

    def __init__(self, dim: int, rho: float = 0.3, eps: float = 0.01) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False).requires_grad_(False)
        self.rho = rho
        self.eps = eps
        self.batch: Tensor | None = None
        self.correlation: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Predict from features (n, dim) of a view, and keep them for the step."""
        kept = z.detach()
        self.batch = kept if self.batch is None else torch.cat([self.batch, kept])
        return self.linear(z)

    @torch.no_grad()
    def step(self) -> None:
        """Move the correlation and set the weight."""
        assert self.batch is not None, "forward comes first"
        outer = torch.bmm(self.batch.unsqueeze(2), self.batch.unsqueeze(1))
        correlation = outer.mean(dim=0)
        del outer
        self.batch = None
        if self.correlation is not None:
            correlation = self.rho * self.correlation + (1 - self.rho) * correlation
        self.correlation = correlation
        values, vectors = torch.linalg.eig(correlation)
        s, u = values.real.clamp(min=0), vectors.real
        p = ((s / s.max()).sqrt() + self.eps).clamp(min=1e-4)
        self.linear.weight.copy_(u @ torch.diag(p) @ u.T)


def stored_bytes(dim: int, rows: int) -> int:
    """Bytes of the outer products of one step in float32."""
    return 4 * rows * dim**2
