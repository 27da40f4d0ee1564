"""Where each piece's rows lie: in send order, on the wire, and stacked by expert.

Three orders of rows meet in a pass. Sent rows lie by (peer, expert of the peer). Received rows come by (peer, local
expert), one message a peer. The experts want them by (local expert, peer), so that all rows of an expert lie side by
side in an order that no schedule changes. With one local expert the last two are the same, and rows are received where
they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.schedule.build import Offset, Piece, weight_blocks

Span = tuple[int, int]  # start, stop
Run = tuple[int, Span]  # local expert, stacked span
Move = tuple[int, int, int]  # start on the wire, start where stacked, rows


@dataclass(frozen=True)
class PieceRows:
    """The rows of one piece on this rank.

    `sent` and `received`: per peer, this rank included, a span of the sent rows and of the received ones; both may be
    empty.
    `moves`: between received and stacked order; none where they are the same.
    `runs`: (local expert, stacked span) to compute.
    `tokens`: the span of this rank's tokens that the shared expert computes beside them: those of the near rows' cut.
    """

    sent: tuple[tuple[int, Span], ...]
    received: tuple[tuple[int, Span], ...]
    moves: tuple[Move, ...]
    runs: tuple[Run, ...]
    tokens: Span = (0, 0)

    @property
    def has_tokens(self) -> bool:
        return self.tokens[0] < self.tokens[1]

    @cached_property
    def run_moves(self) -> tuple[tuple[Move, ...], ...]:
        """The moves of each run's rows, in the order of `runs`."""
        return tuple(tuple(move for move in self.moves if start <= move[1] < stop) for _, (start, stop) in self.runs)


@dataclass(frozen=True)
class RowLayout:
    """The rows of a whole pass: one PieceRows a piece, runs of each block of weight gradients, each expert's span."""

    pieces: tuple[PieceRows, ...]
    weight_runs: tuple[tuple[Run, ...], ...]
    expert_spans: tuple[Span, ...]
    num_received: int

    @property
    def is_stacked_on_arrival(self) -> bool:
        """Whether received rows already lie by expert: one local expert, or no peers."""
        return not any(rows.moves for rows in self.pieces)


def lay_out(
    plan: DispatchPlan, pieces: Sequence[Piece], torus: Torus, rank: int, num_shared_tokens: int = 0
) -> RowLayout:
    """The layout of a plan's rows in the pieces of a schedule, and of the shared expert's tokens. No device work."""
    recv_PL = plan.recv_rows_PL
    num_local = len(recv_PL[0])
    sent_start_P = _starts([sum(rows) for rows in plan.send_rows_PL])
    recv_start_P = _starts([sum(rows) for rows in recv_PL])
    stacked_start = _starts([recv_PL[p][e] for e in range(num_local) for p in range(torus.size)])
    start_LP = [stacked_start[e * torus.size : (e + 1) * torus.size] for e in range(num_local)]
    expert_starts = [row[0] for row in start_LP] + [plan.num_received]
    stacked_on_arrival = num_local == 1 or torus.size == 1

    def rows_of(piece: Piece) -> PieceRows:
        sent, received, moves, runs = [], [], [], []
        for offset in piece.offsets:
            target, source = torus.target(rank, offset), torus.source(rank, offset)
            into = _cut(recv_start_P[source], sum(recv_PL[source]), piece)
            sent.append((target, _cut(sent_start_P[target], sum(plan.send_rows_PL[target]), piece)))
            received.append((source, into))
            for expert, start, skipped, num_rows in _by_expert(into, recv_start_P[source], recv_PL[source]):
                place = start_LP[expert][source] + skipped
                runs.append((expert, (place, place + num_rows)))
                moves.append((start, place, num_rows))
        tokens = _cut(0, num_shared_tokens, piece) if (0, 0) in piece.offsets else (0, 0)
        moved = () if stacked_on_arrival else tuple(moves)
        return PieceRows(tuple(sent), tuple(received), moved, _merge(runs), tokens)

    def runs_from(block: Sequence[Offset]) -> tuple[Run, ...]:
        sources = [torus.source(rank, offset) for offset in block]
        return _merge(
            [(e, (start_LP[e][p], start_LP[e][p] + recv_PL[p][e])) for e in range(num_local) for p in sources]
        )

    return RowLayout(
        tuple(rows_of(piece) for piece in pieces),
        tuple(runs_from(block) for block in weight_blocks(torus)),
        tuple(pairwise(expert_starts)),
        plan.num_received,
    )


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _cut(start: int, num_rows: int, piece: Piece) -> Span:
    """The piece's cut of `num_rows` rows from `start` on; both ends of a message cut alike."""
    return (
        start + piece.cut * num_rows // piece.num_cuts,
        start + (piece.cut + 1) * num_rows // piece.num_cuts,
    )


def _by_expert(span: Span, start: int, rows_L: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The parts of a span of one peer's received rows that belong to each local expert; empty ones left out.

    Each is (expert, where the part starts, how many of the expert's rows lie before it, its rows).
    """
    parts = []
    for expert, num_rows in enumerate(rows_L):
        first, last = max(span[0], start), min(span[1], start + num_rows)
        if first < last:
            parts.append((expert, first, first - start, last - first))
        start += num_rows
    return parts


def _merge(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs in stacked order, adjacent ones of one expert joined: fewer and larger matrix products."""
    merged: list[Run] = []
    for expert, (start, stop) in sorted(runs, key=lambda run: run[1]):
        if merged and merged[-1][0] == expert and merged[-1][1][1] == start:
            merged[-1] = (expert, (merged[-1][1][0], stop))
        else:
            merged.append((expert, (start, stop)))
    return tuple(merged)
