"""A cluster as the resources of `events.run`, for one rank that stands for all or for each rank of an expert group.

One rank that stands for all has an equal share of what its node shares: where routing is even, all ranks do the same at
the same moment. Ranks with different loads are all there, and share their nodes' links and the host's cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_moe_ep.events import Phase
from ds_moe_ep.program import Load
from ds_moe_ep.simulate.cluster import Cluster, Link
from ds_moe_ep.topology import Torus

CORES = 0  # the host's cores; behind it four resources a rank, of which ranks on one far link share two


@dataclass(frozen=True)
class Ways:
    """Resources of one rank's links, one a direction."""

    near_out: int
    near_in: int
    far_out: int
    far_in: int


@dataclass(frozen=True)
class Volume:
    """What one rank sends and receives in one transfer: bytes to its node's ranks and to others, and messages sent."""

    near_out: float = 0.0
    near_in: float = 0.0
    far_out: float = 0.0
    far_in: float = 0.0
    near_messages: int = 0
    far_messages: int = 0
    is_joint: bool = False  # one all-to-all of all ranks, whose messages cost a host less

    @property
    def messages(self) -> int:
        return self.near_messages + self.far_messages


@dataclass(frozen=True)
class Machine:
    """Capacities, and the resources of each rank that is simulated."""

    cluster: Cluster
    capacities: tuple[float, ...]
    ways: tuple[Ways, ...]

    @property
    def num_actors(self) -> int:
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
        """What a transfer takes: the host's messages, then rows of both kinds side by side, then their latency.

        host   transfer_us before; messages * (collective_us or pairwise_us) + bytes * byte_us beside the rows
        link   bytes at the fair share of what it moves; the longer latency_us + (messages - 1) * message_us behind them
        """
        host, ways = self.cluster.host, self.ways[actor]
        if not volume.messages:
            return Load()
        message_us = host.collective_us if volume.is_joint else host.pairwise_us
        near = _flow(((ways.near_out, volume.near_out), (ways.near_in, volume.near_in)), self.num_actors)
        far = _flow(((ways.far_out, volume.far_out), (ways.far_in, volume.far_in)), self.num_actors)
        posts = self.host(volume.messages * message_us + (volume.near_out + volume.far_out) * host.byte_us)
        delay_us = max(
            _latency_us(self.cluster.near, volume.near_messages), _latency_us(self.cluster.far, volume.far_messages)
        )
        return Load(self.host(host.transfer_us), (*near, *far, *((posts,) if posts else ())), delay_us)


def _flow(flows: Sequence[tuple[int, float]], num_actors: int) -> list[tuple[Phase, ...]]:
    """Bytes over resources, those that there are. For one rank they go side by side: the larger number counts."""
    if num_actors == 1:
        flows = [(flows[0][0], max(num_bytes for _, num_bytes in flows))]
    return [(Phase(num_bytes, math.inf, ((way, 1.0),)),) for way, num_bytes in flows if num_bytes > 0]


def _latency_us(link: Link, messages: int) -> float:
    return link.latency_us + (messages - 1) * link.message_us if messages else 0.0


def machine_for_one(cluster: Cluster) -> Machine:
    """One rank with its equal share of everything."""
    far = cluster.far.rate / cluster.far.shared_by
    near = cluster.near.rate / cluster.near.shared_by
    cores = cluster.host.cores / cluster.num_ranks
    return Machine(cluster, (cores, near, near, far, far), (Ways(1, 2, 3, 4),))


def machine_for_group(cluster: Cluster, torus: Torus) -> Machine:
    """Every rank of one expert group, which shares the host's cores with the other groups evenly."""
    share = torus.size / cluster.num_ranks
    capacities = [cluster.host.cores * share]
    ways, links = [], {}
    for rank in range(torus.size):
        node, place = divmod(rank, torus.node_size)
        link = (node, int(place // cluster.far.shared_by))
        if link not in links:
            links[link] = len(capacities)
            capacities += [cluster.far.rate, cluster.far.rate]
        capacities += [cluster.near.rate, cluster.near.rate]
        ways.append(Ways(len(capacities) - 2, len(capacities) - 1, links[link], links[link] + 1))
    return Machine(cluster, tuple(capacities), tuple(ways))
