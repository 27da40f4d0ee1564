"""Knows tensors, not meaning: per file one operation, its plain-torch form, its gradient, and which of both runs.

`compiled/` holds the same operations as Triton kernels, a file each; it is imported where they run.
"""
