"""Knows tensors, not meaning: per file one operation, its plain-torch form and its gradient."""
