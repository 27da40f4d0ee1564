"""Where ranks stand: which of them share experts, which replicate them, and which sit on one node.

Facts only: groups are lists of global ranks, no communicator is made here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ds_moe_ep.errors import TopologyError


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """The world as expert-parallel groups times expert-data-parallel groups, in each pipeline stage for itself.

    Groups hold consecutive ranks, as DeepSpeed lays them out; with `data_before_expert` (DeepSpeed's
    use_data_before_expert_parallel) the ranks of a group are `stage_size / ep_size` apart. A stage holds consecutive
    ranks. Raises TopologyError where the sizes do not divide each other.
    """

    world_size: int
    ep_size: int
    data_before_expert: bool = False
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.num_stages > 1:
            self._check_stages()
        if self.ep_size > self.world_size:
            raise TopologyError(
                f"moe_ep.ep_size={self.ep_size}: the world has only {self.world_size} ranks; start "
                f"{self.ep_size} processes or lower ep_size"
            )
        if self.world_size % self.ep_size:
            raise TopologyError(
                f"moe_ep.ep_size={self.ep_size} does not divide the world of {self.world_size} ranks: start a "
                "multiple of ep_size processes or choose an ep_size that divides them"
            )

    def _check_stages(self) -> None:
        if self.world_size % self.num_stages:
            raise TopologyError(
                f"pipeline stages={self.num_stages} do not divide the world of {self.world_size} ranks: start a "
                "multiple of them"
            )
        if self.stage_size % self.ep_size:
            raise TopologyError(
                f"moe_ep.ep_size={self.ep_size} does not divide the {self.stage_size} ranks of a pipeline stage: "
                "expert groups lie inside of stages; choose an ep_size that divides them, or fewer stages"
            )

    @property
    def stage_size(self) -> int:
        """Number of ranks of one pipeline stage."""
        return self.world_size // self.num_stages

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.stage_size // self.ep_size

    def ep_groups(self) -> list[list[int]]:
        """Groups of ranks that together hold all experts of a stage; they partition the world."""
        return [group for stage in self._stages() for group in self._ep_groups_of(stage)]

    def expert_data_groups(self) -> list[list[int]]:
        """Groups of ranks that hold the same experts; they partition the world."""
        return [list(ranks) for stage in self._stages() for ranks in zip(*self._ep_groups_of(stage), strict=True)]

    def ep_rank(self, rank: int) -> int:
        """The place of a global rank in its expert-parallel group: it holds the experts of that place."""
        place = rank % self.stage_size
        return place // self.num_replicas if self.data_before_expert else place % self.ep_size

    def _stages(self) -> list[range]:
        return [range(first, first + self.stage_size) for first in range(0, self.world_size, self.stage_size)]

    def _ep_groups_of(self, stage: range) -> list[list[int]]:
        if self.data_before_expert:
            return [list(stage[i :: self.num_replicas]) for i in range(self.num_replicas)]
        return [list(stage[i : i + self.ep_size]) for i in range(0, len(stage), self.ep_size)]


def ranks_per_node(group: Sequence[int], node_size: int) -> int:
    """Number of consecutive members of `group` that share a node; 1 where nodes hold unequal shares of it.

    `node_size` is the number of global ranks on one node; 0 means that all ranks share one.
    """
    return even_share([rank // node_size for rank in group]) if node_size > 0 else len(group)


def even_share(nodes: Sequence[Hashable]) -> int:
    """Number of consecutive entries of each node, given the node of every rank; 1 where shares are unequal."""
    share = nodes.count(nodes[0])
    regular = all(nodes[i] == nodes[i - i % share] for i in range(len(nodes)))
    even = all(nodes.count(node) == share for node in nodes)
    return share if regular and even else 1


@dataclass(frozen=True)
class Torus:
    """The ranks of one group as a torus of (node, place on the node); offsets add modulo its sides.

    Every rank meets each offset once, so a schedule written in offsets is the same on every rank: at an offset a
    rank sends to `peer(rank, offset)` and receives from `peer(rank, -offset)`.
    """

    num_nodes: int
    node_size: int

    @property
    def size(self) -> int:
        return self.num_nodes * self.node_size

    def offsets(self) -> list[tuple[int, int]]:
        """All offsets, the rank's own, (0, 0), first."""
        return [(node, place) for node in range(self.num_nodes) for place in range(self.node_size)]

    def target(self, rank: int, offset: tuple[int, int]) -> int:
        """The rank that receives what `rank` sends at `offset`."""
        return self._shift(rank, offset[0], offset[1])

    def source(self, rank: int, offset: tuple[int, int]) -> int:
        """The rank whose rows reach `rank` at `offset`."""
        return self._shift(rank, -offset[0], -offset[1])

    def relay(self, source: int, target: int) -> int:
        """The rank on the target's node that has the source's place there."""
        return target - target % self.node_size + source % self.node_size

    def _shift(self, rank: int, nodes: int, places: int) -> int:
        node, place = divmod(rank, self.node_size)
        return (node + nodes) % self.num_nodes * self.node_size + (place + places) % self.node_size


def torus_of(group: Sequence[int], node_size: int) -> Torus:
    """The torus of an expert-parallel group of global ranks on nodes of `node_size` ranks."""
    share = ranks_per_node(group, node_size)
    return Torus(len(group) // share, share)
