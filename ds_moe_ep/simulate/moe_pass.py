"""One pass of an expert-parallel layer on a cluster: what each op of its schedule takes, for each rank simulated.

Rank r of P receives loads[r] times the mean; every rank sends each other the same rows, N/P * loads[target]. Transfers
between all ranks are one all-to-all on a host and grouped sends and receives on devices (moe_ep.transport="auto").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.config import MoEConfig
from ds_moe_ep.program import Load, LoadOf, Mark, Program, add_pass
from ds_moe_ep.schedule import Kind, Op, Schedule, backward_schedule, forward_schedule, weight_blocks
from ds_moe_ep.simulate.machine import Machine, Volume
from ds_moe_ep.timeline import Tags
from ds_moe_ep.topology import Torus

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
        """What the one rank has of the far link that `shared_by` ranks share, over its equal part: by their loads."""
        if not self.loads:
            return 1.0
        rank = self.ranks[0]
        first = rank - rank % self.torus.node_size
        mates = self.loads[first : first + self.torus.node_size]
        mean = sum(mates) / len(mates)
        return min(max(self.loads[rank] / mean, 1.0), shared_by) if mean else 1.0


@dataclass(frozen=True)
class ExpertTimes:
    """Microseconds that a rank's experts take for so many rows: forward, input gradients, weight gradients."""

    forward: Callable[[float], float]
    input_grads: Callable[[float], float]
    weight_grads: Callable[[float], float]


@dataclass(frozen=True)
class LayerPass:
    """A layer whose passes can be put into a program."""

    moe: MoEConfig
    machine: Machine
    rows: Rows
    row_bytes: float
    times: ExpertTimes

    @cached_property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Forward and backward."""
        return forward_schedule(self.moe, self.rows.torus), backward_schedule(self.moe, self.rows.torus)

    def forward(self, program: Program, start: Mark, layer: str) -> Mark:
        """Puts a forward pass behind `start`."""
        schedule = self.schedules[0]
        return self._add(program, schedule, self.times.forward, start, Tags(layer, "forward"))

    def backward(self, program: Program, start: Mark, layer: str) -> Mark:
        """Puts a backward pass behind `start`."""
        schedule = self.schedules[1]
        return self._add(program, schedule, self.times.input_grads, start, Tags(layer, "backward"))

    def _add(
        self, program: Program, schedule: Schedule, compute_us: Callable[[float], float], start: Mark, tags: Tags
    ) -> Mark:
        loads = [self._loads(schedule, compute_us, actor) for actor in range(self.machine.num_actors)]
        return add_pass(program, schedule, loads, start, tags, self.machine.in_flight)

    def _loads(self, schedule: Schedule, compute_us: Callable[[float], float], actor: int) -> LoadOf:
        """What each op takes for one rank."""
        rank = self.rows.ranks[actor]
        pieces = [_PieceVolumes.of(piece.offsets, piece.num_cuts, self.rows, rank) for piece in schedule.pieces]
        blocks = [len(block) for block in weight_blocks(schedule.torus)]
        from_each = self.rows.to(rank)

        def load(op: Op) -> Load:
            if op.kind is Kind.WEIGHTS:
                return Load((self.machine.compute(self.times.weight_grads(blocks[op.piece] * from_each)),))
            if op.kind is Kind.COMPUTE:
                return Load((self.machine.compute(compute_us(pieces[op.piece].rows)),))
            volume = pieces[op.piece].volume(self.row_bytes, self.rows.torus.size)
            return self.machine.transfer(actor, volume if op.kind is Kind.DISPATCH else _back(volume))

        return load


@dataclass(frozen=True)
class _PieceVolumes:
    """Rows of one piece as one rank sees it: that it computes, sends and receives, near and far."""

    rows: float
    near_out: float
    near_in: float
    far_out: float
    far_in: float
    near_messages: int
    far_messages: int

    @classmethod
    def of(cls, offsets: Sequence[tuple[int, int]], num_cuts: int, rows: Rows, rank: int) -> _PieceVolumes:
        near = [offset for offset in offsets if offset[0] == 0 and offset != (0, 0)]
        far = [offset for offset in offsets if offset[0] != 0]
        from_each = rows.to(rank) / num_cuts
        out = [sum(rows.to(rows.torus.target(rank, o)) for o in some) / num_cuts for some in (near, far)]
        return cls(
            rows=len(offsets) * from_each,
            near_out=out[0],
            near_in=len(near) * from_each,
            far_out=out[1],
            far_in=len(far) * from_each,
            near_messages=len(near),
            far_messages=len(far),
        )

    def volume(self, row_bytes: float, num_ranks: int) -> Volume:
        return Volume(
            near_out=self.near_out * row_bytes,
            near_in=self.near_in * row_bytes,
            far_out=self.far_out * row_bytes,
            far_in=self.far_in * row_bytes,
            near_messages=self.near_messages,
            far_messages=self.far_messages,
            is_joint=self.near_messages + self.far_messages == num_ranks - 1,
        )


def _back(volume: Volume) -> Volume:
    """The same rows on their way back."""
    return Volume(
        near_out=volume.near_in,
        near_in=volume.near_out,
        far_out=volume.far_in,
        far_in=volume.far_out,
        near_messages=volume.near_messages,
        far_messages=volume.far_messages,
        is_joint=volume.is_joint,
    )
