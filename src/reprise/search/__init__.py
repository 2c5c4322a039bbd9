"""Hyper-parameter search over a recipe with Optuna: chosen and pruned by validation alone, on tuning seeds."""
