"""Adapters: ``directpred.adapters.X`` replaces the learned predictor of codebase X."""
