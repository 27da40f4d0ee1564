"""Who sends what to whom in each transfer of a schedule, with one level and with two.

With two levels a far piece's dispatch takes one copy of each token to the rank of its node that has the sender's place
there (its relay), and the spread takes rows from relays to the ranks of experts; near rows of the piece go with the
spread. A gather and its combine are the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ds_moe_ep.schedule.build import Offset, Op, OpKind, Piece, Schedule


class Ends(NamedTuple):
    """A message of a rank: whom it goes to, or comes from, and what it carries, equal at both ends."""

    peer: int
    rows: str


def sends(op: Op, rank: int, schedule: Schedule) -> Iterator[Ends]:
    """The messages that a rank sends in a transfer, its own rows among them, in the order of the piece's offsets."""
    return _ends(op, rank, schedule, is_sender=True)


def receives(op: Op, rank: int, schedule: Schedule) -> Iterator[Ends]:
    """The messages that a rank receives in a transfer."""
    return _ends(op, rank, schedule, is_sender=False)


def far_nodes(piece: Piece) -> list[int]:
    """How many nodes further the piece's far rows go, each once."""
    return list(dict.fromkeys(node for node, _ in piece.offsets if node))


def _ends(op: Op, rank: int, schedule: Schedule, *, is_sender: bool) -> Iterator[Ends]:
    torus, piece = schedule.torus, schedule.pieces[op.piece]
    there = torus.target if _is_outward(op) == is_sender else torus.source
    legs = _has_legs(op, schedule)
    if legs and op.kind in (OpKind.DISPATCH, OpKind.COMBINE):
        for node in far_nodes(piece):
            yield Ends(there(rank, (node, 0)), f"copies for node +{node}")
        return
    for offset in piece.offsets:
        rows = f"cut {piece.cut} of {piece.num_cuts} at offset {offset}"
        yield Ends(there(rank, (0, offset[1]) if legs else offset), rows)


def _is_outward(op: Op) -> bool:
    """True on the way to the experts."""
    return op.kind in (OpKind.DISPATCH, OpKind.SPREAD)


def _has_legs(op: Op, schedule: Schedule) -> bool:
    """True where the transfer's piece goes over two levels in the transfer's direction."""
    return op.piece in (schedule.spreads if _is_outward(op) else schedule.gathers)


def copies_share(num_experts: int, top_k: int, num_nodes: int) -> float:
    """Copies of a token for far nodes over its rows there, where routing is uniform over distinct experts.

    A node has E / nodes of the E experts; it is missed by k of them with C(E - E / nodes, k) / C(E, k).
    """
    per_node = num_experts // num_nodes
    if num_nodes == 1 or not per_node:
        return 1.0
    is_hit = 1 - math.comb(num_experts - per_node, top_k) / math.comb(num_experts, top_k)
    return is_hit * num_nodes / top_k


class Legs(NamedTuple):
    """A piece's share of a rank's traffic in units of offsets: rows to other nodes, and rows inside of a node."""

    far: float
    near: float


def legs_of(op: Op, schedule: Schedule, share: float) -> Legs:
    """The offsets' worth of rows that a transfer moves from this rank; `share`: copies over far rows."""
    piece = schedule.pieces[op.piece]
    far = sum(offset[0] != 0 for offset in piece.offsets) / piece.num_cuts
    near = _crossing_near(piece.offsets) / piece.num_cuts
    if not _has_legs(op, schedule):
        return Legs(far, near)
    if op.kind in (OpKind.DISPATCH, OpKind.COMBINE):
        return Legs(far * share, 0.0)
    return Legs(0.0, sum(place != 0 for _, place in piece.offsets) / piece.num_cuts)


def _crossing_near(offsets: tuple[Offset, ...]) -> int:
    return sum(node == 0 and place != 0 for node, place in offsets)
