"""Rows leave in send order and come back weighted: two gathers and their gradients.

Both directions are gathers, also in the backward pass, since the index maps are given both ways; nothing is
scattered, so the results do not depend on the order in which a device would add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.kernels.eager import not_compiled


@dataclass(frozen=True)
class RowMaps:
    """Which choice fills which row, both ways. N rows, T tokens with K choices each.

    A padded row belongs to no choice and holds zeros; a dropped choice has no row and yields zeros. The index of
    either points to place 0 and is masked. None for a mask means that there are no such rows or choices.
    """

    choice_of_row_N: Tensor
    row_of_choice_TK: Tensor
    is_padding_N: Tensor | None = None
    is_dropped_TK: Tensor | None = None

    @property
    def token_of_row_N(self) -> Tensor:
        num_choices = self.row_of_choice_TK.shape[1]
        return self.choice_of_row_N if num_choices == 1 else self.choice_of_row_N // num_choices


def permute(x_TD: Tensor, maps: RowMaps) -> Tensor:
    """Rows [N, D] in send order: row n is the token of choice n. Differentiable, local."""
    rows_ND: Tensor = _Permute.apply(x_TD, maps)  # type: ignore[no-untyped-call]
    return rows_ND


def unpermute(rows_ND: Tensor, weights_TK: Tensor, maps: RowMaps) -> Tensor:
    """Tokens [T, D]: token t is the sum over k of weights[t, k] times the row of choice (t, k).

    Products and sums are made in the weights' type (fp32) and rounded once. Differentiable, local.
    """
    y_TD: Tensor = _Unpermute.apply(rows_ND, weights_TK, maps)  # type: ignore[no-untyped-call]
    return y_TD


def gather_tokens(x_TD: Tensor, maps: RowMaps) -> Tensor:
    """The token of each row, zeros in padded rows; no gradient."""
    if len(x_TD) == 0:  # padded rows alone
        return x_TD.new_zeros(len(maps.choice_of_row_N), x_TD.shape[1])
    rows_ND = x_TD.index_select(0, maps.token_of_row_N)
    if maps.is_padding_N is not None:
        rows_ND.masked_fill_(maps.is_padding_N.unsqueeze(1), 0)
    return rows_ND


def gather_choice(rows_ND: Tensor, maps: RowMaps, choice: int) -> Tensor:
    """The row of each token's k-th choice, zeros where it was dropped; no gradient."""
    picked_TD = rows_ND.index_select(0, maps.row_of_choice_TK[:, choice])
    if maps.is_dropped_TK is not None:
        picked_TD.masked_fill_(maps.is_dropped_TK[:, choice : choice + 1], 0)
    return picked_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, maps: RowMaps) -> Tensor:
        ctx.maps = maps
        return gather_tokens(x_TD, maps)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor, None]:
        num_tokens, num_choices = ctx.maps.row_of_choice_TK.shape
        if len(d_rows_ND) == 0:
            return d_rows_ND.new_zeros(num_tokens, d_rows_ND.shape[1]), None
        dx_TD = gather_choice(d_rows_ND, ctx.maps, 0)
        if num_choices > 1:
            sum_TD = dx_TD.float() if dx_TD.dtype in (torch.float16, torch.bfloat16) else dx_TD
            for choice in range(1, num_choices):
                sum_TD += gather_choice(d_rows_ND, ctx.maps, choice)
            dx_TD = sum_TD.to(d_rows_ND.dtype)
        return dx_TD, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, maps: RowMaps) -> Tensor:
        ctx.maps = maps
        ctx.save_for_backward(rows_ND, weights_TK)
        num_tokens, num_choices = weights_TK.shape
        if len(rows_ND) == 0:
            return rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
        y_TD = gather_choice(rows_ND, maps, 0).to(weights_TK.dtype).mul_(weights_TK[:, :1])
        for choice in range(1, num_choices):
            picked_TD = gather_choice(rows_ND, maps, choice).to(weights_TK.dtype)
            y_TD.addcmul_(picked_TD, weights_TK[:, choice : choice + 1])
        return y_TD.to(rows_ND.dtype)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        maps: RowMaps = ctx.maps
        if len(rows_ND) == 0 or len(dy_TD) == 0:
            return torch.zeros_like(rows_ND), torch.zeros_like(weights_TK), None
        dy_ND = gather_tokens(dy_TD, maps).to(weights_TK.dtype)
        d_weights_TK = None
        if ctx.needs_input_grad[1]:
            dots_N = (dy_ND * rows_ND).sum(1)
            d_weights_TK = dots_N.take(maps.row_of_choice_TK)
            if maps.is_dropped_TK is not None:
                d_weights_TK.masked_fill_(maps.is_dropped_TK, 0)
        weight_of_row_N1 = weights_TK.flatten().index_select(0, maps.choice_of_row_N).unsqueeze(1)
        return dy_ND.mul_(weight_of_row_N1).to(rows_ND.dtype), d_weights_TK, None
