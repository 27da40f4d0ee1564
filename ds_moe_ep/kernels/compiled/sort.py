"""A counting sort in two kernels.

1. Each block of choices counts its experts.
2. Each block adds up what lies before it: all choices of smaller experts, and those of its own in earlier blocks. With
   the rank within the block that is the row of a choice; nothing is sorted twice, and equal keys keep their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
TILE = 32  # experts, and blocks, that are looked at together
WARPS = 8


def sort_choices(ids_TK: Tensor, is_used_TK: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The choice of each row, the row of each choice, and the used choices of each expert."""
    size = ids_TK.numel()
    row_of_choice_TK, count_E = torch.empty_like(ids_TK), ids_TK.new_zeros(num_experts)
    choice_of_row_N = ids_TK.new_empty(size)
    if size == 0:
        return choice_of_row_N, row_of_choice_TK, count_E
    num_blocks = triton.cdiv(size, BLOCK)
    counts = ids_TK.new_empty(num_blocks, num_experts + 1, dtype=torch.int32)
    has_used = is_used_TK is not None
    is_used = ids_TK if is_used_TK is None else is_used_TK.contiguous()
    with torch.cuda.device_of(ids_TK):
        count_kernel[(num_blocks,)](
            ids_TK, is_used, counts, size, num_experts, HAS_USED=has_used, TILE=TILE, BLOCK=BLOCK, num_warps=WARPS
        )
        place_kernel[(num_blocks,)](
            ids_TK,
            is_used,
            counts,
            choice_of_row_N,
            row_of_choice_TK,
            count_E,
            size,
            num_experts,
            num_blocks,
            HAS_USED=has_used,
            TILE=TILE,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return choice_of_row_N, row_of_choice_TK, count_E


@triton.jit
def load_keys(ids, is_used, at, size, num_experts, HAS_USED: tl.constexpr):
    """The experts of a block's choices: one more than there are for unused ones, two more beyond the end."""
    inside = at < size
    key = tl.load(ids + at, mask=inside, other=0).to(tl.int32)
    if HAS_USED:
        key = tl.where(tl.load(is_used + at, mask=inside, other=0) != 0, key, num_experts)
    return tl.where(inside, key, num_experts + 1)


@triton.jit
def count_kernel(
    ids, is_used, counts, size, num_experts,
    HAS_USED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The choices of each expert within a block."""
    block = tl.program_id(0)
    key = load_keys(ids, is_used, block * BLOCK + tl.arange(0, BLOCK), size, num_experts, HAS_USED)
    for start in range(0, num_experts + 1, TILE):
        expert = start + tl.arange(0, TILE)
        count = tl.sum((key[:, None] == expert[None, :]).to(tl.int32), 0)
        tl.store(counts + block * (num_experts + 1) + expert, count, mask=expert <= num_experts)


@triton.jit
def place_kernel(
    ids, is_used, counts, choice_of_row, row_of_choice, count_of_expert,
    size, num_experts, num_blocks,
    HAS_USED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of a block's choices."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    key = load_keys(ids, is_used, at, size, num_experts, HAS_USED)
    row = tl.zeros([BLOCK], tl.int32)
    num_smaller = 0
    for start in range(0, num_experts + 1, TILE):
        expert = start + tl.arange(0, TILE)
        total = tl.zeros([TILE], tl.int32)
        before = tl.zeros([TILE], tl.int32)
        for first in range(0, num_blocks, TILE):
            other = first + tl.arange(0, TILE)
            known = (other < num_blocks)[:, None] & (expert <= num_experts)[None, :]
            count = tl.load(counts + other[:, None] * (num_experts + 1) + expert[None, :], mask=known, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where((other < block)[:, None], count, 0), 0)
        hits = (key[:, None] == expert[None, :]).to(tl.int32)
        first_row = num_smaller + tl.cumsum(total, 0) - total + before
        row += tl.sum(hits * (tl.cumsum(hits, 0) - hits + first_row[None, :]), 1)
        num_smaller += tl.sum(total, 0)
        if block == 0:
            tl.store(count_of_expert + expert, total.to(tl.int64), mask=expert < num_experts)
    inside = at < size
    tl.store(row_of_choice + at, row.to(tl.int64), mask=inside)
    tl.store(choice_of_row + row, at.to(tl.int64), mask=inside)
