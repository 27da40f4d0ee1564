"""All-reduces, gathers and messages of groups of ranks: which links they cross, and how long they take.

P ranks of a group on N nodes, M of them on each; u bytes of the whole tensor; near and far: bytes per microsecond that
leave a device inside of its node, and that the group moves out of a node. All ranks of a group do the same at the same
moment, and so do the groups beside it, with which it shares the links.

1. Gloo moves a tensor in one ring, so one rank of a node sends to the next node, over one link. NCCL looks for a ring,
   or a tree, for each link of a node, so that far is the sum of the links (graph/search.cc).
2. However it is done, 2*(P - 1)/P*u bytes leave a device by all of its links, and 2*(N - 1)/N*u leave a node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import Load
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.cluster.machine import CORES
from ds_moe_ep.simulate.step.setup import Algorithm

SEGMENTS = 2  # messages of each step of gloo's ring, so that one is added while the other moves (gloo/allreduce.cc)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that reduce together: `size` of them on `num_nodes` nodes, and the rates that they have there.

    `near` and `far` as above; infinite where the group does not use such links.
    """

    size: int
    num_nodes: int
    near: float
    far: float
    near_latency_us: float
    far_latency_us: float

    @property
    def node_size(self) -> int:
        """Ranks of the group on one node."""
        return -(-self.size // self.num_nodes)

    @property
    def ring(self) -> float:
        """Bytes per microsecond that a ring over all ranks moves past each of them."""
        return min(self.near, self.far)

    def hops_us(self, num_hops: int, num_far: int) -> float:
        """The latencies of messages one after the other, `num_far` of them to another node."""
        return (num_hops - num_far) * self.near_latency_us + num_far * self.far_latency_us


def group_of(cluster: Cluster, size: int, stride: int = 1) -> Group:
    """The groups into which all ranks fall: `size` ranks each, `stride` apart.

    DeepSpeed numbers the ranks of a layout by (stage, copy, tensor): a tensor group has stride 1, the copies of a stage
    have stride tp_size.
    """
    ranks = range(cluster.num_ranks // size * size)
    places = Counter((rank // cluster.node_size, rank // (size * stride) * stride + rank % stride) for rank in ranks)
    nodes_of = Counter(group for _, group in places)
    num_nodes = max(nodes_of.values(), default=1)
    crossing = {place: count for place, count in places.items() if nodes_of[place[1]] > 1}
    groups_of_node = max(Counter(node for node, _ in crossing).values(), default=1)
    links_of_node = cluster.node_size / cluster.far.shared_by
    links = max(min(crossing.values(), default=1) / cluster.far.shared_by, 1.0)  # beside the group's ranks
    streams = min(1.0 if has_one_ring(cluster) else links, links_of_node / groups_of_node)
    return Group(
        size=size,
        num_nodes=num_nodes,
        near=_near(cluster) if size > num_nodes else math.inf,
        far=cluster.far.rate * streams if num_nodes > 1 else math.inf,
        near_latency_us=cluster.near.latency_us,
        far_latency_us=cluster.far.latency_us,
    )


def _near(cluster: Cluster) -> float:
    return cluster.near.rate / cluster.near.shared_by


def has_one_ring(cluster: Cluster) -> bool:
    """True where messages cost a host its cores, as gloo's do; a cluster without such a host has NCCL."""
    return cluster.host.cores > 0


def ring_us(group: Group, num_bytes: float) -> float:
    """2*(P - 1)/P*u/min(near, far) + 2*(P - N) near and 2*(N - 1) far latencies.

    A reduce-scatter and an all-gather (Patarasu, Yuan, 2009); latencies as NCCL counts them (graph/tuning.cc).
    """
    return 2 * gather_us(group, num_bytes)


def gather_us(group: Group, num_bytes: float) -> float:
    """Half a ring all-reduce: an all-gather that ends, or a reduce-scatter that begins, with u bytes per rank."""
    P, N = group.size, group.num_nodes
    return group.hops_us(P - 1, N - 1) + (P - 1) / P * num_bytes / group.ring


def tree_us(group: Group, num_bytes: float) -> float:
    """The slower of 2*u/near and 2*u/far (u where there are but two), + 2*(M - 1) near and 2*log2(N) far latencies.

    Two trees that carry half of the tensor each: a node that is inner in one is a leaf of the other and sends u up and
    u down, of two nodes each u/2 up and u/2 down; in a node the tree is a chain (Sanders, Speck, Traeff, 2009; NCCL).
    """
    if group.size < 2:
        return 0.0
    M, N = group.node_size, group.num_nodes
    depth = math.ceil(math.log2(N))
    latency_us = 2 * group.hops_us(M - 1 + depth, depth)
    near_us = (1 if M == 2 and N == 1 else 2) * num_bytes / group.near
    return latency_us + max(near_us, (1 if N == 2 else 2) * num_bytes / group.far)


def levels_us(group: Group, num_bytes: float) -> float:
    """2*(M - 1)/M*u/near + 2*(N - 1)/N*u/far: a reduce-scatter in the node, all-reduces over nodes, an all-gather.

    No transport of torch does so by itself; DeepSpeed and Megatron do not either.
    """
    if group.size < 2:
        return 0.0
    M, N = group.node_size, group.num_nodes
    wire_us = 2 * (M - 1) / M * num_bytes / group.near + 2 * (N - 1) / N * num_bytes / group.far
    return wire_us + 2 * group.hops_us(M - 1 + N - 1, N - 1)


WAYS: Mapping[str, Callable[[Group, float], float]] = {"ring": ring_us, "tree": tree_us, "levels": levels_us}


def all_reduce_us(cluster: Cluster, group: Group, num_bytes: float, algorithm: Algorithm = "auto") -> float:
    """An all-reduce of u bytes per rank; "auto" is the ring on gloo, which has no other, and NCCL's faster one."""
    if group.size < 2:
        return 0.0
    if algorithm != "auto":
        return WAYS[algorithm](group, num_bytes)
    if has_one_ring(cluster):
        return ring_us(group, num_bytes)
    return min(ring_us(group, num_bytes), tree_us(group, num_bytes))


def broadcasts_us(group: Group, num_bytes: float) -> float:
    """A tensor whose P parts, of unequal size, are broadcast one after the other: P*(P - 1) hops, u/min(near, far)."""
    P, N = group.size, group.num_nodes
    return (P * group.hops_us(P - 1, N - 1) + num_bytes / group.ring) if P > 1 else 0.0


def send_us(cluster: Cluster, num_bytes: float, senders: range, distance: int) -> float:
    """Each sender sends u bytes to the rank `distance` further on: latency + u/rate, over the link that is busiest."""
    node = cluster.node_size
    leaving = [rank // node for rank in senders if (rank + distance) // node != rank // node]
    if not leaving:
        return cluster.near.latency_us + num_bytes / _near(cluster)
    busiest = max(leaving.count(index) for index in set(leaving))
    links = node / cluster.far.shared_by
    return cluster.far.latency_us + num_bytes / (cluster.far.rate * min(1.0, links / busiest))


def all_reduce_load(
    cluster: Cluster, group: Group, num_bytes: float, num_ranks: int, algorithm: Algorithm = "auto"
) -> Load:
    """An all-reduce, with what it costs the host for `num_ranks` ranks at the same moment."""
    wire_us = all_reduce_us(cluster, group, num_bytes, algorithm)
    return _collective(cluster, group, wire_us, 2 * num_bytes, 2, num_ranks)


def gather_load(cluster: Cluster, group: Group, num_bytes: float, num_ranks: int) -> Load:
    """An all-gather or a reduce-scatter, with what it costs the host."""
    return _collective(cluster, group, gather_us(group, num_bytes), num_bytes, 1, num_ranks)


def broadcasts_load(cluster: Cluster, group: Group, num_bytes: float, num_ranks: int) -> Load:
    """The broadcasts of unequal parts, with what they cost the host."""
    return _collective(cluster, group, broadcasts_us(group, num_bytes), num_bytes, group.size, num_ranks)


def _collective(cluster: Cluster, group: Group, wire_us: float, num_bytes: float, rounds: int, num_ranks: int) -> Load:
    if group.size < 2:
        return Load()
    core_us = rounds * (group.size - 1) * SEGMENTS * cluster.host.collective_us
    return host_load(cluster, wire_us, core_us, num_bytes * (group.size - 1) / group.size, num_ranks)


def host_load(cluster: Cluster, wire_us: float, core_us: float, num_bytes: float, num_ranks: int) -> Load:
    """First the messages of `num_ranks` ranks, `core_us` each, on the host's cores, then the wire beside the bytes."""
    host = cluster.host
    if not host.cores:
        return Load((Phase(wire_us),))
    first = on_host(host.transfer_us + core_us, num_ranks)
    return Load((first,), ((Phase(wire_us),), (on_host(host.byte_us * num_bytes, num_ranks),)))


def on_host(core_us: float, num_ranks: int) -> Phase:
    """Share of a core for each of `num_ranks` ranks, all at the same moment."""
    return Phase(num_ranks * core_us, float(num_ranks), ((CORES, 1.0),))
