"""Rows move by all-to-all with uneven splits: the field's usual exchange.

Where a transfer's rows lie side by side in the order of their peers, as they do when everything moves at once, they
are sent from their places and received into them; else they go through buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.group_transport import GroupTransport, wait_for
from ds_moe_ep.comm.transport import Done, Message, Transfer


class Exchange:
    """An all-to-all on its way; `wait` hands the received rows to their places, where they are not there already."""

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
            message.rows.copy_(received[start : start + len(message)])
            start += len(message)
        del self._buffers


class Collective(GroupTransport):
    """One all-to-all a transfer; peers that are not in it get zero rows."""

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        if all(message.peer == self.rank for message in sends):
            self.keep_own(sends, receives)
            return Done()
        sends, receives = (sorted(messages, key=lambda m: m.peer) for messages in (sends, receives))
        sent, received = side_by_side(sends), side_by_side(receives)
        if sent is None:
            sent = torch.cat([message.rows for message in sends])
        elsewhere = () if received is not None else receives
        if received is None:
            received = sent.new_empty(sum(map(len, receives)), sent.shape[1])
        work = dist.all_to_all_single(
            received,
            sent,
            self._splits(receives),
            self._splits(sends),
            group=self._groups.lanes[lane],
            async_op=True,
        )
        what = f"{lane} all-to-all of rank {self.rank} of the expert-parallel group"
        return Exchange(work, (sent, received), elsewhere, what, self.limit(sent))

    def _splits(self, messages: Sequence[Message]) -> list[int]:
        splits = [0] * self.size
        for message in messages:
            splits[message.peer] = len(message)
        return splits


def side_by_side(messages: Sequence[Message]) -> Tensor | None:
    """The rows of all messages as one view, or None where they do not follow each other in one buffer."""
    filled = [message for message in messages if len(message)] or [messages[0]]
    first, last = filled[0], filled[-1]
    if any(a.buffer_RD is not b.buffer_RD or a.stop != b.start for a, b in pairwise(filled)):
        return None
    return first.buffer_RD[first.start : last.stop]
