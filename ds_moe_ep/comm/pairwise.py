"""Rows move by grouped isend/irecv (the specification's ncclSend/ncclRecv, section 3.2)."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm import nccl
from ds_moe_ep.comm.group_transport import SHORT, Bytes, GroupTransport
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.transport import CutMessages, Done, Message, Transfer
from ds_moe_ep.health.abort import CLOSING_TAG
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


class Works:
    """Handles of one transfer's messages: those that come, then those that go."""

    def __init__(
        self,
        transport: GroupTransport,
        place: Place,
        works: Sequence[dist.Work],
        receives: Sequence[Message],
        sends: Sequence[Message],
        *,
        is_on_host: bool,
    ) -> None:
        self._transport, self._place = transport, place
        self._works, self._receives, self._sends = works, receives, sends
        self._is_on_host = is_on_host

    def wait(self) -> None:
        transport, place = self._transport, self._place
        transport.watch.enters(place)
        number = 0
        try:
            if not self._is_on_host:
                for work in self._works:
                    work.wait()
                return
            messages = (*self._receives, *self._sends)
            for number, work in enumerate(self._works):
                place.waits_for = (transport.ranks[messages[number].peer],)
                work.wait(transport.time_left(place))
        except RuntimeError as error:
            raise transport.failure(place, error, self._owed(number)) from error
        finally:
            transport.watch.leaves()

    def _owed(self, number: int) -> Bytes:
        """The messages that are not done, the one with this number among them."""
        receives, sends = self._receives, self._sends
        if self._is_on_host:
            messages = (*receives, *sends)
            open_ = {i for i in range(number, len(messages)) if i == number or not _is_done(self._works[i])}
            receives = [message for i, message in enumerate(receives) if i in open_]
            sends = [message for i, message in enumerate(sends, start=len(self._receives)) if i in open_]
        rank = self._transport.rank
        return Bytes.of([m for m in receives if m.peer != rank], [m for m in sends if m.peer != rank])


def _is_done(work: dist.Work) -> bool:
    """True where gloo finished a message, asked after another one failed: asking closes the connections."""
    try:
        work.wait(SHORT)
    except RuntimeError:
        return False
    return True


class Pairwise(GroupTransport):
    """One message per peer and transfer, both directions grouped on the lane's communicator."""

    def __init__(self, groups: LaneGroups, timeout_s: float) -> None:
        super().__init__(groups, timeout_s)
        self._backends: dict[str, Any] = {}  # of NCCL, by lane

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        place = self.begin(tags, lane)
        if isinstance(sends, CutMessages) and isinstance(receives, CutMessages):
            return self._start_cut(lane, place, sends, receives)
        sends, receives = self.keep_own(sends, receives)
        if not sends and not receives:
            return Done()
        group = self.groups.lanes[lane]
        is_on_host = not (sends or receives)[0].buffer_RD.is_cuda
        try:
            if is_on_host:
                works = _start_on_host(group, sends, receives, _wire_tag(tags))
            else:
                works = nccl.exchange(group, *_apart(sends), *_apart(receives))
        except RuntimeError as error:  # a connection is closed already, or the communicator aborted
            raise self.failure(place, error, Bytes.of(receives, sends)) from error
        return Works(self, place, works, receives, sends, is_on_host=is_on_host)

    def _start_cut(self, lane: str, place: Place, sends: CutMessages, receives: CutMessages) -> Transfer:
        """The same on CUDA, where the host's time is what a pass may be short of."""
        sent, received = sends.views.parts, receives.views.parts
        for staying, kept in zip(sends.own, receives.own, strict=True):
            received[kept].copy_(sent[staying])
        if not sends.others and not receives.others:
            return Done()
        group, backend = self.groups.lanes[lane], self._backends.get(lane)
        if backend is None:
            backend = self._backends[lane] = group._get_backend(sends.buffer_RD.device)
        try:
            works = nccl.exchange(group, sent, sends.others, received, receives.others, backend)
        except RuntimeError as error:
            raise self.failure(place, error, Bytes.of(receives, sends)) from error
        return Works(self, place, works, receives, sends, is_on_host=False)


def _apart(messages: Sequence[Message]) -> tuple[list[Tensor], nccl.Ends]:
    """The rows of each message, and their places and peers."""
    return [message.rows for message in messages], [(place, each.peer) for place, each in enumerate(messages)]


@functools.lru_cache(maxsize=4096)
def _wire_tag(tags: Tags) -> int:
    """A number that ranks in the same place share: rows of another layer or pass never match on the wire."""
    return zlib.crc32(f"{tags.layer} {tags.phase} {tags.peers}".encode()) % CLOSING_TAG


def _start_on_host(
    group: dist.ProcessGroup, sends: Sequence[Message], receives: Sequence[Message], tag: int
) -> Sequence[dist.Work]:
    """The same without the wrappers, whose checks would cost the processor as much as the messages do."""
    received = [group.recv([message.rows], message.peer, tag) for message in receives]
    return [*received, *(group.send([message.rows], message.peer, tag) for message in sends)]
