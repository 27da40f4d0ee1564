"""A cluster as the resources of `events.run`, for one rank that stands for all or for each rank of an expert group.

One rank that stands for all has an equal share of what its node shares: where routing is even, all ranks do the same at
the same moment. Ranks with different loads are all there, and share their nodes' links and the host's cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import Load
from ds_moe_ep.simulate.cluster.cluster import Cluster, Link

CORES = 0  # the host's cores; behind it two resources of each link


@dataclass(frozen=True)
class Ways:
    """Resources of one rank's links, one per direction."""

    near_out: int
    near_in: int
    far_out: int
    far_in: int


@dataclass(frozen=True)
class Volume:
    """Traffic of one rank in one transfer: bytes to and from its node's ranks and to others, and messages sent."""

    near_out: float = 0.0
    near_in: float = 0.0
    far_out: float = 0.0
    far_in: float = 0.0
    near_messages: int = 0
    far_messages: int = 0
    is_joint: bool = False  # one all-to-all of all ranks, whose messages cost a host less

    @property
    def messages(self) -> int:
        """Messages that the rank sends in all."""
        return self.near_messages + self.far_messages

    @property
    def back(self) -> Volume:
        """The same rows on their way back."""
        return replace(self, near_out=self.near_in, near_in=self.near_out, far_out=self.far_in, far_in=self.far_out)


@dataclass(frozen=True)
class Machine:
    """Capacities, and the resources of each rank that is simulated."""

    cluster: Cluster
    capacities: tuple[float, ...]
    ways: tuple[Ways, ...]
    share: float = 1.0  # what a rank that stands for all has of its far link, over an equal part

    @property
    def num_actors(self) -> int:
        """Ranks that are simulated: one, or each of a group."""
        return len(self.ways)

    @property
    def in_flight(self) -> int:
        """Transfers of one lane that are on their way at once: two threads serve a lane on a host."""
        return 2 if self.cluster.host.cores else 1

    def compute(self, time_us: float) -> Phase:
        """A rank's device at work, or one thread of it on the host's cores."""
        return Phase(time_us, uses=((CORES, 1.0),)) if self.cluster.computes_on == "host" else Phase(time_us)

    def host(self, core_us: float) -> tuple[Phase, ...]:
        """Work of the host for one rank; nothing where hosts are left out."""
        return (Phase(core_us, uses=((CORES, 1.0),)),) if self.cluster.host.cores and core_us > 0 else ()

    def transfer(self, actor: int, volume: Volume) -> Load:
        """Phases of a transfer: the host's messages, then rows of both kinds side by side, then their latency.

        host   transfer_us before; messages * (collective_us or pairwise_us) + bytes * byte_us beside the rows
        link   bytes at the fair share of what it moves; the longer latency_us + (messages - 1) * message_us behind them
        """
        host, ways = self.cluster.host, self.ways[actor]
        if not volume.messages:
            return Load()
        message_us = host.collective_us if volume.is_joint else host.pairwise_us
        near = _flow(((ways.near_out, volume.near_out), (ways.near_in, volume.near_in)), self.num_actors)
        far = _flow(((ways.far_out, volume.far_out), (ways.far_in, volume.far_in)), self.num_actors, self.share)
        posts = self.host(volume.messages * message_us + (volume.near_out + volume.far_out) * host.byte_us)
        delay_us = max(
            _latency_us(self.cluster.near, volume.near_messages), _latency_us(self.cluster.far, volume.far_messages)
        )
        return Load(self.host(host.transfer_us), (*near, *far, *((posts,) if posts else ())), delay_us)


def _flow(flows: Sequence[tuple[int, float]], num_actors: int, share: float = 1.0) -> list[tuple[Phase, ...]]:
    """Bytes over resources, those that leave and those that arrive.

    One rank that stands for all has `share` times an equal part of its link for the larger number, and an equal part
    for the smaller one, which its node's ranks have as well. Equal numbers flow side by side: one counts.
    """
    uses = [1.0, 1.0]
    if num_actors == 1:
        (_, leaving), (_, arriving) = flows
        flows = flows[:1] if leaving == arriving else flows
        uses = [share if num_bytes < max(leaving, arriving) else 1.0 for _, num_bytes in flows]
    return [
        (Phase(num_bytes, math.inf, ((way, use),)),)
        for (way, num_bytes), use in zip(flows, uses, strict=True)
        if num_bytes > 0
    ]


def _latency_us(link: Link, messages: int) -> float:
    return link.latency_us + (messages - 1) * link.message_us if messages else 0.0


def machine_for_one(cluster: Cluster, share: float = 1.0) -> Machine:
    """One rank with its equal part of everything, and `share` times that of its far link where others need it less."""
    far = cluster.far.rate / cluster.far.shared_by
    near = cluster.near.rate / cluster.near.shared_by
    cores = cluster.host.cores / cluster.num_ranks
    return Machine(cluster, (cores, near, near, far * share, far * share), (Ways(1, 2, 3, 4),), share)


def machine_for_group(cluster: Cluster, torus: Torus) -> Machine:
    """Every rank of one expert group, which shares the host's cores with the other groups evenly."""
    capacities = [cluster.host.cores * torus.size / cluster.num_ranks]
    links: dict[tuple[str, int, int], int] = {}

    def out_and_in(kind: str, link: Link, rank: int) -> tuple[int, int]:
        """The rank's link; it brings its share of what the link moves, and other groups' ranks keep theirs."""
        node, place = divmod(rank, torus.node_size)
        key = (kind, node, int(place // link.shared_by))
        if key not in links:
            links[key] = len(capacities)
            capacities.extend((0.0, 0.0))
        for way in (links[key], links[key] + 1):
            capacities[way] += link.rate / link.shared_by
        return links[key], links[key] + 1

    ways = [
        Ways(*out_and_in("near", cluster.near, rank), *out_and_in("far", cluster.far, rank))
        for rank in range(torus.size)
    ]
    return Machine(cluster, tuple(capacities), tuple(ways))
