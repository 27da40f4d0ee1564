"""The layer at EP=16 on one GPU: its 15 peers are mirrored by copies that act as links.

All virtual ranks hold the same tokens and the same expert, rotated over the torus: what rank 0 sends at an offset is
what it receives at that offset, and the results of what it received are those of what it sent. So the layer must equal
the dense expert. Far rows cross pinned host memory on both copy engines, about 50 GB/s per direction, like a link of
400 Gbit/s, without an SM; near rows are device copies on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Answer, Loopback, Message
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.agreement import NUM_HEAD, CountsHeader
from ds_moe_ep.schedule.spans import NO_TAGS, Tags

TORUS = Torus(4, 4)
Links = Literal["none", "pcie"]  # every copy on the device, or far rows through pinned host memory
Fault = Literal["", "lost rows", "no wait"]  # planted, to show that the check sees it


class EventTransfer:
    """A transfer that ends with events on other streams."""

    def __init__(self, events: Sequence[torch.cuda.Event] = ()) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)


class MirroredTransport(Loopback):
    """The transport of virtual rank 0. `jitter_cycles` delays each copy by a random number of GPU cycles below it."""

    rank = 0
    size = TORUS.size
    ranks: Sequence[int] = tuple(range(TORUS.size))

    def __init__(self, links: Links = "pcie", jitter_cycles: int = 0, fault: Fault = "") -> None:
        self.links, self.jitter_cycles, self.fault = links, jitter_cycles, fault
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._pinned: dict[tuple[str, int], Tensor] = {}
        self._free: dict[tuple[str, int], torch.cuda.Event] = {}  # when a pinned buffer may be written again

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        received_PC = torch.empty_like(counts_PC)
        for offset in TORUS.offsets():
            received_PC[TORUS.source(0, offset)] = counts_PC[TORUS.target(0, offset)]
        return received_PC

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        """The answer to rank 0 where each peer sends it what it sends to the peer on the other side."""
        num_local = int(told_C[CountsHeader._fields.index("num_experts")]) // self.size
        told_PC, counts = told_C.repeat(self.size, 1), slice(NUM_HEAD, NUM_HEAD + self.size * num_local)
        to_peers_PL = told_C[counts].view(self.size, num_local)
        told_PC[:, NUM_HEAD : NUM_HEAD + num_local] = self.exchange_counts(to_peers_PL)
        return lambda: answer(told_PC)[0]

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return values * self.size

    def start(
        self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS
    ) -> EventTransfer:
        pairs = list(zip(sends, receives, strict=True))
        assert all(len(sent) == len(received) for sent, received in pairs), "the mirror needs one number per offset"
        pairs = [pair for pair in pairs if len(pair[0])]
        if self.fault == "lost rows":
            pairs = [pair for pair in pairs if pair[0].peer != 5]
        own = [pair for pair in pairs if pair[0].peer == 0]
        for sent, received in own:
            if sent.rows.data_ptr() != received.rows.data_ptr():
                received.rows.copy_(sent.rows)
        others = [pair for pair in pairs if pair[0].peer]
        if not others or not others[0][0].buffer_RD.is_cuda:
            for sent, received in others:
                received.rows.copy_(sent.rows)
            return EventTransfer()
        return self._start_copies(lane, others)

    def _start_copies(self, lane: str, pairs: Sequence[tuple[Message, Message]]) -> EventTransfer:
        here = torch.cuda.Event()
        here.record()
        is_near = [self.links == "none" or sent.peer < TORUS.node_size for sent, _ in pairs]
        near = [pair for pair, within in zip(pairs, is_near, strict=True) if within]
        far = [pair for pair, within in zip(pairs, is_near, strict=True) if not within]
        ends = [*self._copy_near(lane, near, here), *self._copy_far(lane, far, here)]
        return EventTransfer(() if self.fault == "no wait" else ends)

    def _copy_near(
        self, lane: str, pairs: Sequence[tuple[Message, Message]], here: torch.cuda.Event
    ) -> list[torch.cuda.Event]:
        if not pairs:
            return []
        stream = self._stream(f"near {lane}")
        stream.wait_event(here)
        with torch.cuda.stream(stream):
            self._delay()
            for sent, received in pairs:
                received.rows.copy_(sent.rows)
            return [_recorded()]

    def _copy_far(
        self, lane: str, pairs: Sequence[tuple[Message, Message]], here: torch.cuda.Event
    ) -> list[torch.cuda.Event]:
        if not pairs:
            return []
        out, back = self._stream(f"out {lane}"), self._stream(f"back {lane}")
        out.wait_event(here)
        back.wait_event(here)
        ends = []
        for index, (sent, received) in enumerate(pairs):
            key = lane, index
            staged = self._staged(key, sent.rows)
            with torch.cuda.stream(out):
                if key in self._free:
                    out.wait_event(self._free[key])
                self._delay()
                staged.copy_(sent.rows, non_blocking=True)
                left = _recorded()
            with torch.cuda.stream(back):
                back.wait_event(left)
                received.rows.copy_(staged, non_blocking=True)
                self._free[key] = _recorded()
            ends = [left, self._free[key]]
        return ends

    def _staged(self, key: tuple[str, int], rows: Tensor) -> Tensor:
        """A view of pinned memory in the shape of the rows. A buffer that grew waits for the device: not in a race."""
        if key not in self._pinned or self._pinned[key].numel() < rows.numel():
            torch.cuda.synchronize()
            self._pinned[key] = torch.empty(rows.numel(), dtype=rows.dtype, pin_memory=True)
        return self._pinned[key][: rows.numel()].view_as(rows)

    def _stream(self, name: str) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(priority=-1)
        return self._streams[name]

    def _delay(self) -> None:
        if self.jitter_cycles:
            torch.cuda._sleep(int(torch.randint(self.jitter_cycles, ()).item()))


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
