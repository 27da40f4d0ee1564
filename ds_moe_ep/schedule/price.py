"""Price of a schedule, from measured costs: a few events per pass, no clock.

1. A piece's compute takes its share of the rows' time; weight gradients likewise.
2. A lane is first in, first out, with one transfer on the wire (the host keeps a second one behind it). Near and far
   rows leave side by side, and are there a latency later, which holds up nobody else.
3. Dispatch and combine leave by the same link: while far rows of both are on their way, each goes at half the speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.build import MAX_WEIGHT_BLOCKS, Op, OpKind, Piece, Schedule, backward_schedule, forward_schedule
from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import START, Load, Program, add_pass
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.schedule.two_level import copies_share, legs_of

LINK = ((0, 1.0),)  # the one resource here: the way from this rank to other nodes, whose unit is a microsecond alone
MANY_NODES = 8  # beyond them groups of several nodes are worth a look: of two,
FEW_GROUPS = (8, 4)  # and as many as make so many groups, since each costs a latency and a small product


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of one rank's whole share, in microseconds, as the mean rank has them.

    `near_us` and `far_us`: an exchange of the rows that stay on the node and of those that leave it, alone on the wire.
    `latency_us`: a transfer of next to nothing. The rest: all rows through the expert, forward, for input gradients
    and for weight gradients.
    """

    near_us: float
    far_us: float
    latency_us: float
    forward_us: float
    input_grad_us: float
    weight_grad_us: float

    def __add__(self, other: Costs) -> Costs:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Costs(**dict(zip(dataclasses.asdict(self), (a + b for a, b in pairs), strict=True)))


def candidates(torus: Torus, two_level: str = "off") -> list[dict[str, Any]]:
    """Knobs of the schedules worth a look on a torus, the serial one first.

    With `two_level` "auto" those that can send copies are there with and without; with "copies" and "sums" there are no
    others.
    """
    found = _one_level(torus)
    if two_level == "off" or torus.num_nodes == 1:
        return found
    whole = [knobs for knobs in found if _keeps_nodes_whole(knobs, torus)]
    if two_level != "auto":
        return whole
    return found + [{**knobs, "two_level": "copies"} for knobs in whole if knobs["schedule"] != "serial"]


def _keeps_nodes_whole(knobs: Mapping[str, Any], torus: Torus) -> bool:
    is_cut = knobs.get("row_cuts", 1) > 1 or knobs.get("peer_group_size", 0) % torus.node_size
    return knobs["schedule"] == "serial" or (knobs["schedule"] == "peers" and not is_cut)


def _one_level(torus: Torus) -> list[dict[str, Any]]:
    if torus.size == 1:
        return [{"schedule": "serial"}]
    peers: list[dict[str, Any]] = [{"schedule": "peers", "row_cuts": cuts} for cuts in (1, 2, 3, 4)]
    whole = torus.size if torus.num_nodes == 1 else torus.node_size  # ranks of a group by default
    if whole > 3:
        peers.append({"schedule": "peers", "peer_group_size": whole // 2, "row_cuts": 1})
    if torus.num_nodes > MANY_NODES:
        nodes = {2, *(-(-(torus.num_nodes - 1) // groups) for groups in FEW_GROUPS)} - {1}
        peers += [{"schedule": "peers", "peer_group_size": num * whole, "row_cuts": 1} for num in sorted(nodes)]
    if torus.num_nodes > 1:  # behind the others: at an equal price one product for each gradient is better
        peers += [{**knobs, "weight_blocks": MAX_WEIGHT_BLOCKS} for knobs in peers]
    chunks: list[dict[str, Any]] = [{"schedule": "chunks", "chunks": chunks} for chunks in (2, 4, 8)]
    return [{"schedule": "serial"}, *peers, *chunks]


def price_us(config: MoEConfig, torus: Torus, costs: Costs) -> float:
    """Microseconds of a forward and a backward pass under the schedule that `config` names, for even routing."""
    forward, backward = forward_schedule(config, torus), backward_schedule(config, torus)
    share = copies_share(config.num_experts, config.top_k, torus.num_nodes)
    forward_us = price_pass(forward, costs, costs.forward_us, share)
    return forward_us + price_pass(backward, costs, costs.input_grad_us, share)


def price_pass(schedule: Schedule, costs: Costs, compute_us: float, copies: float = 1.0) -> float:
    """Microseconds until the last op of one pass is done; `compute_us` is what all pieces' rows take together.

    `copies`: copies of tokens over their far rows, where a schedule sends copies.
    """
    near = [_share(piece.offsets, schedule.torus, far=False) / piece.num_cuts for piece in schedule.pieces]
    far = [_share(piece.offsets, schedule.torus, far=True) / piece.num_cuts for piece in schedule.pieces]
    per_near, per_far = 1 / max(schedule.torus.node_size - 1, 1), 1 / max(len(_far(schedule.torus)), 1)
    rows = [_rows(piece.offsets, schedule.torus) / piece.num_cuts for piece in schedule.pieces]
    blocks = [_rows(block, schedule.torus) for block in schedule.blocks]

    def load(op: Op) -> Load:
        if op.kind is OpKind.COMPUTE:
            return Load((Phase(rows[op.piece] * compute_us),))
        if op.kind is OpKind.WEIGHTS:
            return Load((Phase(blocks[op.piece] * costs.weight_grad_us),))
        shares = near[op.piece], far[op.piece]
        if op.piece in schedule.spreads | schedule.gathers:
            legs = legs_of(op, schedule, copies)
            shares = legs.near * per_near, legs.far * per_far
        rows_us = shares[0] * costs.near_us, shares[1] * costs.far_us
        return Load(beside=((Phase(rows_us[0]),), (Phase(rows_us[1], uses=LINK),)), delay_us=costs.latency_us)

    program = Program()
    add_pass(program, schedule, [load], START, Tags())
    return program.run([1.0]).makespan_us


def _rows(offsets: Sequence[tuple[int, int]], torus: Torus) -> float:
    """The share of all rows that goes to these offsets."""
    return len(offsets) / torus.size


def _share(offsets: Sequence[tuple[int, int]], torus: Torus, *, far: bool) -> float:
    """The share of the near rows that cross a wire, or of the far rows, that goes to these offsets."""
    near = torus.node_size if torus.num_nodes > 1 else 1  # offsets at which rows stay near, the rank's own with them
    of_kind = torus.size - near if far else near - 1
    return sum(offset != (0, 0) and is_far(offset, torus) == far for offset in offsets) / max(of_kind, 1)


def is_far(offset: tuple[int, int], torus: Torus) -> bool:
    """True where rows at the offset leave the node; on one node all but the rank's own count as far."""
    return offset[0] != 0 if torus.num_nodes > 1 else offset != (0, 0)


def probe_pieces(torus: Torus, num_rows: int) -> tuple[Piece, Piece, Piece]:
    """The pieces that `Costs` is measured on: the near rows, the far rows, and about one far row per peer."""
    near = tuple(o for o in torus.offsets() if not is_far(o, torus))
    far = _far(torus)
    return Piece(near), Piece(far), Piece(far, 0, max(num_rows // torus.size, 1))


def _far(torus: Torus) -> tuple[tuple[int, int], ...]:
    return tuple(o for o in torus.offsets() if is_far(o, torus))


def ranked(config: MoEConfig, torus: Torus, costs: Costs) -> list[tuple[float, Mapping[str, Any]]]:
    """(microseconds, knobs) of every candidate, the fastest first."""
    found = candidates(torus, config.two_level)
    priced = [(price_us(dataclasses.replace(config, **knobs), torus, costs), knobs) for knobs in found]
    return sorted(priced, key=lambda item: item[0])
