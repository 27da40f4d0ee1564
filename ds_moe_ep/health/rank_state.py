"""What the threads of a rank's watch share: where the rank is, what failed on it, its board, the lanes it guards."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import Store

from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.diagnosis import View, is_gone
from ds_moe_ep.health.heartbeat import Fault, Heartbeat, Place, fault_of
from ds_moe_ep.health.processes import identify, status_of
from ds_moe_ep.health.stillness import Stillness
from ds_moe_ep.health.store import HeartbeatStore

SILENCE_S = 3.0  # who gives no heartbeat for so long is in trouble
POSTING_S = 1.0  # how long a fault, or the end of the process, waits for its heartbeat to be posted
LEAVING_S = 2.0  # how long whoever serves the store waits for the others to leave
NUM_STEPS = 32  # whose median is what a step takes


class RankState:
    """What the watch's threads work with; it knows nothing of the watch, whose end is theirs."""

    def __init__(self, store: Store, rank: int, size: int, interval_s: float, serves_store: bool) -> None:
        self.rank = rank
        self.identity = identify()
        self.places: dict[int, Place] = {}  # by thread
        self.last: Place | None = None
        self.moved_s = time.monotonic()  # when the rank began or ended something last
        self.step, self.step_began_s = -1, 0.0
        self.is_in_step = False
        self.inside: list[str] = []  # the calls of the main thread that need the other ranks
        self.durations_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._standings: weakref.WeakSet[AbortGuard] = weakref.WeakSet()
        self._standings_lock = threading.Lock()
        self.fault: Fault | None = None
        self.has_left = False
        self._serves_store = serves_store
        self._stillness = Stillness()
        self._beat = 0
        self.board = HeartbeatStore(store, rank, size, interval_s, self.heartbeat)
        self.silence_s = max(SILENCE_S, 6 * self.board.interval_s)

    def heartbeat(self) -> Heartbeat:
        """This rank's sign of life now."""
        self._beat += 1
        now_s = time.monotonic()
        places = sorted(self.places.copy().values(), key=lambda place: place.since_s)
        if places:
            blocked_s = for_s = now_s - places[0].since_s
            place, waits_for = str(places[0]), tuple(places[0].waits_for)
        else:
            place, blocked_s = self._stillness.look()
            for_s, waits_for = now_s - self.moved_s, tuple[int, ...]()
            place += f", behind {self.last}" if self.last is not None else ""
        return Heartbeat(
            self.rank, self.identity, self._beat, place, for_s, waits_for, blocked_s,
            self.step, self.fault, self.has_left, self._serves_store,
        )  # fmt: skip

    def view(self) -> View:
        """What this rank knows of the others now. Never blocks."""
        seen = self.board.seen
        statuses = {rank: status_of(each.heartbeat.identity, self.identity.machine) for rank, each in seen.items()}
        silent_s = time.monotonic() - self.board.read_s
        return View(self.rank, seen, statuses, silent_s, self.silence_s)

    def awaited(self) -> set[int]:
        """The ranks that a transfer of this rank waits for now."""
        return {rank for place in self.places.copy().values() for rank in place.waits_for}

    @contextmanager
    def among_others(self, what: str) -> Iterator[None]:
        """A scope in which the main thread needs the other ranks."""
        self.inside.append(what)
        self.moved_s = time.monotonic()
        try:
            yield
        finally:
            self.inside.pop()
            self.moved_s = time.monotonic()

    def guard(self, guard: AbortGuard) -> None:
        """Adds lanes to those whose use ends with a rank."""
        with self._standings_lock:
            self._standings.add(guard)

    def guarded(self) -> list[AbortGuard]:
        """The lanes that somebody still holds."""
        with self._standings_lock:
            return list(self._standings)

    def fail(self, error: BaseException, place: str) -> None:
        """Publishes the first exception that ends a pass here; a fault of this rank's own counts before echoes."""
        new, old = fault_of(error, place), self.fault
        if old is None or (old.is_secondary and not new.is_secondary):
            self._publish(new)

    def _publish(self, fault: Fault) -> None:
        self.fault = fault
        self.board.ask(POSTING_S)

    def dies(self, error: BaseException) -> None:
        """Publishes an exception that nobody caught, and ends the use of all lanes, which wakes the peers.

        It takes the place of one that was caught; the same one keeps the place where it was raised.
        """
        new, old = fault_of(error, "the process, which ends"), self.fault
        if old is None or not (new.is_secondary or (new.type_name, new.text) == (old.type_name, old.text)):
            self._publish(new)
        for guard in self.guarded():
            guard.end(f"the process ends: {type(error).__name__}: {error}")
        if self._serves_store:
            time.sleep(POSTING_S)  # the peers that were woken read the board, which ends with this process

    def say_goodbye(self) -> None:
        """Posts the last heartbeat. A forked child says nothing: it is not the rank.

        Whoever serves the store leaves last, or after 2 s: with it goes its goodbye.
        """
        if os.getpid() != self.identity.pid or self.has_left:
            return
        self.has_left, end_s = True, time.monotonic() + LEAVING_S
        while self._serves_store and time.monotonic() < end_s:
            self.board.ask(min(self.board.interval_s, end_s - time.monotonic()))
            view = self.view()
            if all(is_gone(view, rank) for rank in view.seen if rank != self.rank):
                break
            time.sleep(self.board.interval_s / 5)
        self.board.end(POSTING_S)
