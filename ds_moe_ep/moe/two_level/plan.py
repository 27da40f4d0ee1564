"""The plan of a pass with two levels: everybody's counts, and from them the copies that each rank sends and relays.

The exchange of counts tells every rank the rows per expert and the copies per node of all others, so that a relay knows
the sizes of what it passes on. With a capacity rows per expert are fixed, and copies are not: they are told there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.kernels.sort import sort_choices
from ds_moe_ep.moe.agreement import Agreement
from ds_moe_ep.moe.dispatch_plan import Counts, DispatchPlan, PendingPlan, padded_maps
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.two_level.copies import Relayed, TwoLevel, is_copied, make_copies


def num_told(num_experts: int, num_nodes: int) -> int:
    """Columns of what a rank tells all others."""
    return num_experts + num_nodes


def begin_two_level(
    routes: Routes, agreement: Agreement, two_level: TwoLevel, in_triton: bool | None = None
) -> PendingPlan:
    """The plan of this rank's tokens, with their copies. Collective over the group; one device sync at its end.

    Raises ConfigError for routes whose weights multiply rows: a token's rows then differ.
    """
    if routes.weighs_rows:
        raise ConfigError(
            "moe_ep.two_level: this layer multiplies tokens by their weights before the experts, so that a token's "
            "rows differ and no copy stands for them; set it to 'off'"
        )
    torus, num_experts = two_level.torus, agreement.num_experts
    own_node, per_node = agreement.transport.rank // torus.node_size, num_experts // torus.num_nodes
    ids_TK, capacity = routes.expert_ids_TK, routes.capacity
    is_used_TK = routes.is_used_TK if capacity is None else routes.is_kept_TK
    node_TK = ids_TK // per_node
    if is_used_TK is not None:
        node_TK = node_TK.masked_fill(~is_used_TK, torus.num_nodes)
    is_copied_MT = is_copied(node_TK, own_node, torus.num_nodes)
    if capacity is None:
        in_order = sort_choices(ids_TK, is_used_TK, num_experts, in_triton)
        maps = RowMaps.of_used(in_order.choice_of_row_N, in_order.row_of_choice_TK, is_used_TK)
        count_E = in_order.count_E
    else:
        maps, count_E = padded_maps(routes, num_experts), to_device([capacity] * num_experts, ids_TK.device)
    told_C = torch.cat([count_E, is_copied_MT.sum(1)])
    told = agreement.begin_telling(told_C, len(told_C), -1 if capacity is None else capacity)

    def finish() -> DispatchPlan:
        agreed = told()
        rows_RE, rank = [row[:num_experts] for row in agreed.recv_PL], agreement.transport.rank
        copies_RM = [row[num_experts:] for row in agreed.recv_PL]
        rows_M = [sum(rows_RE[rank][node * per_node : (node + 1) * per_node]) for node in range(torus.num_nodes)]
        whole = maps
        if capacity is None and is_used_TK is not None:  # choices that take no part stand behind all others
            whole = replace(maps, choice_of_row_N=maps.choice_of_row_N[: sum(rows_M)])
        relayed = _relayed(rows_RE, copies_RM, two_level, rank)
        counts = copies_RM[rank], rows_M
        copies = make_copies(whole, node_TK, is_copied_MT, counts, relayed, own_node, two_level.with_sums)
        send_PL, recv_PL = _of_rank(rows_RE, rank)
        if copies.sums is not None:
            whole = copies.sums.maps
        return DispatchPlan(whole, send_PL, recv_PL, agreed.is_drift_seen, agreed.goes_backward, copies)

    return PendingPlan(None, finish)


def _of_rank(rows_RE: Sequence[Sequence[int]], rank: int) -> tuple[Counts, Counts]:
    """Rows that a rank sends to each peer's experts, and those that its own get from each."""
    num_local = len(rows_RE[0]) // len(rows_RE)
    own = slice(rank * num_local, (rank + 1) * num_local)
    firsts = range(0, len(rows_RE[0]), num_local)
    sent = tuple(tuple(rows_RE[rank][first : first + num_local]) for first in firsts)
    return sent, tuple(tuple(rows_E[own]) for rows_E in rows_RE)


def _relayed(
    rows_RE: Sequence[Sequence[int]], copies_RM: Sequence[Sequence[int]], two_level: TwoLevel, rank: int
) -> list[Relayed]:
    """Everything that comes to this rank to be spread on its node, by the rank that it comes from."""
    torus = two_level.torus
    own_node, place = divmod(rank, torus.node_size)
    num_local = len(rows_RE[0]) // len(rows_RE)
    firsts = range(own_node * torus.node_size * num_local, (own_node + 1) * torus.node_size * num_local, num_local)
    sources = [node * torus.node_size + place for node in range(torus.num_nodes) if node != own_node]
    return [
        Relayed(
            source,
            copies_RM[source][own_node],
            tuple(sum(rows_RE[source][first : first + num_local]) for first in firsts),
        )
        for source in sources
    ]
