"""stable-pretraining (https://github.com/rbalestr-lab/stable-pretraining): nothing of its own.

Its module drives the optimizers by hand, callbacks' among them.
"""

from directpred.torch import replace_predictor, restore

__all__ = ["replace_predictor", "restore"]
