"""Queries, keys and values out of one projection, queries and keys turned by their positions on the way.

One pass forward over what a projection gives, one backward into its gradient; angles are applied in fp32 and rounded
once. Shapes: B sequences, S tokens of one, W = heads * 3 * H columns, H width of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.kernels.choose import runs_triton
from ds_moe_ep.kernels.eager import not_compiled

Rotation = tuple[Tensor, Tensor]  # cosines and sines [S, H/2], fp32

BLOCK_ELEMENTS = 2**22  # widened to fp32 at a time on a CPU; elsewhere sixteen times as many, in fewer launches


def split_rotated(
    qkv_BSW: Tensor, rotation: Rotation, head_size: int, use_triton: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, heads, S, H] turned by their positions, and values as they lie. Differentiable.

    The columns lie head by head: query, key and value of head 0, then of head 1, and so on. The pair (i, i + H/2) is
    turned by its position's angle.
    """
    query, key, value = _SplitRotated.apply(qkv_BSW, *rotation, head_size, use_triton)  # type: ignore[no-untyped-call]
    return query, key, value


def turn(x: Tensor, cos: Tensor, sin: Tensor, turned: Tensor) -> None:
    """Writes `x` [..., H], each pair (i, i + H/2) turned by its angle; cosines and sines fit [..., H/2]."""
    first, second = x.chunk(2, dim=-1)
    first_turned, second_turned = turned.chunk(2, dim=-1)
    first_turned.copy_((first * cos).sub_(second * sin))
    second_turned.copy_((second * cos).add_(first * sin))


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BSW: Tensor, cos: Tensor, sin: Tensor, head_size: int, use_triton: bool | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.use_triton = use_triton
        packed = qkv_BSW.contiguous().unflatten(-1, (-1, 3, head_size))  # [B, S, heads, 3, H]
        num_sequences, num_tokens, num_heads = packed.shape[:3]
        query, key = (packed.new_empty(num_sequences, num_heads, num_tokens, head_size) for _ in range(2))
        if runs_triton(use_triton, packed, cos, sin):
            from ds_moe_ep.kernels.compiled import rotary as kernels

            kernels.unpack(packed, cos, sin, query, key)
        else:
            for here in _positions(packed):
                angles = cos[here].unsqueeze(1), sin[here].unsqueeze(1)
                for part, turned in enumerate((query, key)):
                    turn(packed[:, here, :, part], *angles, turned.transpose(1, 2)[:, here])
        return query, key, packed[:, :, :, 2].transpose(1, 2)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        num_sequences, num_heads, num_tokens, head_size = gradients[0].shape
        packed = gradients[0].new_empty(num_sequences, num_tokens, num_heads, 3, head_size)
        if runs_triton(ctx.use_triton, packed, cos, sin):
            from ds_moe_ep.kernels.compiled import rotary as kernels

            kernels.pack(packed, cos, sin, *gradients)
        else:
            for here in _positions(packed):
                back = cos[here].unsqueeze(1), -sin[here].unsqueeze(1)
                for part, gradient in enumerate(gradients[:2]):
                    turn(gradient.transpose(1, 2)[:, here], *back, packed[:, here, :, part])
                packed[:, here, :, 2] = gradients[2].transpose(1, 2)[:, here]
        return packed.flatten(2), None, None, None, None


def _positions(packed: Tensor) -> list[slice]:
    """The positions, cut so that what is widened at a time stays small."""
    num_tokens = packed.shape[1]
    num_elements = BLOCK_ELEMENTS if packed.is_cpu else 16 * BLOCK_ELEMENTS
    per_block = max(1, num_elements * num_tokens // max(packed.numel(), 1))
    return [slice(start, min(start + per_block, num_tokens)) for start in range(0, num_tokens, per_block)]
