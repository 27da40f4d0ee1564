"""Layer norm: apex's fused one where it is installed, torch's else. Both have the same parameters."""

from __future__ import annotations

from torch import nn

from ds_moe_ep.model import fused


def layer_norm(hidden_size: int) -> nn.Module:
    """A layer norm over the last dimension of `hidden_size`, with `weight` and `bias`."""
    make = fused.offered().layer_norm or nn.LayerNorm
    return make(hidden_size)
