"""Moved to `directpred.torch.ranks`."""

from directpred.torch.ranks import several, sum_over_ranks

__all__ = ["several", "sum_over_ranks"]
