"""DirectPred: set the predictor of BYOL and SimSiam instead of training it."""

from directpred import losses, metrics
from directpred.predictor import DirectPred
from directpred.spectrum import BoostScale, DirectCopy, DirectSet, Eq18, Rule

__version__ = "0.1.0"

__all__ = [
    "BoostScale",
    "DirectCopy",
    "DirectPred",
    "DirectSet",
    "Eq18",
    "Rule",
    "losses",
    "metrics",
]
