"""Traffic of experts' copies in one step: weights to the slots, gradient sums home, on a lane of their own.

A home sends its expert's weights to each host by itself; gradient sums go home in the rounds of `schedule/way_home.py`,
one behind the other. Layers follow one another on the lane, and share the links with the rows of the pass that runs
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.placement import Placement
from ds_moe_ep.schedule.program import START, Event, Program
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.schedule.way_home import rounds_home
from ds_moe_ep.simulate.cluster.machine import Machine, Volume

LANE = "replicas"


@dataclass(frozen=True)
class CopyTraffic:
    """Traffic of a placement's copies in each layer."""

    placement: Placement
    torus: Torus
    machine: Machine
    weight_bytes: float
    gradient_bytes: float

    def send_weights(self, program: Program, layers: Sequence[str]) -> dict[str, Event]:
        """The events of each layer's weights in their slots, sent one layer after the other from the start on."""
        ready: dict[str, Event] = {}
        free: list[Event] = [START] * self.machine.num_actors
        for name in layers:
            done = []
            for actor, volume in enumerate(self.volumes):
                load = self.machine.transfer(actor, scaled(volume, self.weight_bytes))
                tags = Tags(name, "forward")
                free[actor], arrived = program.add_apart("weights of copies", actor, LANE, load, free[actor], tags)
                done.append(arrived)
            ready[name] = program.join(done)
        return ready

    def send_gradients(self, program: Program, after: Event, layer: str) -> Event:
        """The event of a layer's gradient sums at home."""
        tags = Tags(layer, "backward")
        for volumes in self.rounds_home:
            after = program.join(
                program.add(
                    "gradients of copies",
                    actor,
                    LANE,
                    self.machine.transfer(actor, scaled(volume, self.gradient_bytes)),
                    after,
                    tags,
                )
                for actor, volume in enumerate(volumes)
            )
        return after

    @cached_property
    def volumes(self) -> tuple[Volume, ...]:
        """Experts whose weights each simulated rank sends and receives."""
        return self._volumes([(self.placement.home(expert), rank) for expert, rank, _ in self.placement.copies])

    @cached_property
    def rounds_home(self) -> tuple[tuple[Volume, ...], ...]:
        """Experts whose gradient sums each simulated rank sends and receives, in each round."""
        copies = {(expert, rank): 1 for expert, rank, _ in self.placement.copies}
        rounds = rounds_home(copies, self.placement.home)
        return tuple(self._volumes([(move.source, move.target) for move in moves]) for moves in rounds)

    def _volumes(self, pairs: Sequence[tuple[int, int]]) -> tuple[Volume, ...]:
        """Experts by simulated rank, of pairs (source, target); one that stands for all is the one that moves most."""
        found = [Volume()] * self.torus.size
        for source, target in pairs:
            is_near = source // self.torus.node_size == target // self.torus.node_size
            mine, its = found[source], found[target]
            if is_near:
                found[source] = replace(mine, near_out=mine.near_out + 1, near_messages=mine.near_messages + 1)
                found[target] = replace(its, near_in=its.near_in + 1, near_messages=max(its.near_messages, 1))
            else:
                found[source] = replace(mine, far_out=mine.far_out + 1, far_messages=mine.far_messages + 1)
                found[target] = replace(its, far_in=its.far_in + 1, far_messages=max(its.far_messages, 1))
        if self.machine.num_actors == 1:
            return (max(found, key=lambda v: (max(v.far_out, v.far_in), max(v.near_out, v.near_in))),)
        return tuple(found)


def scaled(volume: Volume, num_bytes: float) -> Volume:
    """A volume of experts in bytes."""
    return replace(
        volume,
        near_out=volume.near_out * num_bytes,
        near_in=volume.near_in * num_bytes,
        far_out=volume.far_out * num_bytes,
        far_in=volume.far_in * num_bytes,
    )
