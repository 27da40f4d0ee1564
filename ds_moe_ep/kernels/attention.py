"""Causal attention by blocks of queries, as batched matrix products: for heads that no flash kernel takes.

1. A block of queries meets the keys up to its own end; the keys behind it are skipped.
2. Scores of one block are in memory at a time, in fp32, at most BLOCK_BYTES; nothing of them is kept.
3. Backward makes the shares again and adds up the gradients of keys and values over blocks in fp32.

Counted for 16 heads of 512 and 10,000 tokens in fp16: forward takes 1.8 TFLOP, which run as a library's own products,
and 4.5 passes over 3.5 GB of scores. A kernel that keeps scores on the chip has no room for the tiles of such heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.kernels.attention_path import queries_per_block, query_blocks
from ds_moe_ep.kernels.eager import not_compiled, without_autocast
from ds_moe_ep.kernels.linear import add_wide_products


def blockwise_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention with is_causal, for [B, heads, S, H]. Differentiable, local."""
    shape = query.shape
    flat = [each.flatten(0, 1) for each in (query, key, value)]
    out: Tensor = _BlockwiseAttention.apply(*flat, queries_per_block(*shape[:3]))  # type: ignore[no-untyped-call]
    return out.view(shape)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, per_block: int) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.per_block = per_block
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        with without_autocast(query.device.type):
            for here, upto in _blocks(query.shape[1], per_block):
                shares = _shares(query, key, here, upto).to(value.dtype)
                out[:, here] = torch.bmm(shares, value[:, upto])
        return out

    @staticmethod
    @not_compiled
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        wide, scale = torch.promote_types(query.dtype, torch.float32), query.shape[-1] ** -0.5
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = (torch.zeros_like(each, dtype=wide) for each in (key, value))
        with without_autocast(query.device.type):
            for here, upto in _blocks(query.shape[1], ctx.per_block):
                shares = _shares(query, key, here, upto)
                _add_product(d_value[:, upto], shares.to(value.dtype).transpose(1, 2), d_out[:, here])
                d_shares = _product(d_out[:, here], value[:, upto].transpose(1, 2))
                d_scores = torch.ops.aten._softmax_backward_data(d_shares, shares, -1, wide).to(query.dtype)
                d_query[:, here] = torch.bmm(d_scores, key[:, upto]).mul_(scale)
                _add_product(d_key[:, upto], d_scores.transpose(1, 2), query[:, here], scale)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None


def _blocks(num_tokens: int, per_block: int) -> list[tuple[slice, slice]]:
    """Each block's queries, and the keys that they see."""
    return [(slice(start, end), slice(0, end)) for start, end in query_blocks(num_tokens, per_block)]


def _shares(query: Tensor, key: Tensor, here: slice, upto: slice) -> Tensor:
    """How much each query of a block takes of each key, 0 of those behind it."""
    scores = _product(query[:, here], key[:, upto].transpose(1, 2), query.shape[-1] ** -0.5)
    num_queries = here.stop - here.start
    is_behind = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).triu_(1)
    scores[:, :, here.start :].masked_fill_(is_behind, float("-inf"))
    return scores.softmax(-1)


def _product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """The batched product times a number, at least in fp32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != wide:
        product = left.new_empty(*left.shape[:2], right.shape[2], dtype=wide)
        add_wide_products(product, left, right, factor, before=0.0)
        return product
    return torch.baddbmm(left.new_empty(1, dtype=wide), left.to(wide), right.to(wide), beta=0, alpha=factor)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """Adds the batched product times a number to a sum that may be of a wider type."""
    if left.is_cuda and left.dtype != total.dtype:
        add_wide_products(total, left, right, factor)
    else:
        total.baddbmm_(left.to(total.dtype), right.to(total.dtype), alpha=factor)
