"""Queries and keys turned on the way out of a projection's result, and on the way back into its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pairs of one program, of several heads
WARPS = 4  # 8 elements per thread: 16 bytes of fp16 or bf16 per load


def unpack(packed: Tensor, cos: Tensor, sin: Tensor, query: Tensor, key: Tensor) -> None:
    """Writes turned queries and keys from `packed` [B, S, heads, 3, H]."""
    _launch(packed, cos, sin, (query, key, query), is_backward=False)


def pack(packed: Tensor, cos: Tensor, sin: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes queries and keys, turned back, and values into `packed` [B, S, heads, 3, H]."""
    given = [each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value)]
    _launch(packed, cos, sin, given, is_backward=True)


def _launch(
    packed: Tensor, cos: Tensor, sin: Tensor, parts: tuple[Tensor, ...] | list[Tensor], is_backward: bool
) -> None:
    num_sequences, num_tokens, num_heads, _, width = packed.shape
    if packed.numel() == 0:
        return
    tile = triton.next_power_of_2(width // 2)
    heads = max(1, min(BLOCK // tile, triton.next_power_of_2(num_heads)))
    strides = [step for part in parts for step in part.stride()[:3]]
    with torch.cuda.device_of(packed):
        rotate_kernel[(num_sequences * num_tokens, triton.cdiv(num_heads, heads))](
            packed, cos.contiguous(), sin.contiguous(), *parts, *strides, num_tokens, num_heads, width // 2,
            IS_BACKWARD=is_backward, HEADS=heads, TILE=tile, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def turn(source, target, half, cos, sin, inside):
    """Pairs from one place to another, turned."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, first * cos - second * sin, mask=inside)
    tl.store(target + half, second * cos + first * sin, mask=inside)


@triton.jit
def rotate_kernel(
    packed, cos, sin, query, key, value,
    query_b, query_h, query_s, key_b, key_h, key_s, value_b, value_h, value_s, num_tokens, num_heads, half,
    IS_BACKWARD: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, out of a projection's result or back into its gradient."""
    row = tl.program_id(0).to(tl.int64)
    sequence, position = row // num_tokens, row % num_tokens
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    pair = tl.arange(0, TILE)[None, :]
    inside = (head < num_heads) & (pair < half)
    c = tl.load(cos + position * half + pair, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + position * half + pair, mask=pair < half, other=0.0).to(tl.float32)
    at = packed + (row * num_heads + head) * 6 * half + pair
    query += sequence * query_b + position * query_s + head * query_h + pair
    key += sequence * key_b + position * key_s + head * key_h + pair
    if IS_BACKWARD:
        turn(query, at, half, c, -s, inside)
        turn(key, at + 2 * half, half, c, -s, inside)
        value += sequence * value_b + position * value_s + head * value_h + pair
        tl.store(at + 4 * half, tl.load(value, mask=inside), mask=inside)
        tl.store(at + 5 * half, tl.load(value + half, mask=inside), mask=inside)
    else:
        turn(at, query, half, c, s, inside)
        turn(at + 2 * half, key, half, c, s, inside)
