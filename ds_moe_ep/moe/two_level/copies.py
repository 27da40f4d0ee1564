"""Copies of tokens for far nodes: which there are, and which rows of its node each of them fills.

A token with experts on a far node has one copy for it, whatever the number of its experts there. The copy goes to the
relay, the rank of that node that has the sender's place there, and says with it which rows of the node it fills: for
each of the token's choices the row among those that the sender has for the node, in send order, or NOWHERE for a choice
of another node. So a relay makes of a sender's copies the very messages that the sender would have sent to each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.kernels.permute import RowMaps

NOWHERE = -1  # of a choice that is of another node, or has no row

Span = tuple[int, int]


@dataclass(frozen=True)
class TwoLevel:
    """The nodes of a group, and whether a token's results are summed there before they come back."""

    torus: Torus
    with_sums: bool


@dataclass(frozen=True)
class Relayed:
    """Copies that a far rank sends through this one, and the rows by place on this node that they fill."""

    source: int
    num_copies: int
    rows_S: tuple[int, ...]


@dataclass(frozen=True)
class SumMaps:
    """The maps of a pass in which near rows and, behind them, copies take the place of rows.

    A far node is one choice then, the first of the token there. `choice_UK`: each copy's choices, T * K for NOWHERE.
    """

    maps: RowMaps
    choice_UK: Tensor
    num_near: int

    def result_weights(self, weights_TK: Tensor) -> Tensor:
        """Weights of what comes back: those of near rows, and 1 for the sum of each far node."""
        return torch.where(self.maps.row_of_choice_TK < self.num_near, weights_TK, torch.ones_like(weights_TK))

    def weights_of_copies(self, weights_TK: Tensor) -> Tensor:
        """The weights [U, K] of each copy's choices on its node, 0 elsewhere. Differentiable."""
        weights_UK: Tensor = _WeightsOfCopies.apply(weights_TK, self.choice_UK)  # type: ignore[no-untyped-call]
        return weights_UK


@dataclass(frozen=True)
class NodeCopies:
    """Copies that this rank sends, U of them by node and then by token, and those that it passes on.

    `near_rows` is the span of rows, in send order, for the ranks of the own node; `sums` is None where results come
    back row by row.
    """

    copies_M: tuple[int, ...]
    relayed: tuple[Relayed, ...]
    near_rows: Span
    row_of_copy_U: Tensor  # the first row of each copy, in send order
    routes_UK: Tensor
    sums: SumMaps | None
    has_padding: bool

    @property
    def num_near(self) -> int:
        return self.near_rows[1] - self.near_rows[0]

    @property
    def num_choices(self) -> int:
        return self.routes_UK.shape[1]

    def span_of(self, node: int) -> Span:
        """The copies for a node."""
        start = sum(self.copies_M[:node])
        return start, start + self.copies_M[node]


class _WeightsOfCopies(torch.autograd.Function):
    """A gather whose gradient is one too: each choice is in one copy at most."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, choice_UK: Tensor) -> Tensor:
        ctx.choice_UK, ctx.shape = choice_UK, weights_TK.shape
        padded_N = torch.cat([weights_TK.flatten(), weights_TK.new_zeros(1)])
        return padded_N[choice_UK]

    @staticmethod
    def backward(ctx: Any, d_weights_UK: Tensor) -> tuple[Tensor, None]:
        d_padded_N = d_weights_UK.new_zeros(ctx.shape.numel() + 1)
        d_padded_N[ctx.choice_UK.flatten()] = d_weights_UK.flatten()
        return d_padded_N[:-1].view(ctx.shape), None


def is_copied(node_TK: Tensor, own_node: int, num_nodes: int) -> Tensor:
    """[M, T]: True where the token has a choice on the node, which is not the own one. `node_TK` M for no choice."""
    hits_TM = torch.zeros(len(node_TK), num_nodes + 1, dtype=torch.bool, device=node_TK.device)
    hits_TM.scatter_(1, node_TK, True)
    hits_TM[:, own_node] = False
    return hits_TM[:, :num_nodes].t().contiguous()


def make_copies(
    maps: RowMaps,
    node_TK: Tensor,
    is_copied_MT: Tensor,
    counts: tuple[Sequence[int], Sequence[int]],
    relayed: Sequence[Relayed],
    own_node: int,
    with_sums: bool,
) -> NodeCopies:
    """The copies of a plan, whose maps and counts (copies by node, rows by node) are known. Local, no device sync."""
    copies_M, rows_M = counts
    num_tokens, num_choices = node_TK.shape
    device, num_copies = node_TK.device, sum(copies_M)
    index_U = torch.empty(num_copies + 1, dtype=torch.int64, device=device)
    place_MT = (is_copied_MT.flatten().cumsum(0) - 1).masked_fill(~is_copied_MT.flatten(), num_copies)
    index_U[place_MT] = torch.arange(is_copied_MT.numel(), device=device)
    index_U = index_U[:-1]
    token_U, node_U = index_U % max(num_tokens, 1), index_U // max(num_tokens, 1)
    is_there_UK = node_TK[token_U] == node_U.unsqueeze(1)
    starts_M = [sum(rows_M[:node]) for node in range(len(rows_M))]
    row_UK = maps.row_of_choice_TK[token_U]
    routes_UK = (row_UK - to_device(starts_M, device)[node_U].unsqueeze(1)).masked_fill(~is_there_UK, NOWHERE)
    first_U1 = (is_there_UK & (is_there_UK.cumsum(1) == 1)).to(torch.uint8).argmax(1, keepdim=True)
    near_rows = starts_M[own_node], starts_M[own_node] + rows_M[own_node]
    sums = None
    if with_sums:
        choice_UK = token_U.unsqueeze(1) * num_choices + torch.arange(num_choices, device=device)
        first_choice_U = choice_UK.gather(1, first_U1).squeeze(1)
        summed = _summed_maps(maps, node_TK == own_node, first_choice_U, near_rows)
        choice_UK = choice_UK.masked_fill(~is_there_UK, num_tokens * num_choices)
        sums = SumMaps(summed, choice_UK, near_rows[1] - near_rows[0])
    return NodeCopies(
        copies_M=tuple(copies_M),
        relayed=tuple(relayed),
        near_rows=near_rows,
        row_of_copy_U=row_UK.gather(1, first_U1).squeeze(1),
        routes_UK=routes_UK.to(torch.int32),
        sums=sums,
        has_padding=maps.is_padding_N is not None,
    )


def _summed_maps(maps: RowMaps, is_near_TK: Tensor, first_choice_U: Tensor, near_rows: Span) -> RowMaps:
    """The maps of near rows and, behind them, one row per copy."""
    start, stop = near_rows
    row_TK = torch.where(is_near_TK, maps.row_of_choice_TK - start, NOWHERE)
    places_U = torch.arange(stop - start, stop - start + len(first_choice_U), device=row_TK.device)
    row_TK = row_TK.flatten().scatter(0, first_choice_U, places_U).view_as(row_TK)
    is_dropped_TK = row_TK == NOWHERE
    is_padding_N = maps.is_padding_N
    if is_padding_N is not None:
        is_padding_N = torch.cat([is_padding_N[start:stop], is_padding_N.new_zeros(len(first_choice_U))])
    choice_of_row_N = torch.cat([maps.choice_of_row_N[start:stop], first_choice_U])
    return RowMaps(choice_of_row_N, row_TK.masked_fill(is_dropped_TK, 0), is_padding_N, is_dropped_TK)
