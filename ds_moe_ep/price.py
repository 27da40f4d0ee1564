"""What a schedule will take, from measured costs: a few events a pass, no clock.

1. A piece's compute takes its share of the rows' time; weight gradients likewise.
2. A lane is first in, first out, with one transfer on the wire (the host keeps a second one behind it). A transfer
   takes a latency, then its near rows and its far rows at full speed, one after the other.
3. Dispatch and combine leave by the same link: while far rows of both are on their way, each goes at half the speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config import MoEConfig
from ds_moe_ep.schedule import Kind, Piece, Schedule, backward_schedule, forward_schedule, weight_blocks
from ds_moe_ep.topology import Torus

EPSILON_US = 1e-6
MANY_NODES = 8  # beyond them groups of two nodes are worth a look


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


def candidates(torus: Torus) -> list[dict[str, Any]]:
    """Knobs of the schedules worth a look on a torus, the serial one first."""
    if torus.size == 1:
        return [{"schedule": "serial"}]
    peers: list[dict[str, Any]] = [{"schedule": "peers", "row_cuts": cuts} for cuts in (1, 2, 3, 4)]
    whole = torus.size if torus.num_nodes == 1 else torus.node_size  # ranks of a group by default
    if whole > 3:
        peers.append({"schedule": "peers", "peer_group_size": whole // 2, "row_cuts": 1})
    if torus.num_nodes > MANY_NODES:
        peers.append({"schedule": "peers", "peer_group_size": 2 * whole, "row_cuts": 1})
    chunks: list[dict[str, Any]] = [{"schedule": "chunks", "chunks": chunks} for chunks in (2, 4, 8)]
    return [{"schedule": "serial"}, *peers, *chunks]


def price_us(config: MoEConfig, torus: Torus, costs: Costs) -> float:
    """Microseconds of a forward and a backward pass under the schedule that `config` names, for even routing."""
    forward, backward = forward_schedule(config, torus), backward_schedule(config, torus)
    return price_pass(forward, costs, costs.forward_us) + price_pass(backward, costs, costs.input_grad_us)


def price_pass(schedule: Schedule, costs: Costs, compute_us: float) -> float:
    """Microseconds until the last op of one pass is done; `compute_us` is what all pieces' rows take together."""
    near = [_share(piece.offsets, schedule.torus, far=False) / piece.num_cuts for piece in schedule.pieces]
    far = [_share(piece.offsets, schedule.torus, far=True) / piece.num_cuts for piece in schedule.pieces]
    rows = [_rows(piece.offsets, schedule.torus) / piece.num_cuts for piece in schedule.pieces]
    blocks = [_rows(block, schedule.torus) for block in weight_blocks(schedule.torus)]
    left: list[_Left] = []
    for op in schedule.ops:
        if op.kind is Kind.COMPUTE:
            left.append(_Left(alone_us=rows[op.piece] * compute_us))
        elif op.kind is Kind.WEIGHTS:
            left.append(_Left(alone_us=blocks[op.piece] * costs.weight_grad_us))
        else:
            alone_us = costs.latency_us + near[op.piece] * costs.near_us
            left.append(_Left(alone_us=alone_us, far_us=far[op.piece] * costs.far_us))
    return _run([op.kind.lane for op in schedule.ops], [op.after for op in schedule.ops], left)


@dataclass
class _Left:
    """What is left of an op: time of its own, then time on the shared link."""

    alone_us: float
    far_us: float = 0.0

    def step_us(self, num_on_link: int) -> float:
        """How long until this op's next event."""
        return self.alone_us if self.alone_us > EPSILON_US else self.far_us * num_on_link

    def is_on_link(self) -> bool:
        return self.alone_us <= EPSILON_US and self.far_us > EPSILON_US

    def advance(self, by_us: float, num_on_link: int) -> None:
        if self.alone_us > EPSILON_US:
            self.alone_us -= by_us
        else:
            self.far_us -= by_us / num_on_link

    def is_done(self) -> bool:
        return self.alone_us <= EPSILON_US and self.far_us <= EPSILON_US


def _run(lanes: Sequence[str], afters: Sequence[Iterable[int]], left: Sequence[_Left]) -> float:
    waiting = {lane: [i for i, other in enumerate(lanes) if other == lane] for lane in dict.fromkeys(lanes)}
    done: set[int] = set()
    now_us = 0.0
    while any(waiting.values()):
        heads = [queue[0] for queue in waiting.values() if queue and done.issuperset(afters[queue[0]])]
        finished = [i for i in heads if left[i].is_done()]
        if not finished:
            num_on_link = max(sum(left[i].is_on_link() for i in heads), 1)
            step_us = min(left[i].step_us(num_on_link) for i in heads)
            for i in heads:
                left[i].advance(step_us, num_on_link)
            now_us += step_us
            finished = [i for i in heads if left[i].is_done()]
        for i in finished:
            done.add(i)
            waiting[lanes[i]].remove(i)
    return now_us


def _rows(offsets: Sequence[tuple[int, int]], torus: Torus) -> float:
    """The share of all rows that goes to these offsets."""
    return len(offsets) / torus.size


def _share(offsets: Sequence[tuple[int, int]], torus: Torus, *, far: bool) -> float:
    """The share of the near rows that cross a wire, or of the far rows, that goes to these offsets."""
    of_kind = [offset for offset in torus.offsets() if offset != (0, 0) and is_far(offset, torus) == far]
    return sum(offset in of_kind for offset in offsets) / max(len(of_kind), 1)


def is_far(offset: tuple[int, int], torus: Torus) -> bool:
    """Whether rows at the offset leave the node; on one node all but the rank's own count as far."""
    return offset[0] != 0 if torus.num_nodes > 1 else offset != (0, 0)


def probe_pieces(torus: Torus, num_rows: int) -> tuple[Piece, Piece, Piece]:
    """What `Costs` is measured on: the near rows, the far rows, and about one far row a peer."""
    near = tuple(o for o in torus.offsets() if not is_far(o, torus))
    far = tuple(o for o in torus.offsets() if is_far(o, torus))
    return Piece(near), Piece(far), Piece(far, 0, max(num_rows // torus.size, 1))


def ranked(config: MoEConfig, torus: Torus, costs: Costs) -> list[tuple[float, Mapping[str, Any]]]:
    """(microseconds, knobs) of every candidate, the fastest first."""
    priced = [(price_us(dataclasses.replace(config, **knobs), torus, costs), knobs) for knobs in candidates(torus)]
    return sorted(priced, key=lambda item: item[0])
