"""Rows leave in send order and come back weighted: two gathers and their gradients.

Both directions are gathers, also in the backward pass, since the index maps are given both ways; nothing is
scattered, so the results do not depend on the order in which a device would add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.kernels.choose import runs_triton
from ds_moe_ep.kernels.eager import not_compiled

WHOLE = slice(None)
BLOCK_ELEMENTS = 2**17  # of a thread, on the CPU: what lies between two passes stays in its cache


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

    @classmethod
    def of_used(cls, choice_of_row_N: Tensor, row_of_choice_TK: Tensor, is_used_TK: Tensor | None) -> RowMaps:
        """The maps where some choices have no row; `is_used_TK` is None where all have one."""
        if is_used_TK is None:
            return cls(choice_of_row_N, row_of_choice_TK)
        is_dropped_TK = ~is_used_TK
        return cls(choice_of_row_N, row_of_choice_TK.masked_fill(is_dropped_TK, 0), None, is_dropped_TK)

    @property
    def token_of_row_N(self) -> Tensor:
        num_choices = self.row_of_choice_TK.shape[1]
        return self.choice_of_row_N if num_choices == 1 else self.choice_of_row_N // num_choices


def permute(
    x_TD: Tensor,
    maps: RowMaps,
    use_triton: bool | None = None,
    weights_TK: Tensor | None = None,
    made: Callable[[], Tensor | None] | None = None,
) -> Tensor:
    """Rows [N, D] in send order: row n is the token of choice n, times its weight where weights are given.

    Products are made in the weights' type (fp32) and rounded once. On the way back `made`, without weights, gives the
    tokens' gradient where the caller has made it. Differentiable, local.
    """
    rows_ND: Tensor
    if weights_TK is None:
        rows_ND = _Permute.apply(x_TD, maps, use_triton, made)  # type: ignore[no-untyped-call]
    else:
        rows_ND = _WeightedPermute.apply(x_TD, weights_TK, maps, use_triton)  # type: ignore[no-untyped-call]
    return rows_ND


def unpermute(
    rows_ND: Tensor,
    weights_TK: Tensor,
    maps: RowMaps,
    added: Sequence[Tensor] = (),
    use_triton: bool | None = None,
    made: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens [T, D]: token t is the sum over k of weights[t, k] times the row of choice (t, k).

    The tensors [T, D] in `added` (at most two) are added to it. Products and sums are made in the weights' type (fp32)
    and rounded once. `made` gives all of it, of the rows, where the caller has made most of it. Differentiable, local.
    """
    y_TD: Tensor = _Unpermute.apply(rows_ND, weights_TK, maps, use_triton, made, *added)  # type: ignore[no-untyped-call]
    return y_TD


def collect(rows_ND: Tensor, maps: RowMaps, use_triton: bool | None = None) -> Tensor:
    """The sum [T, D] of each token's rows, at least in fp32 and rounded once; no gradient."""
    num_tokens = maps.row_of_choice_TK.shape[0]
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    if not runs_triton(use_triton, rows_ND):
        return _by_blocks(num_tokens, rows_ND, partial(_sum_of_choices, rows_ND, maps))
    from ds_moe_ep.kernels.compiled import permute as kernels

    x_TD = rows_ND.new_empty(num_tokens, rows_ND.shape[1])
    kernels.collect(rows_ND.contiguous(), None, *_both(maps), (), x_TD)
    return x_TD


def gather_tokens(x_TD: Tensor, maps: RowMaps, rows: slice = WHOLE, out_ND: Tensor | None = None) -> Tensor:
    """The token of each row (of these rows), zeros in padded rows, in `out_ND` where it is given; no gradient."""
    if x_TD.shape[0] == 0:  # padded rows alone
        zeros_ND = x_TD.new_zeros(len(_part(maps.choice_of_row_N, rows)), x_TD.shape[1])
        return zeros_ND if out_ND is None else out_ND.copy_(zeros_ND)
    rows_ND = _index_select(x_TD, _part(maps.token_of_row_N, rows), out_ND)
    if maps.is_padding_N is not None:
        rows_ND.masked_fill_(_part(maps.is_padding_N, rows).unsqueeze(1), 0)
    return rows_ND


def gather_choice(
    rows_ND: Tensor, maps: RowMaps, choice: int, tokens: slice = WHOLE, out_TD: Tensor | None = None
) -> Tensor:
    """The row of each (of these) token's k-th choice, zeros where it was dropped, in `out_TD` where it is given.

    No gradient.
    """
    picked_TD = _index_select(rows_ND, _part(maps.row_of_choice_TK, tokens).select(1, choice), out_TD)
    if maps.is_dropped_TK is not None:
        picked_TD.masked_fill_(_part(maps.is_dropped_TK, tokens)[:, choice : choice + 1], 0)
    return picked_TD


def _part(numbers: Tensor, rows: slice) -> Tensor:
    """These rows of a tensor; all of them are the tensor itself, without an operation."""
    return numbers if rows is WHOLE else numbers[rows]


def _index_select(from_RD: Tensor, index_N: Tensor, out_ND: Tensor | None) -> Tensor:
    """The rows with these indices, in `out_ND` where it is given and has their type."""
    if out_ND is None or out_ND.dtype != from_RD.dtype:
        return from_RD.index_select(0, index_N)
    return torch.index_select(from_RD, 0, index_N, out=out_ND)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, maps: RowMaps, use_triton: bool | None, made: Callable[[], Tensor | None] | None
    ) -> Tensor:
        ctx.maps, ctx.use_triton, ctx.made = maps, use_triton, made
        if not runs_triton(use_triton, x_TD):
            return gather_tokens(x_TD, maps)
        from ds_moe_ep.kernels.compiled import permute as kernels

        rows_ND = x_TD.new_empty(maps.choice_of_row_N.shape[0], x_TD.shape[1])
        kernels.spread(x_TD.contiguous(), *_both(maps), rows_ND)
        if maps.is_padding_N is not None:
            kernels.clear_padding(rows_ND, maps.is_padding_N)
        return rows_ND

    @staticmethod
    @not_compiled
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor, None, None, None]:
        dx_TD = None if ctx.made is None else ctx.made()
        return collect(d_rows_ND, ctx.maps, ctx.use_triton) if dx_TD is None else dx_TD, None, None, None


class _WeightedPermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, maps: RowMaps, use_triton: bool | None) -> Tensor:
        ctx.maps, ctx.use_triton = maps, use_triton
        ctx.save_for_backward(x_TD, weights_TK)
        if runs_triton(use_triton, x_TD, weights_TK):
            from ds_moe_ep.kernels.compiled import permute as kernels

            rows_ND = x_TD.new_empty(maps.choice_of_row_N.shape[0], x_TD.shape[1])
            x_TD, weights_TK = x_TD.contiguous(), weights_TK.contiguous()
            kernels.weighted_spread(x_TD, rows_ND, weights_TK, *_both(maps), rows_ND, None)
            if maps.is_padding_N is not None:
                kernels.clear_padding(rows_ND, maps.is_padding_N)
            return rows_ND

        def by_rows(rows: slice, _: Tensor | None) -> Tensor:
            return gather_tokens(x_TD, maps, rows) * _weight_of_rows(weights_TK, maps, rows)

        return _by_blocks(maps.choice_of_row_N.shape[0], x_TD, by_rows)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK = ctx.saved_tensors
        maps: RowMaps = ctx.maps
        if d_rows_ND.shape[0] == 0 or x_TD.shape[0] == 0:
            return torch.zeros_like(x_TD), torch.zeros_like(weights_TK), None, None
        wants_weights = ctx.needs_input_grad[1]
        if runs_triton(ctx.use_triton, d_rows_ND, x_TD, weights_TK):
            from ds_moe_ep.kernels.compiled import permute as kernels

            dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
            d_weights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
            given = d_rows_ND.contiguous(), x_TD.contiguous(), weights_TK.contiguous()
            wanted = d_weights_TK if wants_weights else None
            kernels.weighted_collect(*given, *_both(maps), dx_TD, wanted)
            return dx_TD, wanted, None, None
        by_tokens = partial(_weighted_sum, d_rows_ND, weights_TK, maps, ())
        dx_TD = _by_blocks(x_TD.shape[0], d_rows_ND, by_tokens)
        if not wants_weights:
            return dx_TD, None, None, None

        def dots(rows: slice, _: Tensor | None) -> Tensor:
            products_ND = gather_tokens(x_TD, maps, rows).to(weights_TK.dtype) * _part(d_rows_ND, rows)
            return products_ND.sum(1, keepdim=True)

        dots_N1 = _by_blocks(d_rows_ND.shape[0], weights_TK.new_empty(0, x_TD.shape[1]), dots, width=1)
        return dx_TD, _at_choices(dots_N1.squeeze(1), maps), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weights_TK: Tensor,
        maps: RowMaps,
        use_triton: bool | None,
        made: Callable[[Tensor], Tensor] | None,
        *added: Tensor,
    ) -> Tensor:
        ctx.maps, ctx.use_triton, ctx.num_added = maps, use_triton, len(added)
        ctx.save_for_backward(rows_ND, weights_TK)
        if made is not None:
            return made(rows_ND)
        if rows_ND.shape[0] == 0 or not runs_triton(use_triton, rows_ND, weights_TK, *added):
            return _by_blocks(weights_TK.shape[0], rows_ND, partial(_weighted_sum, rows_ND, weights_TK, maps, added))
        from ds_moe_ep.kernels.compiled import permute as kernels

        y_TD = rows_ND.new_empty(weights_TK.shape[0], rows_ND.shape[1])
        whole = [each.contiguous() for each in added]
        kernels.collect(rows_ND.contiguous(), weights_TK.contiguous(), *_both(maps), whole, y_TD)
        return y_TD

    @staticmethod
    @not_compiled
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_TK = ctx.saved_tensors
        maps: RowMaps = ctx.maps
        d_added = [dy_TD] * ctx.num_added
        if rows_ND.shape[0] == 0 or dy_TD.shape[0] == 0:
            return torch.zeros_like(rows_ND), torch.zeros_like(weights_TK), None, None, None, *d_added
        if runs_triton(ctx.use_triton, rows_ND, weights_TK, dy_TD):
            from ds_moe_ep.kernels.compiled import permute as kernels

            d_rows_ND = torch.empty_like(rows_ND, memory_format=torch.contiguous_format)
            d_weights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
            wanted = d_weights_TK if ctx.needs_input_grad[1] else None
            given = dy_TD.contiguous(), rows_ND.contiguous(), weights_TK.contiguous()
            kernels.weighted_spread(*given, *_both(maps), d_rows_ND, wanted)
            if maps.is_padding_N is not None:
                kernels.clear_padding(d_rows_ND, maps.is_padding_N)
            return d_rows_ND, wanted, None, None, None, *d_added
        dots_N = weights_TK.new_empty(rows_ND.shape[0]) if ctx.needs_input_grad[1] else None

        def by_rows(rows: slice, out_ND: Tensor | None) -> Tensor:
            dy_ND = gather_tokens(dy_TD, maps, rows, out_ND)
            if dots_N is not None:
                torch.sum(dy_ND.to(weights_TK.dtype) * _part(rows_ND, rows), 1, out=_part(dots_N, rows))
            return torch.mul(dy_ND, _weight_of_rows(weights_TK, maps, rows), out=dy_ND)

        d_rows_ND = _by_blocks(rows_ND.shape[0], rows_ND, by_rows)
        return d_rows_ND, None if dots_N is None else _at_choices(dots_N, maps), None, None, None, *d_added


def _weighted_sum(
    rows_ND: Tensor, weights_TK: Tensor, maps: RowMaps, added: Sequence[Tensor], tokens: slice, out_TD: Tensor | None
) -> Tensor:
    """The weighted sum of the tokens' rows, and of what is added, in the weights' type."""
    weights_TK = _part(weights_TK, tokens)
    if rows_ND.shape[0] == 0:
        y_TD = weights_TK.new_zeros(weights_TK.shape[0], rows_ND.shape[1])
    else:
        num_choices = weights_TK.shape[1]
        if num_choices == 1 and not added:  # one rounding, and no sum to keep in a wider type
            picked_TD = gather_choice(rows_ND, maps, 0, tokens, out_TD)
            return torch.mul(picked_TD, weights_TK, out=picked_TD)
        picked_TD = gather_choice(rows_ND, maps, 0, tokens)
        y_TD = torch.mul(picked_TD, weights_TK[:, :1]).to(weights_TK.dtype)
        for choice in range(1, num_choices):
            y_TD.addcmul_(gather_choice(rows_ND, maps, choice, tokens), weights_TK[:, choice : choice + 1])
    for each in added:
        y_TD += _part(each, tokens)
    return y_TD


def _sum_of_choices(rows_ND: Tensor, maps: RowMaps, tokens: slice, out_TD: Tensor | None) -> Tensor:
    """The sum of the tokens' rows, at least in fp32 where there is more than one."""
    sum_TD = gather_choice(rows_ND, maps, 0, tokens, out_TD)
    if (num_choices := maps.row_of_choice_TK.shape[1]) > 1:
        sum_TD = sum_TD.to(torch.promote_types(sum_TD.dtype, torch.float32))
        for choice in range(1, num_choices):
            sum_TD += gather_choice(rows_ND, maps, choice, tokens)
    return sum_TD


def _weight_of_rows(weights_TK: Tensor, maps: RowMaps, rows: slice) -> Tensor:
    """The weight [n, 1] of each (of these) row's choice."""
    return weights_TK.flatten().index_select(0, _part(maps.choice_of_row_N, rows)).unsqueeze(1)


def _at_choices(values_N: Tensor, maps: RowMaps) -> Tensor:
    """The values of the rows of each choice, zeros where it was dropped."""
    values_TK = values_N.take(maps.row_of_choice_TK)
    if maps.is_dropped_TK is not None:
        values_TK.masked_fill_(maps.is_dropped_TK, 0)
    return values_TK


def _both(maps: RowMaps) -> tuple[Tensor, Tensor | None]:
    """Maps as the kernels read them: the row of each choice, and which of them has none."""
    dropped_TK = maps.is_dropped_TK
    return maps.row_of_choice_TK.contiguous(), None if dropped_TK is None else dropped_TK.contiguous()


def _by_blocks(
    num_rows: int, like_ND: Tensor, compute: Callable[[slice, Tensor | None], Tensor], width: int | None = None
) -> Tensor:
    """Rows of the width (unless another is given) and type of `like_ND` that `compute` gives for a slice of them.

    It may write them to their place, which it is given.

    By blocks on the CPU; all at once on other devices, where a launch costs more than a pass over memory.
    """
    per_block = num_rows
    if like_ND.is_cpu:
        per_block = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // max(like_ND.shape[1], 1))
    if num_rows <= per_block:
        rows_ND = compute(WHOLE, None)
        return rows_ND if rows_ND.dtype == like_ND.dtype else rows_ND.to(like_ND.dtype)
    rows_ND = like_ND.new_empty(num_rows, like_ND.shape[1] if width is None else width)
    for start in range(0, num_rows, per_block):
        place_ND = rows_ND[start : start + per_block]
        block_ND = compute(slice(start, start + place_ND.shape[0]), place_ND)
        if block_ND is not place_ND:
            place_ND.copy_(block_ND)
    return rows_ND
