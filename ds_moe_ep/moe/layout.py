"""Where each piece's rows lie: in send order, on the wire, and stacked by expert.

Three orders of rows meet in a pass. Sent rows lie by (peer, expert of the peer). Received rows come by (piece, peer,
local expert), one message per peer. The experts want them by (local expert, piece, peer), so that the rows of an expert
that come together are one matrix product, and all of its rows are one for its weight gradients. With one local expert
the last two are the same, and rows are received where they are computed.

Where products are grouped, the experts want rows by (group, piece, local expert, peer) instead: a piece's rows of a
group of experts lie side by side and are one product for all of them. Weight gradients need them by expert then, and
`Grouping` knows the way. The rank's own experts are a group, copies of others' another: their weights lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from ds_moe_ep.moe.dispatch_plan import Counts, DispatchPlan
from ds_moe_ep.moe.rows.cuts import Cuts, MessageCuts
from ds_moe_ep.moe.two_level.legs import PieceLegs, legs_of_piece
from ds_moe_ep.schedule.build import Offset, Piece, Schedule

Span = tuple[int, int]  # start, stop
Run = tuple[int, Span]  # local expert, stacked span
Move = tuple[int, int, int]  # start on the wire, start where stacked, rows


@dataclass
class PieceRows:
    """The rows of one piece on this rank. Not frozen: each pass makes some, and frozen fields take four times as long.

    `sent` and `received`: per peer, this rank included, a span of the sent rows and of the received ones; both may be
    empty.
    `moves`: between received and stacked order; none where they are the same. They are in the order of the wire, on
    which all of the piece's rows lie in the span `wire`.
    `runs`: (local expert, stacked span) to compute.
    `tokens`: the span of this rank's tokens that the shared expert computes beside them: those of the near rows' cut.
    `legs`: its messages where rows for far nodes leave as copies; `sent` has no far rows where nodes sum them.
    """

    sent: tuple[tuple[int, Span], ...]
    received: tuple[tuple[int, Span], ...]
    moves: tuple[Move, ...]
    runs: tuple[Run, ...]
    tokens: Span = (0, 0)
    wire: Span = (0, 0)
    legs: PieceLegs | None = None

    @property
    def has_tokens(self) -> bool:
        return self.tokens[0] < self.tokens[1]

    @cached_property
    def part_rows(self) -> list[int]:
        """The rows of each move: of each part of the piece as it lies on the wire."""
        return [num_rows for _, _, num_rows in self.moves]

    @cached_property
    def run_parts(self) -> tuple[tuple[int, ...], ...]:
        """The parts of each run as they are stacked, in the order of `runs`."""
        by_place = sorted(range(len(self.moves)), key=lambda part: self.moves[part][1])
        return tuple(
            tuple(part for part in by_place if start <= self.moves[part][1] < stop) for _, (start, stop) in self.runs
        )


@dataclass(frozen=True)
class Grouping:
    """Rows per expert of a group: of each piece, by the first of its stacked rows, and of all pieces.

    `moves` lead from stacked order to the order by expert, none where the two are the same; they are in stacked order,
    and count from the group's first row.
    """

    rows_of_piece: Mapping[int, tuple[int, ...]]
    rows_L: tuple[int, ...]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class RowLayout:
    """The rows of a whole pass: one PieceRows a piece, runs of each block of weight gradients, each expert's span.

    Where products are grouped, all experts of a group stand for one: each piece has one run of it, and so has the only
    block.
    """

    pieces: tuple[PieceRows, ...]
    weight_runs: tuple[tuple[Run, ...], ...]
    expert_spans: tuple[Span, ...]
    num_received: int
    rank: int  # whose layout it is
    groupings: tuple[Grouping, ...] = ()  # of each group of experts

    @cached_property
    def is_stacked_on_arrival(self) -> bool:
        """True where received rows already lie by expert: one local expert, or no peers."""
        return not any(rows.moves for rows in self.pieces)

    @cached_property
    def run_cuts(self) -> Cuts | None:
        """Cuts of the stacked rows at the ends of all runs; none where products are grouped."""
        return None if self.groupings else Cuts.of([span for rows in self.pieces for _, span in rows.runs])

    @cached_property
    def sent_cuts(self) -> MessageCuts | None:
        """Cuts of the sent rows, and of the results that come back to their places."""
        return MessageCuts.of([rows.sent for rows in self.pieces], self.rank)

    @cached_property
    def received_cuts(self) -> MessageCuts | None:
        """Cuts of the received rows as they lie on the wire, and of their results."""
        return MessageCuts.of([rows.received for rows in self.pieces], self.rank)


def lay_out(
    plan: DispatchPlan, schedule: Schedule, rank: int, num_shared_tokens: int = 0, group_sizes: Sequence[int] = ()
) -> RowLayout:
    """The layout of a plan's rows in the pieces of a schedule, and of the shared expert's tokens. No device work.

    `group_sizes`: local experts of each group whose products are made at once; the schedule has one block of weight
    gradients then.
    """
    pieces, peers = schedule.pieces, schedule.peers_of(rank)
    num_local = len(plan.recv_rows_PL[0])
    sent_P, received_P = _sums(plan.send_rows_PL), _sums(plan.recv_rows_PL)
    sent_start_P = _starts(sent_P)
    parts: list[_Part] = []
    bounds = [0]  # of each piece's parts
    for index, piece in enumerate(pieces):
        parts += _parts(plan, index, piece, sorted(peers[index][1]), received_P)
        bounds.append(len(parts))
    group_of_L = [group for group, size in enumerate(group_sizes) for _ in range(size)]
    order = _stacking_order(schedule, group_of_L, parts)
    stacked = _places(parts, order)
    # With one local expert, or no peers, rows are received where they are computed.
    is_wire_stacked = num_local == 1 or schedule.torus.size == 1
    wire = stacked if is_wire_stacked else _places(parts, range(len(parts)))

    def rows_of(index: int, piece: Piece) -> PieceRows:
        own, (targets, sources) = range(bounds[index], bounds[index + 1]), peers[index]
        start_of = dict.fromkeys(sources, 0) | {parts[part].source: wire[part] for part in reversed(own)}
        sent = _cuts(targets, sent_start_P, sent_P, piece)
        received = _cuts(sources, start_of, received_P, piece, are_there=True)
        moves = () if is_wire_stacked else tuple([(wire[part], stacked[part], parts[part].num_rows) for part in own])
        tokens = _cut(0, num_shared_tokens, piece) if num_shared_tokens and (0, 0) in piece.offsets else (0, 0)
        span = (moves[0][0], moves[-1][0] + moves[-1][2]) if moves else (0, 0)
        runs = _runs(parts, stacked, sorted(own, key=stacked.__getitem__))
        return PieceRows(sent, received, moves, _whole(runs, group_of_L) if group_of_L else runs, tokens, span)

    def runs_from(block: Sequence[Offset]) -> tuple[Run, ...]:
        if len(block) == schedule.torus.size:
            return _runs(parts, stacked, order)
        sources = {schedule.torus.source(rank, offset) for offset in block}
        return _runs(parts, stacked, [part for part in order if parts[part].source in sources])

    # Not those of the plan: pieces that only time transfers may carry some rows twice, and others never.
    rows_L = _rows_of_experts(parts, num_local)
    rows_of_pieces = tuple([rows_of(index, piece) for index, piece in enumerate(pieces)])
    if schedule.spreads:
        rows_of_pieces = _with_legs(rows_of_pieces, plan, schedule, rank)
    if group_of_L:
        assert len(schedule.blocks) <= 1 and not schedule.is_bit_equal, "a weight gradient is one product"
        spans, groupings = _groupings(parts, stacked, rows_L, group_sizes)
        all_runs = tuple([(group, span) for group, span in enumerate(spans) if span[0] < span[1]])
        return RowLayout(rows_of_pieces, (all_runs,) * len(schedule.blocks), spans, sum(rows_L), rank, groupings)
    return RowLayout(
        rows_of_pieces,
        tuple([runs_from(block) for block in schedule.blocks]),
        tuple(pairwise(accumulate(rows_L, initial=0))),
        sum(rows_L),
        rank,
    )


class LastLayout:
    """The layout of the last pass, for the next one where its counts are the same.

    They are with a capacity, and in a recomputation.
    """

    def __init__(self) -> None:
        self._asked: tuple[object, ...] = ()
        self._layout: RowLayout | None = None

    def of(
        self, plan: DispatchPlan, schedule: Schedule, rank: int, num_shared_tokens: int, group_sizes: Sequence[int]
    ) -> RowLayout:
        """As `lay_out`."""
        asked = plan.send_rows_PL, plan.recv_rows_PL, schedule, rank, num_shared_tokens, group_sizes
        if self._layout is None or asked != self._asked or plan.copies is not None:  # copies differ by their tokens too
            self._layout = lay_out(plan, schedule, rank, num_shared_tokens, group_sizes)
            self._asked = asked if plan.copies is None else ()
        return self._layout


def _with_legs(
    rows_of_pieces: Sequence[PieceRows], plan: DispatchPlan, schedule: Schedule, rank: int
) -> tuple[PieceRows, ...]:
    """The pieces with the legs of those whose rows for far nodes leave as copies.

    Where nodes sum, no far rows are there: near ones are the first of those that leave and come back.
    """
    assert plan.copies is not None, "a plan of two levels"
    first = plan.copies.near_rows[0] if schedule.gathers else 0
    found = []
    for index, (piece, rows) in enumerate(zip(schedule.pieces, rows_of_pieces, strict=True)):
        sent = tuple((peer, (start - first, stop - first)) for peer, (start, stop) in rows.sent)
        legs = None
        if index in schedule.spreads:
            legs = legs_of_piece(piece, schedule.torus, rank, plan.copies, sent, rows.received)
        found.append(replace(rows, sent=legs.near if legs and schedule.gathers else sent, legs=legs))
    return tuple(found)


class _Part(NamedTuple):
    """The rows of one local expert that come from one rank in one piece; `skipped` of that rank's lie before them."""

    piece: int
    source: int
    expert: int
    skipped: int
    num_rows: int


_part: Callable[[tuple[int, int, int, int, int]], _Part] = partial(tuple.__new__, _Part)  # _Part() takes twice as long


def _parts(
    plan: DispatchPlan, index: int, piece: Piece, sources: Sequence[int], received_P: Sequence[int]
) -> list[_Part]:
    """The parts of a piece in the order in which their rows come; empty ones are left out.

    Messages lie in the order of their ranks, so that an all-to-all finds all of a piece side by side.
    """
    cut, num_cuts = piece.cut, piece.num_cuts
    if num_cuts == 1:
        cuts = [(peer, 0, received_P[peer]) for peer in sources]
    else:
        numbers = [(peer, received_P[peer]) for peer in sources]
        cuts = [(peer, cut * num // num_cuts, (cut + 1) * num // num_cuts) for peer, num in numbers]
    if len(plan.recv_rows_PL[0]) == 1:
        return [_part((index, source, 0, first, last - first)) for source, first, last in cuts if first < last]
    parts: list[_Part] = []
    for source, first, last in cuts:
        start = 0
        for expert, num_rows in enumerate(plan.recv_rows_PL[source]):
            stop = start + num_rows
            here, end = max(first, start), min(last, stop)
            if here < end:
                parts.append(_part((index, source, expert, here - start, end - here)))
            start = stop
    return parts


def _groupings(
    parts: Sequence[_Part], stacked: Sequence[int], rows_L: Sequence[int], group_sizes: Sequence[int]
) -> tuple[tuple[Span, ...], tuple[Grouping, ...]]:
    """The stacked rows of each group of experts, and its grouping."""
    experts_G = list(pairwise(accumulate(group_sizes, initial=0)))
    assert experts_G[-1][1] == len(rows_L), "each expert is of one group"
    spans = tuple(pairwise(accumulate([sum(rows_L[first:last]) for first, last in experts_G], initial=0)))
    both = zip(experts_G, spans, strict=True)
    return spans, tuple([_grouping(parts, stacked, experts, rows) for experts, rows in both])


def _grouping(parts: Sequence[_Part], stacked: Sequence[int], experts: Span, span: Span) -> Grouping:
    """The groups of each piece's rows, and of all rows, of the experts in this span; theirs are these stacked rows."""
    (first, last), (start, _) = experts, span
    mine = [index for index, part in enumerate(parts) if first <= part.expert < last]
    by_piece: dict[int, list[int]] = {}
    for index in mine:
        by_piece.setdefault(parts[index].piece, []).append(index)
    in_order = sorted(mine, key=stacked.__getitem__)
    by_expert = _places(parts, sorted(in_order, key=lambda index: parts[index].expert))
    moves = [(stacked[i] - start, by_expert[i], parts[i].num_rows) for i in in_order] if len(by_piece) > 1 else []
    rows_of_piece = {
        min(stacked[i] for i in own): tuple(_rows_of_experts([parts[i] for i in own], last)[first:])
        for own in by_piece.values()
    }
    return Grouping(rows_of_piece, tuple(_rows_of_experts([parts[i] for i in mine], last)[first:]), tuple(moves))


def _rows_of_experts(parts: Sequence[_Part], num_local: int) -> list[int]:
    rows_L = [0] * num_local
    for part in parts:
        rows_L[part.expert] += part.num_rows
    return rows_L


def _whole(runs: Sequence[Run], group_of_L: Sequence[int]) -> tuple[Run, ...]:
    """Runs of a group's experts, which follow each other in a piece, as one."""
    spans: dict[int, Span] = {}
    for expert, (start, stop) in runs:
        first, _ = spans.setdefault(group_of_L[expert], (start, stop))
        spans[group_of_L[expert]] = first, stop
    return tuple(spans.items())


def _stacking_order(schedule: Schedule, group_of_L: Sequence[int], parts: Sequence[_Part]) -> Sequence[int]:
    """The parts by local expert, and then by piece, so that a piece's rows of an expert are one run, one product.

    By group and piece first where products are grouped. Bit-equal schedules need an order that none of them changes: by
    local expert, then by source.
    """
    place = schedule.stacking_place
    keys: list[tuple[int, ...]]
    if group_of_L:
        keys = [(group_of_L[expert], piece, expert, source) for piece, source, expert, _, _ in parts]
    elif schedule.is_bit_equal:
        keys = [(expert, source, skipped) for _, source, expert, skipped, _ in parts]
    else:
        keys = [(expert, place[piece], source) for piece, source, expert, _, _ in parts]
    return sorted(range(len(parts)), key=keys.__getitem__)


def _places(parts: Sequence[_Part], order: Sequence[int]) -> list[int]:
    """The row at which each part begins, where they follow each other in this order."""
    places, start = [0] * len(parts), 0
    for index in order:
        places[index] = start
        start += parts[index].num_rows
    return places


def _runs(parts: Sequence[_Part], stacked: Sequence[int], in_order: Sequence[int]) -> tuple[Run, ...]:
    """The runs of these parts, given in stacked order, adjacent ones of one expert joined: larger products."""
    merged: list[Run] = []
    owner, first, last = -1, 0, 0
    for index in in_order:
        start, (_, _, expert, _, num_rows) = stacked[index], parts[index]
        if expert == owner and start == last:
            last += num_rows
            continue
        if owner >= 0:
            merged.append((owner, (first, last)))
        owner, first, last = expert, start, start + num_rows
    if owner >= 0:
        merged.append((owner, (first, last)))
    return tuple(merged)


def _sums(rows_PL: Counts) -> list[int]:
    """Rows by peer."""
    return [row for (row,) in rows_PL] if len(rows_PL[0]) == 1 else [sum(rows) for rows in rows_PL]


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _cuts(
    peers: Sequence[int],
    start_of: Sequence[int] | Mapping[int, int],
    rows_P: Sequence[int],
    piece: Piece,
    are_there: bool = False,
) -> tuple[tuple[int, Span], ...]:
    """By peer the span of the piece's cut of its rows; with `are_there` the cut itself lies at the start.

    Written out: a pass asks for some forty, and a call costs as much as the arithmetic.
    """
    cut, num_cuts = piece.cut, piece.num_cuts
    whole = [(peer, start_of[peer], rows_P[peer]) for peer in peers]
    if num_cuts == 1:
        return tuple([(peer, (start, start + num)) for peer, start, num in whole])
    if are_there:
        return tuple(
            [(peer, (start, start + (cut + 1) * num // num_cuts - cut * num // num_cuts)) for peer, start, num in whole]
        )
    return tuple(
        [(peer, (start + cut * num // num_cuts, start + (cut + 1) * num // num_cuts)) for peer, start, num in whole]
    )


def _cut(start: int, num_rows: int, piece: Piece) -> Span:
    """The piece's cut of `num_rows` rows from `start` on; both ends of a message cut alike."""
    if piece.num_cuts == 1:
        return start, start + num_rows
    return (
        start + piece.cut * num_rows // piece.num_cuts,
        start + (piece.cut + 1) * num_rows // piece.num_cuts,
    )
