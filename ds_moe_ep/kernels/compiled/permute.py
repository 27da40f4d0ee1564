"""Rows of tokens, both ways: one reads each token once and writes its rows, one reads the rows and writes the token.

`spread` is permute forward and, with weights and dot products, unpermute backward; `collect` is unpermute forward and,
without weights, permute backward. Where weights are applied to the rows on their way out it is the other way round:
`weighted_spread` is forward, and `weighted_collect` backward, with the dot products of the weights. All go by tokens,
so that the wide tensor of tokens passes memory once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 4  # 8 elements per thread: 16 bytes of fp16 or bf16 per load
MAX_ADDED = 2


def spread(x_TD: Tensor, row_of_choice_TK: Tensor, is_dropped_TK: Tensor | None, rows_ND: Tensor) -> None:
    """Writes each token into the rows of its choices; rows of no choice stay as they are."""
    num_tokens, num_choices = row_of_choice_TK.shape
    if num_tokens and rows_ND.numel():
        with torch.cuda.device_of(x_TD):
            spread_kernel[(num_tokens, triton.cdiv(x_TD.shape[1], BLOCK))](
                x_TD,
                row_of_choice_TK,
                row_of_choice_TK if is_dropped_TK is None else is_dropped_TK,
                rows_ND,
                x_TD.shape[1],
                K=num_choices,
                HAS_DROPPED=is_dropped_TK is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def weighted_spread(
    dy_TD: Tensor,
    rows_ND: Tensor,
    weights_TK: Tensor,
    row_of_choice_TK: Tensor,
    is_dropped_TK: Tensor | None,
    d_rows_ND: Tensor,
    d_weights_TK: Tensor | None,
) -> None:
    """Writes weight times token into the rows of its choices, and the dot products of the token with `rows_ND`."""
    num_tokens, num_choices = weights_TK.shape
    if num_tokens == 0:
        return
    with torch.cuda.device_of(dy_TD):
        weighted_spread_kernel[(num_tokens,)](
            dy_TD,
            rows_ND,
            weights_TK,
            row_of_choice_TK,
            row_of_choice_TK if is_dropped_TK is None else is_dropped_TK,
            d_rows_ND,
            weights_TK if d_weights_TK is None else d_weights_TK,
            dy_TD.shape[1],
            K=num_choices,
            HAS_DROPPED=is_dropped_TK is not None,
            WRITES_DOTS=d_weights_TK is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def weighted_collect(
    d_rows_ND: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    row_of_choice_TK: Tensor,
    is_dropped_TK: Tensor | None,
    dx_TD: Tensor,
    d_weights_TK: Tensor | None,
) -> None:
    """Writes the weighted sum of each token's rows, and their dot products with the token."""
    num_tokens, num_choices = weights_TK.shape
    if num_tokens == 0:
        return
    with torch.cuda.device_of(d_rows_ND):
        weighted_collect_kernel[(num_tokens,)](
            d_rows_ND,
            x_TD,
            weights_TK,
            row_of_choice_TK,
            row_of_choice_TK if is_dropped_TK is None else is_dropped_TK,
            dx_TD,
            weights_TK if d_weights_TK is None else d_weights_TK,
            x_TD.shape[1],
            K=num_choices,
            K_TILE=triton.next_power_of_2(num_choices),
            HAS_DROPPED=is_dropped_TK is not None,
            WRITES_DOTS=d_weights_TK is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def collect(
    rows_ND: Tensor,
    weights_TK: Tensor | None,
    row_of_choice_TK: Tensor,
    is_dropped_TK: Tensor | None,
    added: Sequence[Tensor],
    y_TD: Tensor,
) -> None:
    """Writes the sum of each token's rows, weighted where weights are given, and of the `added` [T, D] (at most 2)."""
    num_tokens, num_choices = row_of_choice_TK.shape
    if y_TD.numel() == 0:
        return
    first, second = [*added, y_TD, y_TD][:MAX_ADDED]
    with torch.cuda.device_of(rows_ND):
        collect_kernel[(num_tokens, triton.cdiv(y_TD.shape[1], BLOCK))](
            rows_ND,
            row_of_choice_TK if weights_TK is None else weights_TK,
            row_of_choice_TK,
            row_of_choice_TK if is_dropped_TK is None else is_dropped_TK,
            first,
            second,
            y_TD,
            y_TD.shape[1],
            K=num_choices,
            IS_WEIGHTED=weights_TK is not None,
            HAS_DROPPED=is_dropped_TK is not None,
            NUM_ADDED=len(added),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def clear_padding(rows_ND: Tensor, is_padding_N: Tensor) -> None:
    """Writes zeros into the padded rows, and touches no other."""
    if rows_ND.numel():
        with torch.cuda.device_of(rows_ND):
            clear_padding_kernel[(len(rows_ND), triton.cdiv(rows_ND.shape[1], BLOCK))](
                rows_ND, is_padding_N, rows_ND.shape[1], BLOCK=BLOCK, num_warps=WARPS
            )


@triton.jit
def spread_kernel(
    x, row_of_choice, is_dropped, rows, width,
    K: tl.constexpr, HAS_DROPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token's columns, into the rows of all of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + token * width + column, mask=inside, other=0.0)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice + token * K + k).to(tl.int64)
        if HAS_DROPPED:
            if tl.load(is_dropped + token * K + k) == 0:
                tl.store(rows + row * width + column, values, mask=inside)
        else:
            tl.store(rows + row * width + column, values, mask=inside)


@triton.jit
def weighted_spread_kernel(
    dy, rows, weights, row_of_choice, is_dropped, d_rows, d_weights, width,
    K: tl.constexpr, HAS_DROPPED: tl.constexpr, WRITES_DOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token into the rows of its choices, times their weights; its dot products with these rows."""
    token = tl.program_id(0).to(tl.int64)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice + token * K + k).to(tl.int64)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        stop = width  # a dropped choice has no row: nothing is read or written, and its dot product is 0
        if HAS_DROPPED:
            stop = tl.where(tl.load(is_dropped + token * K + k) == 0, width, 0)
        dots = tl.zeros([BLOCK], tl.float32)
        for start in range(0, stop, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            d = tl.load(dy + token * width + column, mask=inside, other=0.0).to(tl.float32)
            if WRITES_DOTS:
                dots += d * tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_rows + row * width + column, d * weight, mask=inside)
        if WRITES_DOTS:
            tl.store(d_weights + token * K + k, tl.sum(dots))


@triton.jit
def weighted_collect_kernel(
    d_rows, x, weights, row_of_choice, is_dropped, dx, d_weights, width,
    K: tl.constexpr, K_TILE: tl.constexpr, HAS_DROPPED: tl.constexpr, WRITES_DOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token from the rows of its choices, times their weights; its dot products with these rows."""
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, K_TILE)
    dots = tl.zeros([K_TILE], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], tl.float32)
        if WRITES_DOTS:
            mine = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            row = tl.load(row_of_choice + token * K + k).to(tl.int64)
            bound = width  # the bound carries the condition: the row of a dropped choice is not read
            if HAS_DROPPED:
                bound = tl.where(tl.load(is_dropped + token * K + k) == 0, width, 0)
            d = tl.load(d_rows + row * width + column, mask=column < bound, other=0.0).to(tl.float32)
            total += d * tl.load(weights + token * K + k).to(tl.float32)
            if WRITES_DOTS:
                dots += tl.where(choice == k, tl.sum(d * mine), 0.0)
        tl.store(dx + token * width + column, total, mask=inside)
    if WRITES_DOTS:
        tl.store(d_weights + token * K + choice, dots, mask=choice < K)


@triton.jit
def collect_kernel(
    rows, weights, row_of_choice, is_dropped, first, second, y, width,
    K: tl.constexpr, IS_WEIGHTED: tl.constexpr, HAS_DROPPED: tl.constexpr, NUM_ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token's columns, summed over the rows of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_choice + token * K + k).to(tl.int64)
        if HAS_DROPPED:  # the bound carries the condition: its row is not read, whatever it holds
            bound = tl.where(tl.load(is_dropped + token * K + k) == 0, width, 0)
            values = tl.load(rows + row * width + column, mask=column < bound, other=0.0).to(tl.float32)
        else:
            values = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if IS_WEIGHTED:
            values *= tl.load(weights + token * K + k).to(tl.float32)
        total += values
    if NUM_ADDED > 0:
        total += tl.load(first + token * width + column, mask=inside, other=0.0).to(tl.float32)
    if NUM_ADDED > 1:
        total += tl.load(second + token * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * width + column, total, mask=inside)


@triton.jit
def clear_padding_kernel(rows, is_padding, width, BLOCK: tl.constexpr):
    """A block of one row, cleared where it is padded."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(is_padding + row) != 0:
        tl.store(rows + row * width + column, tl.zeros([BLOCK], rows.dtype.element_ty), mask=column < width)
