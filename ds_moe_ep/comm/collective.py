"""Rows move by all-to-all with uneven splits: the field's usual exchange.

Where a transfer's rows lie side by side in the order of their peers, as they do when everything moves at once, they
are sent from their places and received into them; else they go through buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.group_transport import Bytes, GroupTransport, wait_for
from ds_moe_ep.comm.transport import Done, Message, Transfer
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


class Exchange:
    """An all-to-all on its way; `wait` hands the received rows to their places, where they are not there already."""

    def __init__(
        self,
        transport: GroupTransport,
        place: Place,
        work: dist.Work,
        buffers: tuple[Tensor, Tensor],
        receives: Sequence[Message],
        owed: Callable[[], Bytes],
    ) -> None:
        self._transport, self._place, self._work = transport, place, work
        self._buffers = buffers
        self._receives = receives
        self._owed = owed

    def wait(self) -> None:
        transport, place = self._transport, self._place
        sent, received = self._buffers
        transport.watch.enters(place)
        try:
            wait_for(self._work, None if sent.is_cuda else transport.time_left(place))
        except RuntimeError as error:
            raise transport.failure(place, error, self._owed()) from error
        finally:
            transport.watch.leaves()
        start = 0
        for message in self._receives:
            message.rows.copy_(received[start : start + len(message)])
            start += len(message)
        del self._buffers


class Collective(GroupTransport):
    """One all-to-all per transfer; peers that are not in it get zero rows."""

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        place = self.begin(tags, lane)
        if all(message.peer == self.rank for message in sends):
            self.keep_own(sends, receives)
            return Done()
        sends, receives = sorted(sends, key=_peer_of), sorted(receives, key=_peer_of)
        place.waits_for = self.ranks_of_others if len(receives) == self.size else self._ranks_of(receives)
        sent, received = side_by_side(sends), side_by_side(receives)
        if sent is None:
            sent = torch.cat([message.rows for message in sends])
        elsewhere = () if received is not None else receives
        if received is None:
            received = sent.new_empty(sum(map(len, receives)), sent.shape[1])
        owed = partial(self._owed, receives, sends)
        try:
            # torch.distributed's function around it costs as much as the call.
            work = self.groups.lanes[lane].alltoall_base(received, sent, self._splits(receives), self._splits(sends))
        except RuntimeError as error:  # a connection is closed already
            raise self.failure(place, error, owed()) from error
        return Exchange(self, place, work, (sent, received), elsewhere, owed)

    def _owed(self, receives: Sequence[Message], sends: Sequence[Message]) -> Bytes:
        """All that is not this rank's own, from any rank: an all-to-all does not tell who holds it up."""
        receives, sends = ([m for m in messages if m.peer != self.rank] for messages in (receives, sends))
        return replace(Bytes.of(receives, sends), peers=self.others, is_joint=True)

    def _ranks_of(self, receives: Sequence[Message]) -> list[int]:
        return [self.ranks[message.peer] for message in receives if message.peer != self.rank]

    def _splits(self, messages: Sequence[Message]) -> list[int]:
        splits = [0] * self.size
        for message in messages:
            splits[message.peer] += message.stop - message.start  # a peer may have several, in one order at both ends
        return splits


_peer_of = attrgetter("peer")


def side_by_side(messages: Sequence[Message]) -> Tensor | None:
    """The rows of all messages as one view, or None where they do not follow each other in one buffer."""
    first, stop = messages[0], messages[0].start
    for message in messages:
        if message.start == message.stop:
            continue
        if first.start == stop:
            first, stop = message, message.start  # those before it are empty, wherever they lie
        if message.start != stop or message.buffer_RD is not first.buffer_RD:
            return None
        stop = message.stop
    return first.buffer_RD[first.start : stop]
