"""Communicators of expert-parallel groups, made once and handed to layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm import nccl
from ds_moe_ep.comm.transport import CONTROL, LANES, NEAR_LANES, REPLICAS, Answer
from ds_moe_ep.errors import EngineError, TopologyError
from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.watch import Watch, open_watch

CONSULT_TAG = 1  # of the messages of `consult`

Left = Callable[[], timedelta]  # until the time limit


@dataclass(frozen=True)
class LaneGroups:
    """A process group per lane and one for control, over the same ranks in the same order, with guard and watch."""

    rank: int
    ranks: tuple[int, ...]
    lanes: Mapping[str, dist.ProcessGroup]
    guard: AbortGuard
    watch: Watch

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange_counts(self, counts_PC: Tensor) -> Tensor:
        """The transpose of the counts over ranks: row p goes to rank p. Collective, blocks no host on CUDA."""
        received = torch.empty_like(counts_PC)
        # torch.distributed's function around it costs as much as the call.
        self.lanes[CONTROL].alltoall_base(received, counts_PC.contiguous(), [], []).wait()
        return received

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer) -> Callable[[Left], Tensor]:
        """Starts to tell the first rank; returns what waits for its answer. Collective, see the transport's."""
        group, num_columns = self.lanes[CONTROL], len(told_C)
        if self.rank:
            answered_A = told_C.new_empty(num_answered)
            works = [group.recv([answered_A], 0, CONSULT_TAG), group.send([told_C], 0, CONSULT_TAG)]

            def finish(left: Left) -> Tensor:
                for work in works:
                    work.wait(left())
                return answered_A

            return finish
        told_PC = told_C.new_empty(self.size, num_columns)
        told_PC[0] = told_C
        receives = [group.recv([rows], peer, CONSULT_TAG) for peer, rows in enumerate(told_PC[1:].unbind(0), start=1)]

        def finish_first(left: Left) -> Tensor:
            for receive in receives:
                receive.wait(left())
            answered_PA = answer(told_PC)
            answered = answered_PA.unbind(0)
            sends = [group.send([answered[peer]], peer, CONSULT_TAG) for peer in range(1, self.size)]
            for send in sends:
                send.wait(left())
            return answered[0]

        return finish_first

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the group. Collective."""
        total = values.clone()
        dist.all_reduce(total, group=self.lanes[CONTROL])
        return total


def open_lanes(
    groups: Sequence[Sequence[int]],
    timeout_s: float,
    watch: Watch | None = None,
    max_ctas: int = 0,
    with_replicas: bool = False,
    with_near: bool = False,
) -> LaneGroups:
    """New communicators for every group of global ranks; returns those of this rank's own group.

    Without a watch of the caller's they get one of their own. `with_replicas` adds one for replicated experts,
    `with_near` those of two-level dispatch.

    Collective over the world: every rank passes the same groups, which partition the world. Raises EngineError
    before torch.distributed is up, and TopologyError on every rank where the groups are no partition.
    """
    if not dist.is_initialized():
        raise EngineError(
            "torch.distributed is not initialized: expert parallelism over several ranks needs process groups; "
            "call deepspeed.init_distributed() or deepspeed.initialize() first"
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if sorted(member for group in groups for member in group) != list(range(world_size)):
        raise TopologyError(
            f"groups={[list(group) for group in groups]}: every rank from 0 to {world_size - 1} must stand in one "
            "expert-parallel group; RankGrid(...).ep_groups() makes such groups"
        )
    mine = next(tuple(group) for group in groups if rank in group)
    timeout, is_on_nccl = timedelta(seconds=timeout_s), dist.get_backend() == "nccl"
    lanes: dict[str, dist.ProcessGroup] = {}
    pairwise = (*LANES, *(NEAR_LANES if with_near else ()), *((REPLICAS,) if with_replicas else ()))
    for lane in (*pairwise, CONTROL):
        for group in groups:
            options = nccl.lane_options(timeout, max_ctas if lane in pairwise else 0) if is_on_nccl else None
            made = dist.new_group(list(group), timeout=timeout, pg_options=options)
            if rank in group:
                lanes[lane] = made
    for lane_group in lanes.values():  # later transfers may leave some ranks out
        if is_on_nccl:
            device = torch.device("cuda", torch.cuda.current_device())
            nccl.connect_pairs(lane_group, mine.index(rank), len(mine), device)
        else:
            dist.barrier(group=lane_group)
    if is_on_nccl:
        torch.cuda.synchronize()  # a link that does not come up is told of here, and not by the first pass
    guard = AbortGuard(mine.index(rank), mine, lanes.values())
    watch = watch or open_watch(timeout_s)
    watch.guards(guard)
    return LaneGroups(mine.index(rank), mine, lanes, guard, watch)
