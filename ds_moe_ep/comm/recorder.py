"""Marks the begin and the end of work on a lane, on CUDA events or on the host clock; free when it is off.

The interpreter opens a scope around every op, on the lane that runs it. A transfer's scope ends when the transfer
does. A scope of the recorder that is off does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from ds_moe_ep.schedule.spans import Span, Tags

Scope = AbstractContextManager[object]
NOT_RECORDED: Scope = nullcontext()


class Recorder(Protocol):
    """Collects spans."""

    def scope(self, lane: str, name: str, tags: Tags) -> Scope:
        """A scope to open on the lane, around the op. May be called from the lanes' threads."""

    def spans(self) -> list[Span]:
        """The spans that were recorded since the last call. On CUDA waits for the device."""

    def is_behind(self) -> bool:
        """True where the device has done what was recorded, so that `spans` waits for nothing."""


class Off:
    """The recorder that records nothing."""

    def scope(self, lane: str, name: str, tags: Tags) -> Scope:
        return NOT_RECORDED

    def spans(self) -> list[Span]:
        return []

    def is_behind(self) -> bool:
        return True


class Both:
    """Two recorders of the same work; each hands out its own spans."""

    def __init__(self, first: Recorder, second: Recorder) -> None:
        self._recorders = (first, second)

    @classmethod
    def of(cls, first: Recorder, second: Recorder) -> Recorder:
        """The one that is on, or both."""
        if isinstance(second, Off):
            return first
        return second if isinstance(first, Off) else cls(first, second)

    @contextmanager
    def scope(self, lane: str, name: str, tags: Tags) -> Iterator[None]:
        first, second = (recorder.scope(lane, name, tags) for recorder in self._recorders)
        with first, second:
            yield

    def spans(self) -> list[Span]:
        return []

    def is_behind(self) -> bool:
        return True


class HostRecorder:
    """Spans on the host clock."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.recorded: list[Span] = []

    def scope(self, lane: str, name: str, tags: Tags) -> Scope:
        return _HostScope(self, lane, name, tags)

    def spans(self) -> list[Span]:
        spans, self.recorded = self.recorded, []
        return spans

    def is_behind(self) -> bool:
        return True


class _HostScope(AbstractContextManager[object]):
    def __init__(self, recorder: HostRecorder, lane: str, name: str, tags: Tags) -> None:
        self._recorder, self._lane, self._name, self._tags = recorder, lane, name, tags

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        times_us = (1e6 * self._start_s, 1e6 * time.perf_counter())
        self._recorder.recorded.append(Span(self._name, self._recorder.rank, self._lane, *times_us, self._tags))


class CudaRecorder:
    """Spans from CUDA events on the lanes' streams; nothing is read before `spans` is called."""

    def __init__(self, rank: int, device: torch.device | None = None) -> None:
        self.rank, self.device = rank, device  # None: the current one
        self._origin = _event(device)
        self.recorded: list[_CudaScope] = []

    def scope(self, lane: str, name: str, tags: Tags) -> Scope:
        return _CudaScope(self, lane, name, tags)

    def spans(self) -> list[Span]:
        scopes, self.recorded = self.recorded, []
        spans = [scope.span(self.rank, self._origin) for scope in scopes]
        self._origin = _event(self.device)  # a near one: elapsed times are fp32, and grow coarse with distance
        return spans

    def is_behind(self) -> bool:
        return all(scope.has_passed() for scope in self.recorded)


class _CudaScope(AbstractContextManager[object]):
    def __init__(self, recorder: CudaRecorder, lane: str, name: str, tags: Tags) -> None:
        self._recorder, self._lane, self._name, self._tags = recorder, lane, name, tags
        self._start, self._stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> None:
        self._start.record(torch.cuda.current_stream(self._recorder.device))

    def __exit__(self, *_: object) -> None:
        self._stop.record(torch.cuda.current_stream(self._recorder.device))
        self._recorder.recorded.append(self)

    def has_passed(self) -> bool:
        """True where the device has passed the end; no wait."""
        return bool(self._stop.query())

    def span(self, rank: int, origin: torch.cuda.Event) -> Span:
        """The recorded times, in microseconds behind the origin."""
        self._stop.synchronize()
        start_us, stop_us = (1e3 * origin.elapsed_time(event) for event in (self._start, self._stop))
        return Span(self._name, rank, self._lane, start_us, stop_us, self._tags)


def _event(device: torch.device | None) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def make_recorder(device: torch.device, rank: int) -> Recorder:
    """The recorder of a device."""
    return CudaRecorder(rank, device) if device.type == "cuda" else HostRecorder(rank)
