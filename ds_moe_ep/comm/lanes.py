"""Lanes, on which ops run side by side. Streams and events on CUDA, threads and work handles on the host.

The interpreter names a lane, the marks that must lie behind it, and the work. On CUDA a lane never blocks the caller.
On the host compute runs where it is called, and each transfer lane has threads that move rows meanwhile.

A lane is first in, first out. All transfers at once would share the link and all arrive late; one at a time would leave
it idle from the end of one to the start of the next. So the host keeps two in flight, the second behind the first; on
CUDA the stream does it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import LANES


class Mark(Protocol):
    """A point on a lane that other lanes can wait for."""

    def wait(self) -> None: ...


IN_FLIGHT = 2  # transfers of one lane on the host

Work = Callable[[], Mark | None]  # starts a transfer and returns it, or computes


Scope = AbstractContextManager[object]  # what records an op


class Lanes(Protocol):
    """Order of one pass's ops over "compute", "dispatch" and "combine"."""

    def entry(self) -> Mark:
        """The point behind all that the caller has issued."""

    def issue(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor], work: Work, scope: Scope) -> Mark:
        """Runs `work` on `lane` inside `scope`, behind the marks; returns the mark behind it.

        `touches` are the tensors that it reads or writes.
        """

    def leave(self, marks: Sequence[Mark], touches: Sequence[Tensor]) -> None:
        """Puts the caller behind the marks."""

    def abandon(self) -> None:
        """Drops what was issued and has not started, after an error."""

    def blocking(self) -> Lanes:
        """The lanes for a schedule in which every op waits for the one before."""


class _Passed:
    """A mark that lies behind already: the host runs its own work in order."""

    def wait(self) -> None:
        return None


class _Pass:
    """The right of one pass's jobs to start. The first that fails drops the others, on every lane: what started behind
    it would meet the peers' transfer before."""

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
    """An op on a lane's threads, and its mark. Waiting for it raises what the threads have met."""

    def __init__(self, after: Sequence[Mark], work: Work, scope: Scope, of: _Pass) -> None:
        self._after, self._work, self._scope, self._of = after, work, scope, of
        self._transfer: Mark | None = None
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()  # each thread has its own
        self._done = threading.Event()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Starts the transfer once its time has come. Called by the lane's first thread."""
        try:
            for mark in () if self._of.is_dropped else self._after:
                mark.wait()
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
    """Base of all lanes: the caller waits for marks; nothing is left behind that could be dropped."""

    def leave(self, marks: Sequence[Mark], touches: Sequence[Tensor]) -> None:
        for mark in marks:
            mark.wait()

    def abandon(self) -> None:
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

    def entry(self) -> Mark:
        self._pass = _Pass()
        return _Passed()

    def issue(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor], work: Work, scope: Scope) -> Mark:
        if lane not in LANES:
            return Inline().issue(lane, after, touches, work, scope)
        job = _Job(after, work, scope, self._pass)
        self._lane(lane).queue.put(job)
        return job

    def abandon(self) -> None:
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

    def entry(self) -> Mark:
        return _Passed()

    def issue(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor], work: Work, scope: Scope) -> Mark:
        for mark in after:
            mark.wait()
        with scope:
            _finish(work)
        return _Passed()

    def blocking(self) -> Lanes:
        return self


class _EventMark:
    """An event recorded on a lane; waiting makes the current stream wait, never the host."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


class CudaLanes(_Waiting):
    """Three streams: compute is the caller's, dispatch and combine are the lanes' own (specification, section 3.2).

    Every edge between lanes is an event, and every tensor that crosses is given to the other stream's allocator
    record, so that its memory is not handed out again while that stream may still use it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = {lane: torch.cuda.Stream(device) for lane in LANES}

    def __reduce__(self) -> tuple[type[CudaLanes], tuple[torch.device]]:
        return CudaLanes, (self._device,)

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return self._own[lane] if lane in self._own else torch.cuda.current_stream()

    def entry(self) -> Mark:
        return self._mark(self._stream("compute"))

    def issue(self, lane: str, after: Sequence[Mark], touches: Sequence[Tensor], work: Work, scope: Scope) -> Mark:
        stream = self._stream(lane)
        with torch.cuda.stream(stream):
            for mark in after:
                mark.wait()
            if lane in self._own:
                for tensor in touches:
                    tensor.record_stream(stream)
            with scope:
                _finish(work)  # orders the lane behind the communicator's own stream
            return self._mark(stream)

    def _mark(self, stream: torch.cuda.Stream) -> Mark:
        event = torch.cuda.Event()
        event.record(stream)
        return _EventMark(event)

    def blocking(self) -> Lanes:
        return self


def make_lanes(device: torch.device, num_ranks: int) -> Lanes:
    """The lanes of a device for a group of `num_ranks`; alone on the host there is nothing to run beside compute."""
    if device.type == "cuda":
        return CudaLanes(device)
    return HostLanes() if num_ranks > 1 else Inline()
