"""Rows move by grouped isend/irecv (the specification's ncclSend/ncclRecv, section 3.2)."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import torch.distributed as dist

from ds_moe_ep.comm import nccl
from ds_moe_ep.comm.group_transport import SHORT, Bytes, GroupTransport
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

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        place = self.begin(tags, lane)
        group = self.groups.lanes[lane]
        if isinstance(sends, CutMessages) and isinstance(receives, CutMessages) and sends.buffer_RD.is_cuda:
            return self._start_cut(group, place, sends, receives)
        sends, receives = self.keep_own(sends, receives)
        if not sends and not receives:
            return Done()
        is_on_host = not (sends or receives)[0].buffer_RD.is_cuda
        if not is_on_host:
            works: Sequence[dist.Work] = nccl.exchange(group, _ends(sends), _ends(receives))
        else:
            try:
                works = _start_on_host(group, sends, receives, _wire_tag(tags))
            except RuntimeError as error:  # a connection is closed already
                raise self.failure(place, error, Bytes.of(receives, sends)) from error
        return Works(self, place, works, receives, sends, is_on_host=is_on_host)

    def _start_cut(self, group: dist.ProcessGroup, place: Place, sends: CutMessages, receives: CutMessages) -> Transfer:
        """The same on CUDA, where the host's time is what a pass may be short of."""
        (staying, going), (kept, coming) = sends.apart(self.rank), receives.apart(self.rank)
        for sent, received in zip(staying, kept, strict=True):
            received.copy_(sent)
        if not going and not coming:
            return Done()
        works = nccl.exchange(group, going, coming)
        return Works(self, place, works, receives, sends, is_on_host=False)


def _ends(messages: Sequence[Message]) -> nccl.Ends:
    return [(message.rows, message.peer) for message in messages]


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
