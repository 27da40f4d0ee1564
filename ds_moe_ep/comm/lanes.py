"""Lanes, on which ops run side by side. Streams and events on CUDA, threads and work handles on the host.

The interpreter names a lane, the events that must lie behind it, and the work. On CUDA a lane never blocks the caller.
On the host compute runs where it is called, and each transfer lane has threads that move rows meanwhile.

A lane is first in, first out. All transfers at once would share the link and all arrive late; one at a time would leave
it idle from the end of one to the start of the next. So the host keeps two in flight, the second behind the first; on
CUDA the stream does it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.recorder import NOT_RECORDED
from ds_moe_ep.comm.transport import LANES, NEAR_LANES
from ds_moe_ep.errors import EngineError


class Event(Protocol):
    """A point on a lane that other lanes can wait for."""

    def wait(self) -> None: ...


TENSOR_LANE = "tensor"  # of results on their way to ranks that share tokens; no op of a schedule runs there
TRANSFERS = (*LANES, *NEAR_LANES, TENSOR_LANE)
IN_FLIGHT = 2  # transfers of one lane on the host

Work = Callable[[], Event | None]  # starts a transfer and returns it, or computes


Scope = AbstractContextManager[object]  # records an op


class Lanes(Protocol):
    """Order of one pass's ops over "compute", "dispatch" and "combine"."""

    def entry(self) -> Event:
        """The point behind all that the caller has issued."""

    def issue(self, lane: str, after: Sequence[Event], work: Work, scope: Scope, is_awaited: bool = True) -> Event:
        """Runs `work` on `lane` inside `scope`, behind the events; returns the event behind it.

        `is_awaited`: another lane, or the caller at the end, waits for it.
        """

    def leave(self, events: Sequence[Event]) -> None:
        """Puts the caller behind the events, the awaited ones among them; what the pass used may be freed then."""

    def abandon(self, touches: Sequence[Tensor]) -> None:
        """Drops what was issued and has not started, after an error; other lanes may still use these tensors."""

    def blocking(self) -> Lanes:
        """The lanes for a schedule in which every op waits for the one before."""


class _Passed:
    """An event that lies behind already: the host runs its own work in order."""

    def wait(self) -> None:
        return None


_PASSED = _Passed()


class _Pass:
    """The jobs of one pass, which may start until one fails. The first that fails drops the others, on every lane: what
    started behind it would meet the peers' transfer before."""

    def __init__(self) -> None:
        self.is_dropped = False
        self._failed: weakref.ref[_Job] | None = None  # its error's traceback holds tensors

    def drop(self, failed: _Job | None = None) -> None:
        if failed is not None and self._failed is None:
            self._failed = weakref.ref(failed)
        self.is_dropped = True

    @property
    def error(self) -> BaseException | None:
        """The error of the first job that failed."""
        failed = None if self._failed is None else self._failed()
        return None if failed is None else failed.error


class _Job:
    """An op on a lane's threads, and its event. Waiting for it raises what the threads have met."""

    def __init__(self, after: Sequence[Event], work: Work, scope: Scope, of: _Pass) -> None:
        self._after, self._work, self._scope, self._of = after, work, scope, of
        self._transfer: Event | None = None
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # each thread has its own
        self._done = threading.Event()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Starts the transfer once its time has come. Called by the lane's first thread."""
        try:
            for event in () if self._of.is_dropped else self._after:
                event.wait()
            if self._of.is_dropped:
                self.error = self._of.error
            else:
                self._scope.__enter__()
                with self._callers_modes():
                    self._transfer = self._work()
        except BaseException as error:  # handed to whoever waits
            self.error = error
            self._of.drop(self)

    def finish(self) -> None:
        """Waits for the transfer's end. Called by the lane's second thread."""
        try:
            if self._transfer is not None:
                with self._callers_modes():
                    self._transfer.wait()
                self._scope.__exit__(None, None, None)
        except BaseException as error:
            self.error = error
            self._of.drop(self)
        del self._after, self._work, self._scope, self._transfer  # tensors must not outlive the pass
        self._done.set()

    @contextmanager
    def _callers_modes(self) -> Iterator[None]:
        is_inference, has_grad = self._modes
        with torch.inference_mode(is_inference), torch.set_grad_enabled(has_grad):
            yield

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error


class _Lane:
    """Two threads: one starts transfers in order, one waits for their ends, at most IN_FLIGHT behind."""

    def __init__(self, name: str) -> None:
        self.queue: SimpleQueue[_Job | None] = SimpleQueue()
        started: SimpleQueue[_Job | None] = SimpleQueue()
        places = threading.Semaphore(IN_FLIGHT)
        for run, words in ((_start_jobs, (self.queue, places, started)), (_finish_jobs, (started, places))):
            threading.Thread(target=run, args=words, name=f"ds_moe_ep {name}", daemon=True).start()


def _start_jobs(
    queue: SimpleQueue[_Job | None], places: threading.Semaphore, started: SimpleQueue[_Job | None]
) -> None:
    while (job := queue.get()) is not None:
        places.acquire()
        job.start()
        started.put(job)
        del job  # a thread that waits for the next one must hold nothing of the last
    started.put(None)


def _finish_jobs(started: SimpleQueue[_Job | None], places: threading.Semaphore) -> None:
    while (job := started.get()) is not None:
        job.finish()
        places.release()
        del job


class _Waiting:
    """The part that all lanes share: the caller waits for events; nothing is left behind that could be dropped."""

    def leave(self, events: Sequence[Event]) -> None:
        for event in events:
            if event is not _PASSED:
                event.wait()

    def abandon(self, touches: Sequence[Tensor]) -> None:
        return None


class HostLanes(_Waiting):
    """Lanes on the host: compute runs at once, threads run the transfers of a lane in order.

    The threads start with the first transfer and end with this object.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._pass = _Pass()

    def __reduce__(self) -> tuple[type[HostLanes], tuple[()]]:
        return HostLanes, ()  # a copy of a layer gets lanes of its own

    def entry(self) -> Event:
        self._pass = _Pass()
        return _PASSED

    def issue(self, lane: str, after: Sequence[Event], work: Work, scope: Scope, is_awaited: bool = True) -> Event:
        if lane not in TRANSFERS:
            return Inline().issue(lane, after, work, scope)
        job = _Job(after, work, scope, self._pass)
        self._lane(lane).queue.put(job)
        return job

    def abandon(self, touches: Sequence[Tensor]) -> None:
        self._pass.drop()
        self._pass = _Pass()

    def blocking(self) -> Lanes:
        return Inline()

    def _lane(self, name: str) -> _Lane:
        if name not in self._lanes:
            self._lanes[name] = lane = _Lane(name)
            weakref.finalize(self, lane.queue.put, None)
        return self._lanes[name]


def _finish(work: Work) -> None:
    """Does the work; a transfer that it starts is waited for."""
    transfer = work()
    if transfer is not None:
        transfer.wait()


class Inline(_Waiting):
    """The host without threads: every op is finished where it is issued."""

    def entry(self) -> Event:
        return _PASSED

    def issue(self, lane: str, after: Sequence[Event], work: Work, scope: Scope, is_awaited: bool = True) -> Event:
        for event in after:
            if event is not _PASSED:
                event.wait()
        if scope is NOT_RECORDED:
            transfer = work()
            if transfer is not None:
                transfer.wait()
        else:
            with scope:
                _finish(work)
        return _PASSED

    def blocking(self) -> Lanes:
        return self


class _StreamEvent:
    """The `number`-th point of a lane's stream; waiting makes the current stream wait, never the host.

    `recorded` is None where no other lane waits: the order of the lane says it already.
    """

    def __init__(self, lane: str, number: int, recorded: torch.cuda.Event | None) -> None:
        self.lane, self.number, self.recorded = lane, number, recorded

    def wait(self) -> None:
        self.hold(torch.cuda.current_stream())

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Makes a stream wait."""
        assert self.recorded is not None, "an op that others wait for is awaited"
        stream.wait_event(self.recorded)


class CudaLanes(_Waiting):
    """Three streams: compute is the caller's, dispatch and combine are the lanes' own (specification, section 3.2).

    Every edge between lanes is an event. A lane that waited for one has seen all before it on that stream, and does
    not wait again. The end of a pass puts the caller's stream behind the lanes: memory of the pass that is freed there
    is handed out again behind all that used it, so that no tensor need be given to the allocator's record. Only a pass
    that fails leaves its lanes open, and does that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = {lane: lane_stream(device, lane) for lane in LANES}
        self._number = 0
        self._seen: dict[tuple[str, str], int] = {}  # of (a lane, another): the newest event that it waited for

    def __reduce__(self) -> tuple[type[CudaLanes], tuple[torch.device]]:
        return CudaLanes, (self._device,)

    def _stream(self, lane: str) -> torch.cuda.Stream:
        if lane not in self._own:  # which few layers use
            self._own[lane] = lane_stream(self._device, lane)
        return self._own[lane]

    def entry(self) -> Event:
        self._seen.clear()  # the caller may have come with another stream
        self._compute = torch.cuda.current_stream(self._device)  # of its own device, whichever is the current one
        return self._event("compute", self._compute)

    def issue(self, lane: str, after: Sequence[Event], work: Work, scope: Scope, is_awaited: bool = True) -> Event:
        if lane not in TRANSFERS:  # on the stream that is the current one
            return self._issue_on(self._compute, lane, after, work, scope, is_awaited)
        stream = self._stream(lane)
        with torch.cuda.stream(stream):
            return self._issue_on(stream, lane, after, work, scope, is_awaited)

    def _issue_on(
        self, stream: torch.cuda.Stream, lane: str, after: Sequence[Event], work: Work, scope: Scope, is_awaited: bool
    ) -> Event:
        for event in after:
            self._wait(stream, lane, event)
        with scope:  # its work orders the lane behind the communicator's own stream
            _finish(work)
        return self._event(lane, stream, is_awaited)

    def leave(self, events: Sequence[Event]) -> None:
        for event in events:
            assert isinstance(event, _StreamEvent)
            if event.recorded is not None:  # the last of a lane, which stands for those before it, is
                self._wait(self._compute, "compute", event)

    def abandon(self, touches: Sequence[Tensor]) -> None:
        for tensor in touches:
            for stream in self._own.values():
                tensor.record_stream(stream)

    def _wait(self, stream: torch.cuda.Stream, lane: str, event: Event) -> None:
        """Makes the lane's stream wait, never the host, unless its order says so already."""
        assert isinstance(event, _StreamEvent)
        if event.lane != lane and self._seen.get((lane, event.lane), -1) < event.number:
            event.hold(stream)
            self._seen[lane, event.lane] = event.number

    def _event(self, lane: str, stream: torch.cuda.Stream, is_awaited: bool = True) -> Event:
        self._number += 1
        recorded = torch.cuda.Event() if is_awaited else None
        if recorded is not None:
            recorded.record(stream)
        return _StreamEvent(lane, self._number, recorded)

    def blocking(self) -> Lanes:
        return self


@functools.cache
def lane_stream(device: torch.device, lane: str) -> torch.cuda.Stream:
    """The stream of a lane, in front of compute's in the queue: its copies are small.

    All layers of a process have one, since they run one after another: torch hands out 32 streams of a priority in
    turn, and lanes of a deep model's own would soon be those on which communicators or other lanes wait.
    """
    return torch.cuda.Stream(device, priority=-1)


def refuse_capture(device: torch.device) -> None:
    """Raises EngineError where a CUDA graph is being captured: it would replay the messages of one pass. Local."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise EngineError(
            "torch.cuda.graph: an MoE layer runs while a CUDA graph is being captured, which would replay this pass's "
            "messages and numbers of rows whatever the router says; capture what is around the layer (torch.compile "
            "leaves it out by itself)"
        )


def make_lanes(device: torch.device, num_ranks: int) -> Lanes:
    """The lanes of a device for a group of `num_ranks`; alone on the host there is nothing to run beside compute."""
    if device.type == "cuda":
        return CudaLanes(device)
    return HostLanes() if num_ranks > 1 else Inline()
