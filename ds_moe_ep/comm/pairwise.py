"""Rows move by grouped isend/irecv (the specification's ncclSend/ncclRecv, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ds_moe_ep.comm.group_transport import GroupTransport, wait_for
from ds_moe_ep.comm.transport import Done, Message, Transfer


class Works:
    """Handles of one transfer's messages."""

    def __init__(self, works: Sequence[dist.Work], what: str, timeout: timedelta | None) -> None:
        self._works = works
        self._what = what
        self._timeout = timeout

    def wait(self) -> None:
        for work in self._works:
            wait_for(work, self._what, self._timeout)


class Pairwise(GroupTransport):
    """One message a peer and transfer, both directions grouped on the lane's communicator."""

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
        return Works(dist.batch_isend_irecv(ops), what, self.limit(ops[0].tensor))
