"""The schedule of one pass through the experts, as data.

A pass moves rows to the ranks of their experts (dispatch), computes there, and moves results back (combine). The
work is cut into pieces; a piece is a set of offsets on the torus of ranks and a row cut of each. Ops name a piece
and the ops that must be done before. Nothing here depends on the rank or on the routing: every rank holds the same
schedule, issues the same communication in the same order, and so cannot deadlock.

    pieces     near/2   far 1   far 2   far 3   near/2            ("peers"; near rows bracket the far ones)
    dispatch   D0 D1    D2      D3      D4
    compute       E0      E1      E2      E3      E4      W       (W: weight gradients, backward only)
    combine          C0      C1      C2      C3      C4

Three rooms read it: `moe/overlap.py` runs it, a simulator can price it, a timeline can account for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ds_moe_ep.config import MoEConfig
from ds_moe_ep.topology import Torus

Offset = tuple[int, int]


class Kind(Enum):
    """What an op does with its piece; the value is the lane that it runs on."""

    DISPATCH = "dispatch"
    COMPUTE = "compute"
    COMBINE = "combine"
    WEIGHTS = "weights"

    @property
    def lane(self) -> str:
        """The lane of the op: weight gradients share the compute lane."""
        return "compute" if self is Kind.WEIGHTS else self.value


@dataclass(frozen=True)
class Piece:
    """At each of `offsets`, the `cut`-th of `num_cuts` equal parts of the rows that go there."""

    offsets: tuple[Offset, ...]
    cut: int = 0
    num_cuts: int = 1


@dataclass(frozen=True)
class Op:
    """One step: `kind` on `piece` (-1: all pieces), once the ops at the indices `after` are done."""

    kind: Kind
    piece: int
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Ops in issue order over pieces of the traffic between the ranks of one torus."""

    name: str
    torus: Torus
    pieces: tuple[Piece, ...]
    ops: tuple[Op, ...]
    depth: int

    def __str__(self) -> str:
        letters = {Kind.DISPATCH: "D", Kind.COMPUTE: "E", Kind.COMBINE: "C", Kind.WEIGHTS: "W"}
        return " ".join(f"{letters[op.kind]}{op.piece if op.piece >= 0 else ''}" for op in self.ops)


def forward_schedule(config: MoEConfig, torus: Torus) -> Schedule:
    """The ops of a forward pass."""
    return _schedule(config, torus, weights=False)


def backward_schedule(config: MoEConfig, torus: Torus) -> Schedule:
    """The ops of a backward pass: gradients of the outputs go out, those of the inputs come back.

    Weight gradients, which nothing waits for, come last: they fill the time of the last combines.
    """
    return _schedule(config, torus, weights=True)


def pieces_of(config: MoEConfig, torus: Torus) -> tuple[Piece, ...]:
    """The pieces in the order of their computation."""
    everywhere = tuple(torus.offsets())
    if config.schedule == "serial" or torus.size == 1:
        return (Piece(everywhere),)
    if config.schedule == "chunks":
        return tuple(Piece(everywhere, cut, config.chunks) for cut in range(config.chunks))
    near, groups = _near_and_far(torus, config.peer_group_size)
    far = [Piece(group, cut, config.row_cuts) for group in groups for cut in range(config.row_cuts)]
    if torus.num_nodes == 1:
        return (Piece(near), *far)
    return (Piece(near, 0, 2), *far, Piece(near, 1, 2))


def _near_and_far(torus: Torus, group_size: int) -> tuple[tuple[Offset, ...], list[tuple[Offset, ...]]]:
    """Near offsets (the own rank, and its node where there are several) and the far ones in groups.

    A group is one node's ranks by default. On one node every other rank is far, in one group: links there are
    fast, and more pieces would cost more in small matrix products than they hide.
    """
    one_node = torus.num_nodes == 1
    near = [o for o in torus.offsets() if o == (0, 0) or (o[0] == 0 and not one_node)]
    far = [o for o in torus.offsets() if o not in near]
    size = group_size or (len(far) if one_node else torus.node_size)
    return tuple(near), [tuple(far[i : i + size]) for i in range(0, len(far), size)]


def _schedule(config: MoEConfig, torus: Torus, weights: bool) -> Schedule:
    pieces = pieces_of(config, torus)
    depth = 0 if config.schedule == "serial" else config.depth
    ops = tuple(_blocking(len(pieces), weights) if depth == 0 else _pipelined(len(pieces), depth, weights))
    return Schedule(config.schedule, torus, pieces, ops, depth)


def _blocking(num_pieces: int, weights: bool) -> Iterator[Op]:
    """Each op waits for the one before: nothing is hidden. The control of every overlap figure."""
    kinds = [(kind, p) for p in range(num_pieces) for kind in (Kind.DISPATCH, Kind.COMPUTE, Kind.COMBINE)]
    if weights:
        kinds.append((Kind.WEIGHTS, -1))
    for index, (kind, piece) in enumerate(kinds):
        yield Op(kind, piece, (index - 1,) if index else ())


def _pipelined(num_pieces: int, depth: int, weights: bool) -> Iterator[Op]:
    """Dispatches run `depth` pieces ahead; every transfer is issued before the compute that hides it.

    A dispatch starts when the one `depth` before it is done, so that a piece gets the link's full speed.
    """
    issued = 0
    dispatch_of: dict[int, int] = {}
    computes: list[int] = []
    for piece in range(num_pieces):
        while len(dispatch_of) < min(piece + 1 + depth, num_pieces):
            ahead = len(dispatch_of)
            paced_by = (dispatch_of[ahead - depth],) if ahead >= depth else ()
            yield Op(Kind.DISPATCH, ahead, paced_by)
            dispatch_of[ahead] = issued
            issued += 1
        yield Op(Kind.COMPUTE, piece, (dispatch_of[piece],))
        yield Op(Kind.COMBINE, piece, (issued,))
        computes.append(issued)
        issued += 2
    if weights:
        yield Op(Kind.WEIGHTS, -1, tuple(computes))


def check(schedule: Schedule) -> list[str]:
    """What is wrong with a schedule, as sentences; empty for a sound one.

    1. Dependencies point back. 2. Each piece is dispatched, computed and combined once, each after the step before.
    3. Each offset's rows are covered once. 4. At every offset senders and receivers agree. 5. With depth > 0 the
    next piece's dispatch is issued before this piece's compute, as CUDA_DEVICE_MAX_CONNECTIONS=1 demands.
    """
    return [
        *_check_dependencies(schedule),
        *_check_rows(schedule),
        *_check_peers(schedule),
        *_check_issue_order(schedule),
    ]


def _check_dependencies(schedule: Schedule) -> Iterator[str]:
    seen: dict[tuple[Kind, int], int] = {}
    for index, op in enumerate(schedule.ops):
        for before in op.after:
            if not 0 <= before < index:
                yield f"op {index} ({op.kind.name} {op.piece}) waits for op {before}, which is not before it"
        if (op.kind, op.piece) in seen:
            yield f"{op.kind.name} of piece {op.piece} stands twice, at ops {seen[op.kind, op.piece]} and {index}"
        seen[op.kind, op.piece] = index
    for piece in range(len(schedule.pieces)):
        for kind, needs in ((Kind.COMPUTE, Kind.DISPATCH), (Kind.COMBINE, Kind.COMPUTE)):
            if (kind, piece) not in seen or (needs, piece) not in seen:
                yield f"piece {piece} lacks {kind.name} or {needs.name}"
            elif seen[needs, piece] not in schedule.ops[seen[kind, piece]].after:
                yield f"{kind.name} of piece {piece} does not wait for its {needs.name}"


def _check_rows(schedule: Schedule) -> Iterator[str]:
    covered: dict[Offset, list[tuple[int, int]]] = {offset: [] for offset in schedule.torus.offsets()}
    for piece in schedule.pieces:
        for offset in piece.offsets:
            covered.setdefault(offset, []).append((piece.num_cuts, piece.cut))
    for offset, cuts in covered.items():
        num_cuts = cuts[0][0] if cuts else 0
        if sorted(cuts) != [(num_cuts, cut) for cut in range(num_cuts)] or not cuts:
            yield f"rows at offset {offset} are not covered once: cuts {sorted(cuts)}"


def _check_peers(schedule: Schedule) -> Iterator[str]:
    torus = schedule.torus
    for offset in torus.offsets():
        for rank in range(torus.size):
            if torus.source(torus.target(rank, offset), offset) != rank:
                yield f"at offset {offset} rank {rank} sends to a rank that expects another sender"


def _check_issue_order(schedule: Schedule) -> Iterator[str]:
    if schedule.depth == 0:
        return
    index_of = {(op.kind, op.piece): index for index, op in enumerate(schedule.ops)}
    for piece in range(len(schedule.pieces) - 1):
        ahead, compute = index_of.get((Kind.DISPATCH, piece + 1)), index_of.get((Kind.COMPUTE, piece))
        if ahead is not None and compute is not None and ahead > compute:
            yield f"DISPATCH of piece {piece + 1} is issued after COMPUTE of piece {piece}: nothing hides it"
