"""Layers that DeepSpeed made, with the package's traffic."""
