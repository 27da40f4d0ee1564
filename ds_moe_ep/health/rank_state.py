"""The state of this rank, shared by the threads that watch: where it is, what failed on it, the lanes it guards.

Several threads meet here: the main thread and the lanes' threads write where they are, the heartbeat store's thread
posts it, the watchdog's reads it. All of it goes through methods, under one lock.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.diagnosis import View, is_gone
from ds_moe_ep.health.heartbeat import Fault, Heartbeat, Place, fault_of
from ds_moe_ep.health.processes import identify, status_of
from ds_moe_ep.health.stillness import Stillness
from ds_moe_ep.health.store import HeartbeatStore

SILENCE_S = 3.0  # a rank that gives no heartbeat for so long is unhealthy
POSTING_S = 1.0  # how long a fault, or the end of the process, waits until its heartbeat is posted
LEAVING_S = 2.0  # how long the rank that serves the store waits for the others to leave
NUM_STEPS = 32  # whose median is the usual time of a step
FEWEST_STEPS = 5  # before there is a median to speak of


@dataclass(frozen=True)
class RunningStep:
    """The training step that runs now, and how long the last ones took."""

    number: int
    took_s: float
    median_s: float


@dataclass(frozen=True)
class Waiting:
    """A call of the main thread that needs the other ranks, and since how long this rank has not moved."""

    call: str
    still_s: float


class RankState:
    """This rank's own state. It does not know the watch: the watch is collected, and this state with it.

    One thread may take the lock twice (an RLock): the collector may run the watch's finalizer, which posts a last
    heartbeat, on a thread that is inside of a method here. No method waits for the store or for another thread while it
    holds the lock, since a store whose server is stopped may block for ever.
    """

    def __init__(self, store: Store, rank: int, size: int, interval_s: float, serves_store: bool) -> None:
        self.rank = rank
        self.identity = identify()
        self._lock = threading.RLock()
        self._places: dict[int, Place] = {}  # by thread
        self._last_place: Place | None = None
        self._moved_s = time.monotonic()  # when the rank began or ended something last
        self._step, self._step_began_s = -1, 0.0
        self._is_in_step = False
        self._calls: list[str] = []  # of the main thread that need the other ranks, the outermost first
        self._durations_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._guards: weakref.WeakSet[AbortGuard] = weakref.WeakSet()  # a layer that is gone has no lanes to end
        self._fault: Fault | None = None
        self._has_left = False
        self._serves_store = serves_store
        self._stillness = Stillness()
        self._beat = 0
        # Behind all that a heartbeat reads: the thread that starts here asks for one at once.
        self.heartbeats = HeartbeatStore(store, rank, size, interval_s, self.heartbeat)
        self.silence_s = max(SILENCE_S, 6 * self.heartbeats.interval_s)

    def enter(self, place: Place) -> None:
        """Notes that the calling thread begins to wait for other ranks."""
        with self._lock:
            self._places[threading.get_ident()] = place

    def leave(self) -> None:
        """Notes that it waits no longer."""
        with self._lock:
            self._last_place = self._places.pop(threading.get_ident(), None)
            self._moved_s = time.monotonic()

    def begin_step(self, number: int) -> None:
        """Begins a step, unless this one runs already: its forward, backward and step each say so."""
        with self._lock:
            if self._is_in_step and self._step == number:
                return
            self._step, self._step_began_s, self._is_in_step = number, time.monotonic(), True
            self._moved_s = self._step_began_s

    def end_step(self, is_done: bool = True) -> None:
        """Ends the step. One that was given up takes no part in the median."""
        with self._lock:
            if not self._is_in_step:
                return
            self._moved_s, self._is_in_step = time.monotonic(), False
            if is_done:
                self._durations_s.append(self._moved_s - self._step_began_s)

    @contextmanager
    def among_others(self, call: str) -> Iterator[None]:
        """A scope in which the main thread needs the other ranks."""
        with self._lock:
            self._calls.append(call)
            self._moved_s = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._calls.pop()
                self._moved_s = time.monotonic()

    def forgive_pause(self) -> None:
        """Counts the rank's stillness from now on: the machine was paused, and time went by without it."""
        with self._lock:
            self._moved_s = time.monotonic()

    def running_step(self) -> RunningStep | None:
        """The step that runs; None outside of one, and before enough of them are done for a median."""
        with self._lock:
            if not self._is_in_step or len(self._durations_s) < FEWEST_STEPS:
                return None
            took_s = time.monotonic() - self._step_began_s
            return RunningStep(self._step, took_s, statistics.median(self._durations_s))

    def waiting(self) -> Waiting | None:
        """The outermost call that needs the other ranks; None outside of one."""
        with self._lock:
            return Waiting(self._calls[0], time.monotonic() - self._moved_s) if self._calls else None

    def awaited(self) -> set[int]:
        """The ranks that a transfer of this rank waits for now."""
        with self._lock:
            return {rank for place in self._places.values() for rank in place.waits_for}

    @property
    def fault(self) -> Fault | None:
        """The fault that the other ranks are told of."""
        with self._lock:
            return self._fault

    @property
    def has_left(self) -> bool:
        """True once the last heartbeat was asked for."""
        with self._lock:
            return self._has_left

    def heartbeat(self) -> Heartbeat:
        """This rank's heartbeat now."""
        with self._lock:
            self._beat += 1
            now_s = time.monotonic()
            if self._places:
                # The oldest wait is the one to tell: those behind it on other lanes often wait for the same rank.
                oldest = min(self._places.values(), key=lambda place: place.since_s)
                blocked_s = for_s = now_s - oldest.since_s
                place, waits_for = str(oldest), tuple(oldest.waits_for)
            else:
                place, blocked_s = self._stillness.look()
                for_s, waits_for = now_s - self._moved_s, tuple[int, ...]()
                place += f", behind {self._last_place}" if self._last_place is not None else ""
            return Heartbeat(
                self.rank, self.identity, self._beat, place, for_s, waits_for, blocked_s,
                self._step, self._fault, self._has_left, self._serves_store,
            )  # fmt: skip

    def view(self) -> View:
        """All that this rank knows of the others now. Never blocks."""
        seen = self.heartbeats.seen
        statuses = {rank: status_of(each.heartbeat.identity, self.identity.machine) for rank, each in seen.items()}
        silent_s = time.monotonic() - self.heartbeats.read_s
        return View(self.rank, seen, statuses, silent_s, self.silence_s)

    def guard(self, guard: AbortGuard) -> None:
        """Adds lanes to those whose use ends with a rank."""
        with self._lock:
            self._guards.add(guard)

    def guards(self) -> list[AbortGuard]:
        """The lanes that somebody still holds."""
        with self._lock:
            return list(self._guards)

    def fail(self, error: BaseException, place: str) -> None:
        """Publishes the first exception that ends a pass here; a fault of this rank's own replaces a secondary one."""
        fault = fault_of(error, place)
        with self._lock:
            old = self._fault
            if old is not None and not (old.is_secondary and not fault.is_secondary):
                return
            self._fault = fault
        self.heartbeats.ask(POSTING_S)

    def die(self, error: BaseException) -> None:
        """Publishes an exception that nobody caught, and ends the use of all lanes, which wakes the peers.

        It takes the place of one that was caught; the same one keeps the place where it was raised.
        """
        fault = fault_of(error, "the process, which ends")
        with self._lock:
            old = self._fault
            is_told = old is not None and (
                fault.is_secondary or (fault.type_name, fault.text) == (old.type_name, old.text)
            )
            if not is_told:
                self._fault = fault
        if not is_told:
            self.heartbeats.ask(POSTING_S)
        for guard in self.guards():
            guard.end(f"the process ends: {type(error).__name__}: {error}")
        if self._serves_store:
            time.sleep(POSTING_S)  # the peers that were woken read the store, which ends with this process

    def say_goodbye(self) -> None:
        """Posts the last heartbeat. A forked child posts none: it is not the rank.

        The rank that serves the store leaves last, or after 2 s: the others' goodbyes go with it.
        """
        if os.getpid() != self.identity.pid:
            return
        with self._lock:
            if self._has_left:
                return
            self._has_left = True
        end_s = time.monotonic() + LEAVING_S
        while self._serves_store and time.monotonic() < end_s:
            self.heartbeats.ask(min(self.heartbeats.interval_s, end_s - time.monotonic()))
            view = self.view()
            if all(is_gone(view, rank) for rank in view.seen if rank != self.rank):
                break
            time.sleep(self.heartbeats.interval_s / 5)
        self.heartbeats.end(POSTING_S)
