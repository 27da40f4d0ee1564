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
        self.keep_own(sends, receives)
        sends, receives = ([m for m in messages if len(m) and m.peer != self.rank] for messages in (sends, receives))
        if not sends and not receives:
            return Done()
        peers = sorted({message.peer for message in (*sends, *receives)})
        what = f"{lane} between rank {self.rank} and ranks {peers} of the expert-parallel group"
        some_RD = (*sends, *receives)[0].buffer_RD
        start = _start_on_cuda if some_RD.is_cuda else _start_on_host
        return Works(start(group, sends, receives), what, self.limit(some_RD))


def _start_on_cuda(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]
) -> Sequence[dist.Work]:
    """All messages in one NCCL group: one kernel, in which no peer waits for another."""
    ops = [
        dist.P2POp(direction, message.rows, group=group, group_peer=message.peer)
        for direction, messages in ((dist.isend, sends), (dist.irecv, receives))
        for message in messages
    ]
    return dist.batch_isend_irecv(ops)


def _start_on_host(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message]
) -> Sequence[dist.Work]:
    """The same without the wrappers, whose checks would cost the processor as much as the messages do."""
    received = [group.recv([message.rows], message.peer, 0) for message in receives]
    return [*received, *(group.send([message.rows], message.peer, 0) for message in sends)]
