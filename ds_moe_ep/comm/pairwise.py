"""Rows move by grouped isend/irecv (the specification's ncclSend/ncclRecv, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.transport import Done, Message, Transfer
from ds_moe_ep.errors import EngineError


class Works:
    """Handles of one transfer's messages."""

    def __init__(self, works: Sequence[dist.Work], what: str, timeout_s: float) -> None:
        self._works = works
        self._what = what
        self._timeout = timedelta(seconds=timeout_s)

    def wait(self) -> None:
        for work in self._works:
            wait_for(work, self._what, self._timeout)


def wait_for(work: dist.Work, what: str, timeout: timedelta) -> None:
    """Waits for `work`. Raises EngineError, naming `what`, when it fails or takes longer than `timeout`."""
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise EngineError(
            f"{what} failed: {error}; a peer ended, stalled, or sent another size. Look for the first error of "
            "another rank; moe_ep.timeout_s sets the time limit"
        ) from error


class Pairwise:
    """One message a peer and transfer, both directions grouped on the lane's communicator."""

    def __init__(self, groups: LaneGroups, timeout_s: float) -> None:
        self.rank = groups.rank
        self.size = groups.size
        self._groups = groups
        self._timeout_s = timeout_s

    def exchange_counts(self, counts_PC: Tensor) -> Tensor:
        return self._groups.exchange_counts(counts_PC)

    def sum(self, values: Tensor) -> Tensor:
        return self._groups.sum(values)

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        group = self._groups.lanes[lane]
        ops = [
            dist.P2POp(direction, message.rows, group=group, group_peer=message.peer)
            for direction, messages in ((dist.isend, sends), (dist.irecv, receives))
            for message in messages
            if len(message.rows)
        ]
        if not ops:
            return Done()
        peers = sorted({message.peer for message in (*sends, *receives)})
        what = f"{lane} between rank {self.rank} and ranks {peers} of the expert-parallel group"
        return Works(dist.batch_isend_irecv(ops), what, self._timeout_s)
