"""The schedule of one pass through the experts, as data.

A pass moves rows to the ranks of their experts (dispatch), computes there, and moves results back (combine). The
work is cut into pieces; a piece is a set of offsets on the torus of ranks and a row cut of each. Ops name a piece
and the ops that must be done before. Nothing here depends on the rank or on the routing: every rank holds the same
schedule, issues the same communication in the same order, and so cannot deadlock.

"peers", forward; near rows (the rank's own and its node's) bracket the far ones:

    pieces     near/2   far 1   far 2   far 3   near/2
    dispatch   D0 D1    D2      D3      D4
    compute       E0      E1      E2      E3      E4
    combine          C0      C1      C2      C3      C4

and backward, where weight gradients (W), which no rank waits for, fill the time of the last transfers; with
`weight_blocks` 4, for links on which that is not enough, that of the transfers at both ends:

    compute       E0 E4 E1 E2 E3 W0
    compute       E0 E4 W0    E1      E2   W1   E3   W2   W3

Two-level dispatch (`two_level`) sends a far piece's tokens to one rank of their node, once each, and spreads them
inside of it (S); results come back row by row, or (G) gathered and summed in the node:

    dispatch   D0 D1    D2
    spread        S1    S2
    compute       E0    E1    E2
    gather                 G1    G2
    combine          C0       C1    C2

A lane is first in, first out: transfers start in issue order, so that the first group arrives first.
`moe/executor.py` runs a schedule, `price.py` tells what it will take, `spans.py` accounts for what it hid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.config.two_level import check_nodes

Offset = tuple[int, int]
Peers = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

MAX_WEIGHT_BLOCKS = 4  # more would cost more in small matrix products than they fill


class OpKind(Enum):
    """The work of an op on its piece; the value is the lane that it runs on."""

    DISPATCH = "dispatch"
    SPREAD = "spread"
    COMPUTE = "compute"
    GATHER = "gather"
    COMBINE = "combine"
    WEIGHTS = "weights"

    @property
    def lane(self) -> str:
        """The lane of the op: weight gradients share the compute lane."""
        return "compute" if self is OpKind.WEIGHTS else self.value


LETTERS = dict(zip(OpKind, "DSEGCW", strict=True))


@dataclass(frozen=True)
class Piece:
    """At each of `offsets`, the `cut`-th of `num_cuts` equal parts of the rows that go there."""

    offsets: tuple[Offset, ...]
    cut: int = 0
    num_cuts: int = 1


@dataclass(frozen=True)
class Op:
    """One step: `kind` on `piece`, once the ops at the indices `after` are done.

    The piece of WEIGHTS is one of the schedule's blocks: the rows from its offsets, in whatever pieces they came.
    """

    kind: OpKind
    piece: int
    after: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.value} {self.piece}"


@dataclass(frozen=True)
class Schedule:
    """Ops in issue order over pieces of the traffic between the ranks of one torus. Depth 0 blocks on each of them.

    `blocks` are the offsets whose rows one product of a weight gradient takes together. With `is_bit_equal` no
    schedule changes them, nor the order of the rows that they sum over.
    """

    name: str
    torus: Torus
    pieces: tuple[Piece, ...]
    ops: tuple[Op, ...]
    depth: int
    blocks: tuple[tuple[Offset, ...], ...] = ()
    is_bit_equal: bool = False

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Whose rows each piece holds, for people: all peers, own, near, node +1, nodes +1 to +2 (1/2)."""
        return tuple(_label(piece, self.torus) for piece in self.pieces)

    @cached_property
    def issues(self) -> tuple[tuple[Op, str, str, bool], ...]:
        """Each op with its lane, whose rows it moves or computes, and whether its end is awaited."""
        return tuple(
            (op, op.kind.lane, "" if op.kind is OpKind.WEIGHTS else self.labels[op.piece], index in self.awaited)
            for index, op in enumerate(self.ops)
        )

    def peers_of(self, rank: int) -> Peers:
        """Of each piece: whom a rank sends to, and whom it receives from, at each of its offsets."""
        if rank not in self._known_peers:
            target, source = self.torus.target, self.torus.source
            self._known_peers[rank] = tuple(
                (tuple(target(rank, o) for o in piece.offsets), tuple(source(rank, o) for o in piece.offsets))
                for piece in self.pieces
            )
        return self._known_peers[rank]

    @cached_property
    def _known_peers(self) -> dict[int, Peers]:
        return {}

    @cached_property
    def spreads(self) -> frozenset[int]:
        """The pieces whose rows for far nodes leave as one copy per token, and are spread there."""
        return frozenset(op.piece for op in self.ops if op.kind is OpKind.SPREAD)

    @cached_property
    def gathers(self) -> frozenset[int]:
        """The pieces whose results are summed on the far node before they come back."""
        return frozenset(op.piece for op in self.ops if op.kind is OpKind.GATHER)

    @cached_property
    def awaited(self) -> frozenset[int]:
        """The indices of ops whose end another lane waits for, or the caller: the last transfers of each lane."""
        lanes = [op.kind.lane for op in self.ops]
        crossed = {before for op in self.ops for before in op.after if lanes[before] != op.kind.lane}
        last = {lane: index for index, lane in enumerate(lanes)}
        return frozenset(crossed | set(last.values()))

    @cached_property
    def stacking_place(self) -> tuple[int, ...]:
        """The place of each piece's rows among those of an expert, near rows first."""
        order = near_first(self.pieces)
        return tuple(order.index(piece) for piece in range(len(order)))

    def __str__(self) -> str:
        return " ".join(f"{LETTERS[op.kind]}{op.piece}" for op in self.ops)


def _label(piece: Piece, torus: Torus) -> str:
    nodes = sorted({node for node, _ in piece.offsets})
    places = sorted({place for _, place in piece.offsets})
    if len(piece.offsets) == torus.size:
        label = "all peers"
    elif piece.offsets == ((0, 0),):
        label = "own"
    elif nodes == [0] and torus.num_nodes > 1:
        label = "near"
    else:
        label = _range("node", nodes) if nodes != [0] else ""
        if len(piece.offsets) < len(nodes) * torus.node_size:
            label = f"{label} {_range('rank', places)}".strip()
    return label if piece.num_cuts == 1 else f"{label} ({piece.cut + 1}/{piece.num_cuts})"


def _range(what: str, values: Sequence[int]) -> str:
    return f"{what} +{values[0]}" if len(values) == 1 else f"{what}s +{values[0]} to +{values[-1]}"


def forward_schedule(config: MoEConfig, torus: Torus) -> Schedule:
    """The ops of a forward pass."""
    return _schedule(config, torus, is_backward=False)


def backward_schedule(config: MoEConfig, torus: Torus) -> Schedule:
    """The ops of a backward pass: gradients of the outputs go out, those of the inputs come back.

    A block's weight gradients come one piece later than they could: under the transfers of the pieces around them.
    """
    return _schedule(config, torus, is_backward=True)


def pieces_of(config: MoEConfig, torus: Torus) -> tuple[Piece, ...]:
    """The pieces in the order of their computation in a forward pass."""
    everywhere = tuple(torus.offsets())
    if config.is_serial or torus.size == 1:
        return (Piece(everywhere),)
    if config.schedule == "chunks":
        return tuple(Piece(everywhere, cut, config.chunks) for cut in range(config.chunks))
    near, groups = _near_and_far(torus, config.peer_group_size)
    far = [Piece(group, cut, config.row_cuts) for group in groups for cut in range(config.row_cuts)]
    if torus.num_nodes == 1:
        return (Piece(near), *far)
    return (Piece(near, 0, 2), *far, Piece(near, 1, 2))


def blocks_of(config: MoEConfig, torus: Torus) -> tuple[tuple[Offset, ...], ...]:
    """The blocks of weight gradients under a configuration.

    One, wherever more would fill nothing: each chunk holds rows of every block. A single product sums inside of the
    matrix unit and is written once, in the weights' own type. `bit_equal` takes what the torus alone gives, so that
    every schedule sums the same products in the same order.
    """
    if config.bit_equal:
        return tuple(weight_blocks(torus))
    return tuple(weight_blocks(torus, config.weight_blocks if config.schedule == "peers" else 1))


def weight_blocks(torus: Torus, most: int = MAX_WEIGHT_BLOCKS) -> list[tuple[Offset, ...]]:
    """The near rows, and the far nodes, in as many blocks as may be, as offsets that the rows come from."""
    num_far = min(torus.num_nodes, MAX_WEIGHT_BLOCKS, most) - 1
    bounds = [0, *(1 + (torus.num_nodes - 1) * block // max(num_far, 1) for block in range(num_far)), torus.num_nodes]
    return [tuple(o for o in torus.offsets() if start <= o[0] < stop) for start, stop in pairwise(bounds)]


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


def near_first(pieces: Sequence[Piece]) -> list[int]:
    """The pieces' indices with all near rows in front, in which backward passes compute and rows are stacked.

    The two halves of the near rows then lie side by side, and so do the rows of each block of weight gradients.
    """
    return sorted(range(len(pieces)), key=lambda piece: (pieces[piece].offsets[0] != (0, 0), piece))


def _schedule(config: MoEConfig, torus: Torus, *, is_backward: bool) -> Schedule:
    pieces, blocks = pieces_of(config, torus), blocks_of(config, torus)
    depth = 0 if config.is_serial else config.depth
    computes = _compute_order(pieces, blocks if is_backward else ())
    check_nodes(config.two_level, config.top_k, config.schedule, config.peer_group_size, torus)
    far = frozenset(index for index, piece in enumerate(pieces) if any(node for node, _ in piece.offsets))
    gathers = far if config.two_level == "sums" else frozenset[int]()
    spreads = gathers or (far if config.two_level == "copies" and not is_backward else frozenset[int]())
    around = _Around(spreads, gathers)
    ops = tuple(_blocking(computes, around) if depth == 0 else _pipelined(computes, depth, pieces, blocks, around))
    return Schedule(config.schedule, torus, pieces, ops, depth, blocks, config.bit_equal)


Computes = list[tuple[OpKind, int]]


def _compute_order(pieces: Sequence[Piece], blocks: Sequence[tuple[Offset, ...]]) -> Computes:
    """The compute lane's work: pieces, and each block's weight gradients one piece after its last one.

    With weight gradients to fill the end, all near rows come first, under the first far dispatch, and theirs with them.
    """
    order = near_first(pieces) if blocks else list(range(len(pieces)))
    last_of = [max(i for i, piece in enumerate(order) if set(pieces[piece].offsets) & set(block)) for block in blocks]
    computes: Computes = []
    written = 0
    for place, piece in enumerate(order):
        computes.append((OpKind.COMPUTE, piece))
        while written < len(blocks) and last_of[written] + (written > 0) <= place:
            computes.append((OpKind.WEIGHTS, written))
            written += 1
    return computes + [(OpKind.WEIGHTS, block) for block in range(written, len(blocks))]


@dataclass(frozen=True)
class _Around:
    """The pieces whose transfers have a second leg inside of the far node."""

    spreads: frozenset[int]
    gathers: frozenset[int]

    def before(self, piece: int) -> tuple[OpKind, ...]:
        return (OpKind.DISPATCH, OpKind.SPREAD) if piece in self.spreads else (OpKind.DISPATCH,)

    def behind(self, piece: int) -> tuple[OpKind, ...]:
        return (OpKind.GATHER, OpKind.COMBINE) if piece in self.gathers else (OpKind.COMBINE,)


def _blocking(computes: Computes, around: _Around) -> Iterator[Op]:
    """Each op waits for the one before: nothing is hidden. The control of every overlap figure."""
    index = 0
    for kind, piece in computes:
        is_piece = kind is OpKind.COMPUTE
        for step in (*around.before(piece), kind, *around.behind(piece)) if is_piece else (kind,):
            yield Op(step, piece, (index - 1,) if index else ())
            index += 1


def _pipelined(
    computes: Computes, depth: int, pieces: Sequence[Piece], blocks: Sequence[tuple[Offset, ...]], around: _Around
) -> Iterator[Op]:
    """Dispatches are issued `depth` pieces ahead; every transfer is issued before the compute that hides it.

    A spread is issued one piece ahead, and with depth 1, for one hardware queue, not ahead: it waits for its dispatch.
    """
    to_dispatch = [piece for kind, piece in computes if kind is OpKind.COMPUTE]
    index_of: dict[tuple[OpKind, int], int] = {}

    def op(kind: OpKind, piece: int, after: Sequence[int] = ()) -> Op:
        index_of[kind, piece] = len(index_of)
        return Op(kind, piece, tuple(after))

    dispatched = spread = computed = 0
    for kind, piece in computes:
        if kind is OpKind.WEIGHTS:
            parts = [p for p in to_dispatch if set(pieces[p].offsets) & set(blocks[piece])]
            yield op(kind, piece, [index_of[OpKind.COMPUTE, part] for part in parts])
            continue
        while dispatched < min(computed + 1 + depth, len(to_dispatch)):
            yield op(OpKind.DISPATCH, to_dispatch[dispatched])
            dispatched += 1
        for ahead in to_dispatch[spread : computed + min(depth, 2)]:
            if ahead in around.spreads:
                yield op(OpKind.SPREAD, ahead, [index_of[OpKind.DISPATCH, ahead]])
        spread = computed + min(depth, 2)
        yield op(OpKind.COMPUTE, piece, [index_of[around.before(piece)[-1], piece]])
        last = OpKind.COMPUTE
        for following in around.behind(piece):
            yield op(following, piece, [index_of[last, piece]])
            last = following
        computed += 1
