"""Where copies, and the rows that relays make of them, lie in each piece of a pass.

A relay's rows lie by source, and for each source by the ranks of the node, in the sender's order: its messages are the
sender's own. So the experts' side of a piece, and all that is computed there, is the same with one level and with two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.two_level.copies import NodeCopies, Span
from ds_moe_ep.schedule.build import Piece

Spans = tuple[tuple[int, Span], ...]  # by peer


@dataclass(frozen=True)
class Brought:
    """Copies from one rank that this one relays: their span, that of their rows, and those of each rank of the node."""

    source: int
    copies: Span
    rows: Span
    to: Spans


@dataclass(frozen=True)
class PieceLegs:
    """A piece's messages with two levels.

    `leaving`: copies per relay. `brought`: what this rank relays. `near`: its own rows for the ranks of its node, where
    the piece has them. `arriving`: where rows come to, by the rank that they come from, each from its own relay.
    """

    leaving: Spans
    brought: tuple[Brought, ...]
    near: Spans
    arriving: Spans


def legs_of_piece(piece: Piece, torus: Torus, rank: int, copies: NodeCopies, sent: Spans, received: Spans) -> PieceLegs:
    """The messages of a piece that has its far nodes whole; `sent` and `received` are those of one level."""
    targets = list(dict.fromkeys(torus.target(rank, (node, 0)) for node, _ in piece.offsets if node))
    sources = {torus.source(rank, (node, 0)) for node, _ in piece.offsets if node}
    leaving = tuple((relay, copies.span_of(relay // torus.node_size)) for relay in targets)
    first = rank - rank % torus.node_size
    near = tuple((peer, span) for peer, span in sorted(sent) if first <= peer < first + torus.node_size)
    arriving = tuple((torus.relay(source, rank), span) for source, span in sorted(received))
    return PieceLegs(leaving, _brought(copies, sources, first), near, arriving)


def _brought(copies: NodeCopies, sources: set[int], first_rank: int) -> tuple[Brought, ...]:
    """The copies of these sources that this rank relays, in the order of the sources."""
    found, copy_start, row_start = [], 0, 0
    for each in copies.relayed:
        copy_stop, row_stop = copy_start + each.num_copies, row_start + sum(each.rows_S)
        if each.source in sources:
            bounds = pairwise(accumulate(each.rows_S, initial=row_start))
            to = tuple((first_rank + place, span) for place, span in enumerate(bounds))
            found.append(Brought(each.source, (copy_start, copy_stop), (row_start, row_stop), to))
        copy_start, row_start = copy_stop, row_stop
    return tuple(found)


def num_relayed(copies: NodeCopies) -> tuple[int, int]:
    """Copies that this rank relays, and the rows that it makes of them."""
    relayed: Sequence[tuple[int, int]] = [(each.num_copies, sum(each.rows_S)) for each in copies.relayed]
    return sum(num for num, _ in relayed), sum(rows for _, rows in relayed)
