"""Layers whose tokens a tensor-parallel group shares: each rank takes a part of them to the experts."""
