"""Marks the begin and the end of work on a lane, on CUDA events or on the host clock; free when it is off.

The interpreter opens a scope around every op. A scope of the recorder that is off does nothing.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol

import torch

from ds_moe_ep.timeline import Span


class Waitable(Protocol):
    """A transfer on its way."""

    def wait(self) -> None: ...


class Scope(Protocol):
    """The record of one op."""

    def __enter__(self) -> Scope: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def follow(self, work: Waitable) -> Waitable:
        """The transfer to wait for instead of `work`; the record ends when it does."""


class Recorder(Protocol):
    """Collects spans."""

    def scope(self, lane: str, name: str) -> Scope:
        """A scope to open inside the lane, around the op."""

    def spans(self) -> list[Span]:
        """What was recorded since the last call. On CUDA waits for the device."""


class _Nothing:
    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def follow(self, work: Waitable) -> Waitable:
        return work


class Off:
    """The recorder that records nothing."""

    _scope = _Nothing()

    def scope(self, lane: str, name: str) -> Scope:
        return self._scope

    def spans(self) -> list[Span]:
        return []


class HostRecorder:
    """Spans on the host clock. A thread a lane stamps the end of transfers, which the host itself would miss."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._spans: list[Span] = []
        self._queues: dict[str, SimpleQueue[_Watched]] = {}

    def scope(self, lane: str, name: str) -> Scope:
        return _HostScope(self, lane, name)

    def spans(self) -> list[Span]:
        spans, self._spans = self._spans, []
        return spans

    def add(self, lane: str, name: str, start_s: float, stop_s: float) -> None:
        """Records one span; called by scopes, and by the lanes' threads."""
        self._spans.append(Span(name, self.rank, lane, 1e6 * start_s, 1e6 * stop_s))

    def watch(self, watched: _Watched) -> None:
        """Hands a transfer to its lane's thread, which waits for it and stamps its end."""
        if watched.lane not in self._queues:
            queue: SimpleQueue[_Watched] = SimpleQueue()
            self._queues[watched.lane] = queue
            threading.Thread(target=_watch_lane, args=(queue,), name=f"ds_moe_ep {watched.lane}", daemon=True).start()
        self._queues[watched.lane].put(watched)


class _HostScope:
    def __init__(self, recorder: HostRecorder, lane: str, name: str) -> None:
        self._recorder, self._lane, self._name = recorder, lane, name
        self._followed = False

    def __enter__(self) -> _HostScope:
        self._start_s = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._followed:
            self._recorder.add(self._lane, self._name, self._start_s, time.perf_counter())

    def follow(self, work: Waitable) -> Waitable:
        self._followed = True
        watched = _Watched(self._recorder, self._lane, self._name, self._start_s, work)
        self._recorder.watch(watched)
        return watched


class _Watched:
    """A transfer that its lane's thread waits for; the caller waits for the thread, and gets its error."""

    def __init__(self, recorder: HostRecorder, lane: str, name: str, start_s: float, work: Waitable) -> None:
        self.lane = lane
        self._recorder, self._name, self._start_s, self._work = recorder, name, start_s, work
        self._done = threading.Event()
        self._error: BaseException | None = None

    def finish(self) -> None:
        """Waits for the transfer and stamps its end. Called by the lane's thread."""
        try:
            self._work.wait()
        except BaseException as error:  # handed to the caller of wait()
            self._error = error
        self._recorder.add(self.lane, self._name, self._start_s, time.perf_counter())
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error


def _watch_lane(queue: SimpleQueue[_Watched]) -> None:
    while True:
        queue.get().finish()


class CudaRecorder:
    """Spans from CUDA events on the lanes' streams; nothing is read before `spans` is called."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._origin = _event()
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []

    def scope(self, lane: str, name: str) -> Scope:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._events.append((lane, name, start, stop))
        return _CudaScope(start, stop)

    def spans(self) -> list[Span]:
        events, self._events = self._events, []
        spans = []
        for lane, name, start, stop in events:
            stop.synchronize()
            times_us = [1e3 * self._origin.elapsed_time(event) for event in (start, stop)]
            spans.append(Span(name, self.rank, lane, *times_us))
        self._origin = _event()  # a near one: elapsed times are fp32, and grow coarse with distance
        return spans


class _Waited:
    """A transfer that was waited for, once, as it must be."""

    def wait(self) -> None:
        return None


class _CudaScope:
    def __init__(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> None:
        self._start, self._stop = start, stop

    def __enter__(self) -> _CudaScope:
        self._start.record()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.record()

    def follow(self, work: Waitable) -> Waitable:
        work.wait()  # orders the lane's stream behind the communicator's; the host goes on
        return _Waited()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def make_recorder(device: torch.device, rank: int) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(rank) if device.type == "cuda" else HostRecorder(rank)
