"""DirectPred for PyTorch: a `torch.nn.Module` that stands where the learned predictor stood.

- `head`: the module: what a forward pass gathers, and its saved state.
- `closing`: when a step of it ends: after an optimizer's, by hand, or by itself.
- `graph`: recording a closing as a CUDA graph.
- `ranks`: one collective a step for the statistics of all ranks.
- `precision`: float32 products whatever the user allows.
- `find`: where a model keeps its predictor, and what that is like.
- `replace`: a learned predictor out of a model that is built, a head in, and back.
- `wrappers`: what is put around an optimizer, looked through.
"""

from directpred.torch.closing import step
from directpred.torch.head import DirectPredHead
from directpred.torch.replace import replace_predictor, restore

__all__ = ["DirectPredHead", "replace_predictor", "restore", "step"]
