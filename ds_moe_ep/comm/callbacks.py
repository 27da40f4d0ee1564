"""Callbacks around each message that crosses a wire: users register them to compress rows or to trace them.

What a callback puts on the wire is bytes to the lanes, so that messages of any dtype and shape travel together. Rows
that stay on their rank, and messages without rows, pass no callback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


@dataclass(frozen=True)
class TransferMessage:
    """One message: whose it is, the rank of the world at its other end, and its rows [n, D] here."""

    layer: str
    phase: str  # "forward", "backward"
    lane: str  # "dispatch", "combine"
    peer: int
    rows: Tensor


class TransferCallback:
    """Acts on messages; each method may be left out.

    Both ends of a message need the same callbacks in the same order: what one sends, the other takes apart. With
    several, what the first puts on the wire are the rows of the second. They run where the message does: on CUDA on the
    lane's stream, on the host on the lane's threads, several messages at once. An exception ends the pass.

        class HalfTheBytes(TransferCallback):
            def before_send(self, message):
                return message.rows.to(torch.bfloat16)

            def before_receive(self, message):
                return torch.empty_like(message.rows, dtype=torch.bfloat16)

            def after_receive(self, message, wire):
                message.rows.copy_(wire)
    """

    def before_send(self, message: TransferMessage) -> Tensor | None:
        """The tensor that goes on the wire in place of the rows, on their device, or None for the rows themselves."""

    def after_send(self, message: TransferMessage) -> None:
        """The message has left, and its rows may be overwritten."""

    def before_receive(self, message: TransferMessage) -> Tensor | None:
        """A contiguous buffer for what the other end puts on the wire, or None where that is the rows themselves."""

    def after_receive(self, message: TransferMessage, wire: Tensor) -> None:
        """The buffer is filled: writes `message.rows` from it, where it is another one."""


class WithCallbacks(InFront):
    """A transport whose messages pass callbacks. One rank that has them needs peers that have them too."""

    def __init__(self, inner: Transport, callbacks: Sequence[TransferCallback]) -> None:
        super().__init__(inner)
        self.callbacks = tuple(callbacks)

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        crossings: list[_Crossing] = []

        def crossed(message: Message, kind: type[_Outward | _Inward]) -> Message:
            """The message in the bytes of what its callbacks put on the wire."""
            rows = message.rows
            if len(message) and message.peer != self.rank:
                about = TransferMessage(tags.layer, tags.phase, lane, self.ranks[message.peer], rows)
                crossings.append(kind(about, self.callbacks))
                rows = crossings[-1].wire
            as_bytes = rows.view(-1).view(torch.uint8).view(-1, 1)
            return Message(message.peer, as_bytes, 0, len(as_bytes))

        leaving = [crossed(message, _Outward) for message in sends]
        coming = [crossed(message, _Inward) for message in receives]
        return _Crossed(self._inner.start(lane, leaving, coming, tags), crossings)


class _Outward:
    """A message that leaves: its callbacks, and what goes on the wire in the end."""

    def __init__(self, message: TransferMessage, callbacks: Sequence[TransferCallback]) -> None:
        self._stages = []
        self.wire = message.rows
        for callback in callbacks:
            stage = replace(message, rows=self.wire)
            self._stages.append((callback, stage))
            wire = callback.before_send(stage)
            self.wire = self.wire if wire is None else wire.contiguous()

    def ends(self) -> None:
        for callback, message in reversed(self._stages):
            callback.after_send(message)


class _Inward:
    """A message that comes: its callbacks, and the buffer that the wire fills."""

    def __init__(self, message: TransferMessage, callbacks: Sequence[TransferCallback]) -> None:
        self._stages = []
        self.wire = message.rows
        for callback in callbacks:
            stage = replace(message, rows=self.wire)
            wire = callback.before_receive(stage)
            self.wire = self.wire if wire is None else wire
            self._stages.append((callback, stage, self.wire))
        if not self.wire.is_contiguous():
            raise ConfigError(
                f"{type(callbacks[-1]).__name__}.before_receive={tuple(self.wire.shape)}: the buffer must be "
                "contiguous; make one with torch.empty"
            )

    def ends(self) -> None:
        for callback, message, wire in reversed(self._stages):
            callback.after_receive(message, wire)


_Crossing = _Outward | _Inward


class _Crossed:
    """A transfer whose messages pass their callbacks at its end."""

    def __init__(self, inner: Transfer, crossings: Sequence[_Crossing]) -> None:
        self._inner, self._crossings = inner, crossings

    def wait(self) -> None:
        self._inner.wait()
        for crossing in self._crossings:
            crossing.ends()
        del self._crossings


def with_callbacks(transport: Transport, callbacks: Sequence[TransferCallback]) -> Transport:
    """The transport with callbacks around its messages; itself where there are none. Local."""
    return WithCallbacks(transport, callbacks) if callbacks and transport.size > 1 else transport
