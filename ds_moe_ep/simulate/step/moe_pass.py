"""One pass of an expert-parallel layer on a cluster: what each op of its schedule takes, for each rank simulated.

Rank r of P receives loads[r] times the mean; every rank sends each other the same rows, N/P * loads[target]. Transfers
between all ranks are one all-to-all on a host and grouped sends and receives on devices (moe_ep.transport="auto").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.build import Op, OpKind, Piece, Schedule, backward_schedule, forward_schedule
from ds_moe_ep.schedule.program import NOBODY, Behind, Event, Load, LoadOf, Program, add_pass
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.schedule.two_level import copies_share, far_nodes
from ds_moe_ep.schedule.two_level import receives as receives_of
from ds_moe_ep.schedule.two_level import sends as sends_of
from ds_moe_ep.simulate.cluster.machine import Machine, Volume

MAX_RANKS = 32  # of a group with unequal loads that are simulated one by one; beyond, the fullest stands for all


@dataclass(frozen=True)
class Rows:
    """Rows of one exchange: `sent` by a rank in all; `loads` is what each receives over the mean, () is even."""

    torus: Torus
    sent: float
    loads: tuple[float, ...] = ()

    def to(self, target: int) -> float:
        """Rows that each rank sends to `target`."""
        load = self.loads[target] if self.loads else 1.0
        return self.sent / self.torus.size * load

    def received(self, rank: int) -> float:
        """Rows that `rank` computes in all."""
        return self.torus.size * self.to(rank)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks to simulate: one where all are alike, else each of them, or the fullest where they are many."""
        if not self.loads:
            return (0,)
        if self.torus.size > MAX_RANKS:
            return (self.loads.index(max(self.loads)),)
        return tuple(range(self.torus.size))

    def far_share(self, shared_by: float) -> float:
        """The rank's part of the far link that `shared_by` ranks share, over an equal part: by their loads."""
        if not self.loads:
            return 1.0
        rank = self.ranks[0]
        first = rank - rank % self.torus.node_size
        mates = self.loads[first : first + self.torus.node_size]
        mean = sum(mates) / len(mates)
        return min(max(self.loads[rank] / mean, 1.0), shared_by) if mean else 1.0


@dataclass(frozen=True)
class WorkShare:
    """Work of one op: rows of a piece, or of a block of weight gradients, in so many runs that are a product each.

    `tokens` are the rank's own that its shared expert computes beside them, as a share of all.
    """

    rows: float
    num_runs: float
    tokens: float = 0.0
    is_last: bool = True  # block


@dataclass(frozen=True)
class ExpertTimes:
    """Microseconds that a rank's experts take for a share of the rows: forward, input gradients, weight gradients."""

    forward: Callable[[WorkShare], float]
    input_grads: Callable[[WorkShare], float]
    weight_grads: Callable[[WorkShare], float]


@dataclass(frozen=True)
class LayerPass:
    """A layer whose passes can be put into a program."""

    moe: MoEConfig
    machine: Machine
    rows: Rows
    row_bytes: float
    times: ExpertTimes
    num_local: int  # experts of a rank

    @cached_property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Forward and backward."""
        return forward_schedule(self.moe, self.rows.torus), backward_schedule(self.moe, self.rows.torus)

    def forward(self, program: Program, start: Event, layer: str, behind: Behind = NOBODY) -> Event:
        """Puts a forward pass behind `start`; `behind` hears of the end of each of its ops."""
        schedule, tags = self.schedules[0], Tags(layer, "forward")
        loads = self._loads_of_actors(schedule, self.times.forward)
        return add_pass(program, schedule, loads, start, tags, self.machine.in_flight, behind)

    def backward(self, program: Program, start: Event, layer: str, behind: Behind = NOBODY) -> Event:
        """Puts a backward pass behind `start`; `behind` hears of the end of each of its ops."""
        schedule, tags = self.schedules[1], Tags(layer, "backward")
        loads = self._loads_of_actors(schedule, self.times.input_grads)
        return add_pass(program, schedule, loads, start, tags, self.machine.in_flight, behind)

    def _loads_of_actors(self, schedule: Schedule, compute_us: Callable[[WorkShare], float]) -> list[LoadOf]:
        return [self._loads(schedule, compute_us, actor) for actor in range(self.machine.num_actors)]

    def _loads(self, schedule: Schedule, compute_us: Callable[[WorkShare], float], actor: int) -> LoadOf:
        """Load of each op for one rank."""
        rank = self.rows.ranks[actor]
        volumes = [_volume(piece, self.rows, rank, self.row_bytes) for piece in schedule.pieces]
        from_each = self.rows.to(rank)
        num_local = self.num_local
        shares = [_share(piece, from_each, num_local, schedule.is_bit_equal) for piece in schedule.pieces]
        last = len(schedule.blocks) - 1
        blocks = [
            WorkShare(len(block) * from_each, num_local, float(index == 0), index == last)  # near rows are the first
            for index, block in enumerate(schedule.blocks)
        ]

        def load(op: Op) -> Load:
            if op.kind is OpKind.WEIGHTS:
                return Load((self.machine.compute(self.times.weight_grads(blocks[op.piece])),))
            if op.kind is OpKind.COMPUTE:
                return Load((self.machine.compute(compute_us(shares[op.piece])),))
            if op.piece in schedule.spreads | schedule.gathers:
                return self.machine.transfer(actor, self._volume_of_leg(op, schedule, rank))
            volume = volumes[op.piece]
            return self.machine.transfer(actor, volume if op.kind is OpKind.DISPATCH else volume.back)

        return load

    def _volume_of_leg(self, op: Op, schedule: Schedule, rank: int) -> Volume:
        """Traffic of a rank in an op of a piece that sends copies; routing is uniform over distinct experts.

        Loads count by rank, not by choice: with unequal ones a node's copies are as many fewer as with equal ones.
        """
        torus, rows = self.rows.torus, self.rows
        share = copies_share(self.moe.num_experts, self.moe.top_k, torus.num_nodes)
        sends, receives = (ends_of(op, rank, schedule) for ends_of in (sends_of, receives_of))
        piece, per_node = schedule.pieces[op.piece], torus.node_size

        def to_node(target: int) -> float:
            first = target - target % per_node
            return share * sum(rows.to(first + place) for place in range(per_node))

        is_out = op.kind in (OpKind.DISPATCH, OpKind.SPREAD)
        has_legs = op.piece in (schedule.spreads if is_out else schedule.gathers)
        if has_legs and op.kind in (OpKind.DISPATCH, OpKind.COMBINE):  # of copies, and of their sums
            away, home = sum(to_node(end.peer) for end in sends), len(far_nodes(piece)) * to_node(rank)
            away, home = (away, home) if is_out else (home, sum(to_node(end.peer) for end in receives))
            messages = len(far_nodes(piece))
            return Volume(
                far_out=away * self.row_bytes, far_in=home * self.row_bytes, far_messages=messages, is_joint=False
            )
        if has_legs:
            others = [end.peer for end in sends if end.peer != rank]
            away, home = sum(rows.to(peer) for peer in others), len(others) * rows.to(rank)
            away, home = (away, home) if is_out else (home, away)
            return Volume(near_out=away * self.row_bytes, near_in=home * self.row_bytes, near_messages=len(others))
        volume = _volume(piece, rows, rank, self.row_bytes)
        return volume if op.kind is OpKind.DISPATCH else volume.back


def _share(piece: Piece, from_each: float, num_local: int, is_bit_equal: bool) -> WorkShare:
    """A piece's rows and its runs: the rows of an expert that lie side by side.

    A message lies by expert, so that a cut of it has some of the experts, whole where they are as many as cuts. Stacked
    by source, as equal bits have it, cut rows of an expert from each peer lie apart.
    """
    first, last = (num_local * cut / piece.num_cuts for cut in (piece.cut, piece.cut + 1))
    num_experts = math.ceil(last) - math.floor(first)
    lies_apart = is_bit_equal and num_local % piece.num_cuts > 0
    return WorkShare(
        len(piece.offsets) * from_each / piece.num_cuts,
        num_experts * (len(piece.offsets) if lies_apart else 1),
        1 / piece.num_cuts if (0, 0) in piece.offsets else 0.0,
    )


def _volume(piece: Piece, rows: Rows, rank: int, row_bytes: float) -> Volume:
    """Traffic of `rank` when a piece is dispatched."""
    near = [offset for offset in piece.offsets if offset[0] == 0 and offset != (0, 0)]
    far = [offset for offset in piece.offsets if offset[0] != 0]
    each_bytes = row_bytes / piece.num_cuts
    near_out, far_out = (sum(rows.to(rows.torus.target(rank, o)) for o in offsets) for offsets in (near, far))
    return Volume(
        near_out=near_out * each_bytes,
        near_in=len(near) * rows.to(rank) * each_bytes,
        far_out=far_out * each_bytes,
        far_in=len(far) * rows.to(rank) * each_bytes,
        near_messages=len(near),
        far_messages=len(far),
        is_joint=len(near) + len(far) == rows.torus.size - 1,
    )
