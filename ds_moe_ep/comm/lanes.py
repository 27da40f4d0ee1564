"""Lanes: where ops run side by side. Streams and events on CUDA, work handles on the host.

The interpreter names a lane and the marks that must lie behind it; a lane never blocks the host on CUDA, and on the
host it blocks exactly where the schedule says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import LANES


class Mark(Protocol):
    """A point on a lane that other lanes can wait for."""

    def wait(self) -> None: ...


class Lanes(Protocol):
    """How one pass orders its ops over "compute", "dispatch" and "combine"."""

    def on(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A scope whose work runs on `lane`, behind the marks; `touches` are the tensors it reads or writes."""

    def mark(self, lane: str, work: Mark | None = None) -> Mark:
        """The point behind everything issued on `lane`; `work` is the transfer that was just started there."""


class _Passed:
    """A mark that lies behind already: the host runs its own work in order."""

    def wait(self) -> None:
        return None


class _Once:
    """A transfer that several ops may wait for; the transport's handle is waited for once."""

    def __init__(self, work: Mark) -> None:
        self._work: Mark | None = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class HostLanes:
    """Lanes on the host: compute runs at once, transfers are handles, waiting is a call."""

    @contextmanager
    def on(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor]) -> Iterator[None]:
        for mark in after:
            mark.wait()
        yield

    def mark(self, lane: str, work: Mark | None = None) -> Mark:
        return _Passed() if work is None else _Once(work)


class _EventMark:
    """An event recorded on a lane; waiting makes the current stream wait, never the host."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class CudaLanes:
    """Three streams: compute is the caller's, dispatch and combine are the lanes' own (specification, section 3.2).

    Every edge between lanes is an event, and every tensor that crosses is given to the other stream's allocator
    record, so that its memory is not handed out again while that stream may still use it.
    """

    def __init__(self, device: torch.device) -> None:
        self._own = {lane: torch.cuda.Stream(device) for lane in LANES}

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return self._own[lane] if lane in self._own else torch.cuda.current_stream()

    @contextmanager
    def on(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor]) -> Iterator[None]:
        stream = self._stream(lane)
        with torch.cuda.stream(stream):
            for mark in after:
                mark.wait()
            if lane in self._own:
                for tensor in touches:
                    tensor.record_stream(stream)
            yield

    def mark(self, lane: str, work: Mark | None = None) -> Mark:
        stream = self._stream(lane)
        with torch.cuda.stream(stream):
            if work is not None:
                work.wait()  # orders the lane behind the communicator's own stream
            event = torch.cuda.Event()
            event.record(stream)
        return _EventMark(event)


def make_lanes(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else HostLanes()
