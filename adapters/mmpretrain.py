"""mmpretrain (https://github.com/open-mmlab/mmpretrain): its BYOL and SimSiam.

Importing this registers a neck, to be the predictor of a ``LatentPredictHead``, and a hook that
closes its steps. A config names them::

    custom_imports = dict(imports=["directpred.adapters.mmpretrain"])
    model.head.predictor = dict(type="DirectPredNeck", in_channels=256, rule=dict(type="Eq18"))
    custom_hooks = [dict(type="DirectPredHook")]
"""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS, MODELS
from torch import Tensor, nn
from torch.optim import Optimizer

from directpred.spectrum import BoostScale, DirectCopy, DirectSet, Eq18
from directpred.torch import DirectPredHead, restore
from directpred.torch.find import find
from directpred.torch.replace import replace

__all__ = ["DirectPredHook", "DirectPredNeck", "replace_predictor", "restore"]

RULES = {rule.__name__: rule for rule in (Eq18, DirectSet, DirectCopy, BoostScale)}


@MODELS.register_module()
class DirectPredNeck(DirectPredHead):
    """A `DirectPredHead` that takes and gives what mmpretrain's necks do.

    Args:
        in_channels: Width of the features.
        rule: A rule, or in a config its name and options, ``dict(type="DirectCopy", eps=0.3)``.
        **options: Other options of `DirectPredHead`.

    Raises:
        TypeError, ValueError: As `DirectPredHead`; or there is no rule of that name.
    """

    def __init__(self, in_channels: int, rule: Any = Eq18(), **options: Any) -> None:  # noqa: B008
        if isinstance(rule, dict):
            fields = dict(rule)
            if (name := fields.pop("type", None)) not in RULES:
                raise ValueError(f"unknown rule {name!r}; known are {', '.join(RULES)}")
            rule = RULES[name](**fields)
        super().__init__(in_channels, rule, **options)

    def forward(self, inputs: Any) -> Any:
        """Predict for the last of a tuple or list of features (n, dim), in a tuple of one."""
        features: Tensor = inputs[-1]
        return (super().forward(features),)


@HOOKS.register_module()
class DirectPredHook(Hook):  # type: ignore[misc]
    """Closes a step of every head after every step of the optimizer."""

    def before_train(self, runner: Runner) -> None:
        """Attach the heads to the runner's optimizer, gradient accumulation and AMP included."""
        for module in runner.model.modules():
            if isinstance(module, DirectPredHead):
                module.attach(runner.optim_wrapper.optimizer)


def replace_predictor(
    model: nn.Module, optimizer: Optimizer | None = None, **head_options: Any
) -> DirectPredHead:
    """Put a `DirectPredNeck` where ``head.predictor`` stands, in a model that is built.

    Args:
        model: An mmpretrain BYOL or SimSiam, such as `runner.model`.
        optimizer: As `directpred.torch.replace_predictor`; mmengine's ``OptimWrapper`` too.
        **head_options: Options of `DirectPredHead`.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: As `directpred.torch.replace_predictor`.
    """
    return replace(find(model, "predictor"), optimizer, DirectPredNeck, **head_options)
