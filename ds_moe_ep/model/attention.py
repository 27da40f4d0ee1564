"""Causal multi-head attention with rotary positions (arXiv 2104.09864).

Positions are rotations and so cost no parameters, at 10,000 tokens as at 100. Shapes: B sequences, S tokens
of one, D width, H width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ds_moe_ep.kernels.attention import blockwise_causal_attention
from ds_moe_ep.kernels.attention_path import attention_path
from ds_moe_ep.kernels.rotary import Rotation, split_rotated

ROTARY_BASE = 10_000.0


class CausalAttention(nn.Module):
    """Causal self-attention of `num_heads` heads, without biases: 4 * D * D parameters.

    The rows of `qkv` lie head by head (query, key and value of head 0, then of head 1, ...), and the number
    of heads is read from the weight: `qkv` cut by rows and `out` by columns is a layer of fewer heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.use_triton: bool | None = None  # for the rotation, as every operation of `kernels` takes it
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BSD: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Values that each token gathers from itself and the tokens before it: [B, S, D]; `attention_path` says how."""
        query, key, value = split_rotated(self.qkv(x_BSD), rotation, self.head_size, self.use_triton)
        if attention_path(self.head_size, x_BSD.device.type) == "blocks":
            gathered = blockwise_causal_attention(query, key, value)
        else:
            gathered = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed: torch.Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return mixed


def rotation_of(num_positions: int, head_size: int, device: torch.device) -> Rotation:
    """Cosines and sines [S, H/2] of the rotary positions 0 .. S-1.

    In fp32 whatever the model's dtype is: fp16 cannot tell position 4,097 from 4,096.
    """
    pair = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
    position = torch.arange(num_positions, dtype=torch.float32, device=device)
    angle = position[:, None] * ROTARY_BASE ** (-pair / head_size)
    return angle.cos(), angle.sin()
