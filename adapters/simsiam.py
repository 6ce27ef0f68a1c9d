"""SimSiam by its authors (https://github.com/facebookresearch/simsiam): nothing of its own."""

from directpred.torch import replace_predictor, restore

__all__ = ["replace_predictor", "restore"]
