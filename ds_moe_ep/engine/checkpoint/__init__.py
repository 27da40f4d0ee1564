"""Checkpoints: safe saves, guarded loads, weights between layouts."""
