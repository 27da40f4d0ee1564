"""Transports that delay or damage what another one moves."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

from torch import Tensor

from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


class Delayed(InFront):
    """Sleeps a random moment, another on every rank, before each start and each wait."""

    def __init__(self, inner: Transport, seed: int, longest_s: float) -> None:
        super().__init__(inner)
        self._random = random.Random(1000 * seed + inner.rank)
        self._longest_s = longest_s

    def pause(self) -> None:
        time.sleep(self._random.choice((0.0, self._random.uniform(0, self._longest_s))))

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        self.pause()
        return _DelayedTransfer(super().start(lane, sends, receives, tags), self)


class _DelayedTransfer:
    def __init__(self, inner: Transfer, transport: Delayed) -> None:
        self._inner = inner
        self._transport = transport

    def wait(self) -> None:
        self._transport.pause()
        self._inner.wait()


class Lossy(InFront):
    """Overwrites the first row that the first dispatch brings with zeros: a row is lost on the wire."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self._is_done = False

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        transfer = super().start(lane, sends, receives, tags)
        rows = [message.rows for message in receives if len(message)]
        if lane == "dispatch" and rows and not self._is_done:
            self._is_done = True
            return _LossyTransfer(transfer, rows[0])
        return transfer


class _LossyTransfer:
    def __init__(self, inner: Transfer, rows: Tensor) -> None:
        self._inner = inner
        self._rows = rows

    def wait(self) -> None:
        self._inner.wait()
        self._rows[0].zero_()


class Counting(InFront):
    """Counts what was started and what was waited for."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.started: list[tuple[str, int]] = []
        self.layers: set[str] = set()  # whose transfers and sums they were
        self.num_waits = 0
        self.num_bytes = 0  # sent to other ranks

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        self.started.append((lane, sum(map(len, sends))))
        self.layers.add(tags.layer)
        self.num_bytes += sum(message.num_bytes for message in sends if message.peer != self.rank)
        return _CountedTransfer(super().start(lane, sends, receives, tags), self)

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        self.layers.add(tags.layer)
        return super().sum(values, tags)


class _CountedTransfer:
    def __init__(self, inner: Transfer, transport: Counting) -> None:
        self._inner = inner
        self._transport = transport

    def wait(self) -> None:
        self._transport.num_waits += 1
        self._inner.wait()


class Slow(InFront):
    """A link of a rate: all rows that leave share it, one transfer after the other, on both lanes together."""

    def __init__(self, inner: Transport, row_s: float) -> None:
        super().__init__(inner)
        self._row_s = row_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        rows = sum(len(message) for message in sends if message.peer != self.rank)
        with self._lock:
            self._free_s = max(self._free_s, time.perf_counter()) + rows * self._row_s
            return _SlowTransfer(super().start(lane, sends, receives, tags), self._free_s)


class _SlowTransfer:
    def __init__(self, inner: Transfer, end_s: float) -> None:
        self._inner, self._end_s = inner, end_s

    def wait(self) -> None:
        self._inner.wait()
        time.sleep(max(0.0, self._end_s - time.perf_counter()))
