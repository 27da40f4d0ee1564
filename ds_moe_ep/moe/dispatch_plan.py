"""From routing to rows: who sends which rows to whom, in what order.

1. Sort the choices by expert, which sorts them by (destination rank, local expert), stable in token order.
2. Count them, and exchange the counts, together with what the ranks must agree on
   (`agreement.py`).
3. Bring the counts to the host: the layer's only device sync, since message sizes are host integers. What needs none
   of them (the map of rows both ways, the rows in send order) is launched before. With a capacity every expert has the
   same number of rows, padded ones included, and nothing is synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.kernels.sort import sort_choices
from ds_moe_ep.moe.agreement import NO_CALL, Agreement, Call
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.two_level.copies import NodeCopies

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DispatchPlan:
    """Rows by peer P and local expert L, sent and received; `maps` ties sent rows to choices.

    Sent rows lie by (peer, local expert of the peer); the sum of `send_rows_PL` is the number of rows N.
    """

    maps: RowMaps
    send_rows_PL: Counts
    recv_rows_PL: Counts
    is_drift_seen: bool = False  # by any rank of the group: all of them read the same
    goes_backward: bool = False  # some rank of the group needs a gradient, and so all of them go backward
    copies: NodeCopies | None = None  # of tokens for far nodes, with two levels; the maps are those of their sums

    @property
    def num_received(self) -> int:
        return sum(map(sum, self.recv_rows_PL))


@dataclass(frozen=True)
class PendingPlan:
    """A plan whose counts are on their way to the host; `maps` are there where they need no counts."""

    maps: RowMaps | None
    finish: Callable[[], DispatchPlan]  # waits for the counts, and raises where the ranks disagree


def make_plan(
    routing: Routes,
    num_experts: int,
    transport: Transport,
    row_type: tuple[int, torch.dtype],
    sees_drift: bool = False,
    call: Call = NO_CALL,
    needs_gradient: bool = False,
    in_triton: bool | None = None,
) -> DispatchPlan:
    """The plan of this rank's tokens, at once: `begin_plan`, and its end."""
    return begin_plan(routing, num_experts, transport, row_type, sees_drift, call, needs_gradient, in_triton).finish()


def begin_plan(
    routing: Routes,
    num_experts: int,
    transport: Transport,
    row_type: tuple[int, torch.dtype],
    sees_drift: bool = False,
    call: Call = NO_CALL,
    needs_gradient: bool = False,
    in_triton: bool | None = None,
) -> PendingPlan:
    """The plan of this rank's tokens. Collective over the group; one device sync at its end, none with a capacity.

    `row_type` is the width and dtype of a row; `sees_drift` and `needs_gradient` are told to all ranks. Raises
    EngineError on every rank when ranks disagree on the type, the capacity or the call. On CUDA with a capacity the
    exchange would be a sync, and is left out: no rank knows then what the others need, and each that may goes backward.
    """
    agreement = Agreement(transport, call, num_experts, row_type, sees_drift, needs_gradient)
    if routing.capacity is not None:
        plan = _padded_plan(routing, num_experts, agreement)
        return PendingPlan(plan.maps, lambda: plan)
    in_order = sort_choices(routing.expert_ids_TK, routing.is_used_TK, num_experts, in_triton, routing.count_E)
    counts = agreement.begin_counts(in_order.count_E.view(transport.size, -1))
    maps = RowMaps.of_used(in_order.choice_of_row_N, in_order.row_of_choice_TK, routing.is_used_TK)
    all_travel = maps.is_dropped_TK is None

    def finish() -> DispatchPlan:
        agreed = counts()
        send_PL, recv_PL = _tuples(agreed.send_PL), _tuples(agreed.recv_PL)
        num_rows = sum(map(sum, send_PL))  # choices that take no part stand behind all others
        cut = maps if all_travel else replace(maps, choice_of_row_N=maps.choice_of_row_N[:num_rows])
        return DispatchPlan(cut, send_PL, recv_PL, agreed.is_drift_seen, agreed.goes_backward)

    return PendingPlan(maps if all_travel else None, finish)


def _padded_plan(routing: Routes, num_experts: int, agreement: Agreement) -> DispatchPlan:
    """Every expert gets `capacity` rows from every rank, padded where it was chosen less often."""
    capacity, ids_TK, maps = routing.capacity, routing.expert_ids_TK, padded_maps(routing, num_experts)
    assert capacity is not None
    num_peers = agreement.transport.size
    counts = ((capacity,) * (num_experts // num_peers),) * num_peers
    if ids_TK.device.type != "cpu":
        goes_backward = agreement.needs_gradient or (num_peers > 1 and torch.is_grad_enabled())
        return DispatchPlan(maps, counts, counts, goes_backward=goes_backward)
    agreed = agreement.on_counts(torch.tensor(counts), capacity)
    return DispatchPlan(maps, counts, counts, agreed.is_drift_seen, agreed.goes_backward)


def padded_maps(routing: Routes, num_experts: int) -> RowMaps:
    """The maps of rows by expert and place, `capacity` rows per expert. Local, no device sync."""
    capacity, is_kept_TK, place_TK = routing.capacity, routing.is_kept_TK, routing.place_TK
    assert capacity is not None and is_kept_TK is not None and place_TK is not None
    ids_TK, num_rows = routing.expert_ids_TK, num_experts * capacity
    row_TK = torch.where(is_kept_TK, ids_TK * capacity + place_TK, num_rows)  # the last row takes what is dropped
    choice_of_row_N = ids_TK.new_zeros(num_rows + 1)
    choice_of_row_N[row_TK.flatten()] = torch.arange(ids_TK.numel(), device=ids_TK.device)
    is_padding_N = torch.ones_like(choice_of_row_N, dtype=torch.bool)
    is_padding_N[row_TK.flatten()] = False
    is_dropped_TK = ~is_kept_TK
    return RowMaps(
        choice_of_row_N[:num_rows], row_TK.masked_fill(is_dropped_TK, 0), is_padding_N[:num_rows], is_dropped_TK
    )


def _tuples(counts: Sequence[Sequence[int]]) -> Counts:
    return tuple(map(tuple, counts))
