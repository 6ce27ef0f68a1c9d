"""DirectPred for PyTorch: a `torch.nn.Module` that stands where the learned predictor stood.

- `head`: the module: what a forward pass gathers, and its saved state.
- `closing`: when a step of it ends: after an optimizer's, by hand, or by itself.
- `graph`: recording a closing as a CUDA graph.
- `ranks`: one collective a step for the statistics of all ranks.
- `precision`: float32 products whatever the user allows.
"""

from directpred.torch.closing import step
from directpred.torch.head import DirectPredHead

__all__ = ["DirectPredHead", "step"]
