"""Rows move by all-to-all with uneven splits: the field's usual exchange, kept for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.group_transport import GroupTransport, wait_for
from ds_moe_ep.comm.transport import Done, Message, Transfer


class Exchange:
    """An all-to-all on its way; `wait` hands the received rows to their places."""

    def __init__(
        self,
        work: dist.Work,
        buffers: tuple[Tensor, Tensor],
        receives: Sequence[Message],
        what: str,
        timeout: timedelta | None,
    ) -> None:
        self._work = work
        self._buffers = buffers
        self._receives = receives
        self._what = what
        self._timeout = timeout

    def wait(self) -> None:
        wait_for(self._work, self._what, self._timeout)
        _, received = self._buffers
        start = 0
        for message in self._receives:
            message.rows.copy_(received[start : start + len(message.rows)])
            start += len(message.rows)
        del self._buffers


class Collective(GroupTransport):
    """One all-to-all a transfer, through contiguous buffers; peers that are not in it get zero rows."""

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        if not sends:
            return Done()
        sends, receives = (sorted(messages, key=lambda m: m.peer) for messages in (sends, receives))
        sent = torch.cat([message.rows for message in sends])
        received = sent.new_empty(sum(len(message.rows) for message in receives), sent.shape[1])
        work = dist.all_to_all_single(
            received,
            sent,
            self._splits(receives),
            self._splits(sends),
            group=self._groups.lanes[lane],
            async_op=True,
        )
        what = f"{lane} all-to-all of rank {self.rank} of the expert-parallel group"
        return Exchange(work, (sent, received), receives, what, self.limit(sent))

    def _splits(self, messages: Sequence[Message]) -> list[int]:
        splits = [0] * self.size
        for message in messages:
            splits[message.peer] = len(message.rows)
        return splits
