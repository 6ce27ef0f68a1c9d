"""Adapters: ``directpred.adapters.X`` replaces the learned predictor of codebase X.

Each has ``replace_predictor(model, optimizer=None, **head_options)`` and ``restore(model)``; that
for haiku, whose models are pure functions, has ``replace_predictor(transformed, **head_options)``.
"""
