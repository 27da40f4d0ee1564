"""Heartbeats in torch.distributed's store: a thread that posts this rank's and reads those of the others.

It has a connection of its own. An operation on the store may block for ever, as it does when the process that serves it
is stopped: only this thread uses it, and everybody else reads what it saw last. After a failure it tries again over a
new connection, in case the server was only paused.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ds_moe_ep.health.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 30.0
MEETING_S = 0.1  # between looks until every rank has posted
RETRY_S = 5.0  # from a failure of the store to the next attempt
RETRY_BROKEN_S = 60.0  # where its server has most likely gone: each attempt fills torch's log
MOST_CHECKS = 32  # of ranks that have not posted yet, in one look


@dataclass(frozen=True)
class Seen:
    """Another rank's last heartbeat, and since when it had not changed as the store was read last."""

    heartbeat: Heartbeat
    changed_s: float
    read_s: float

    @property
    def silent_s(self) -> float:
        return self.read_s - self.changed_s


class HeartbeatStore:
    """The last heartbeats of all ranks. `write` makes this rank's; it is called on the store's thread."""

    def __init__(self, store: Store, rank: int, size: int, interval_s: float, write: Callable[[], Heartbeat]) -> None:
        self.seen: Mapping[int, Seen] = {}
        self.read_s = time.monotonic()  # when the store last answered
        self.num_read = 0  # the number of the last look that read all heartbeats
        self.is_lost = False  # the store failed in the last look
        self._store, self._rank, self._size, self._write = store, rank, size, write
        self.interval_s = interval_s * max(1.0, size / 64)  # a store serves all ranks, each of which reads all
        self._missing = [str(other) for other in range(size)]
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._num_begun = self._num_done = 0
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="ds_moe_ep heartbeats", daemon=True)
        self._thread.start()

    def ask(self, timeout_s: float) -> bool:
        """Posts and reads at once; returns True where the store answered in time."""
        with self._news:
            wanted = self._num_begun + 1
            self._hurry()
            return self._news.wait_for(lambda: self._num_done >= wanted or self.is_lost, timeout_s) and not self.is_lost

    def hurry(self) -> int:
        """Posts and reads soon; the number of the first look that begins from now on. Never blocks."""
        with self._news:
            wanted = self._num_begun + 1
        self._hurry()
        return wanted

    def _hurry(self) -> None:
        if not self.is_lost:  # else the next attempt has its time
            self._wake.set()

    def end(self, timeout_s: float) -> None:
        """Posts a last time and ends the thread."""
        self._is_ending = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        is_last = False
        while not is_last and not (self._is_ending and self.is_lost):
            self._wake.clear()
            is_last = self._is_ending
            with self._news:
                self._num_begun += 1
                number = self._num_begun
            pause_s = self._look(number, is_last)
            with self._news:
                self._num_done = number
                self._news.notify_all()
            if not is_last:
                self._wake.wait(pause_s)

    def _look(self, number: int, is_last: bool) -> float:
        """Posts and reads; returns for how many seconds to wait then."""
        try:
            if self.is_lost:
                self._store = self._store.clone()  # type: ignore[attr-defined] # missing in the stubs
            self._store.set(str(self._rank), self._write().pack())
            if not is_last:
                self._read()
                self.num_read = number
            self.is_lost = False
        except Exception as error:  # the server is too slow or gone, or a heartbeat cannot be read
            logger.debug("ds_moe_ep: the ranks' store failed", exc_info=True)
            self.is_lost = True
            return RETRY_BROKEN_S if isinstance(error, dist.DistNetworkError) else RETRY_S
        # Nobody knows the process of a rank whose first heartbeat it has not read, and may soon need to.
        return min(MEETING_S, self.interval_s) if self._missing else self.interval_s

    def _read(self) -> None:
        """Reads the heartbeats of all ranks that have posted one.

        After a loss of the store their silence counts anew: nobody can tell who was silent meanwhile.
        """
        if self._missing and self._store.check(self._missing):
            self._missing = []
        now, later = self._missing[:MOST_CHECKS], self._missing[MOST_CHECKS:]
        self._missing = later + [key for key in now if not self._store.check([key])]
        present = [str(rank) for rank in range(self._size) if str(rank) not in self._missing]
        found = [Heartbeat.unpack(text) for text in self._store.multi_get(present)]
        now_s, before = time.monotonic(), self.seen
        seen = {}
        for heartbeat in found:
            old = before.get(heartbeat.rank)
            is_same = old is not None and old.heartbeat.beat == heartbeat.beat and not self.is_lost
            seen[heartbeat.rank] = Seen(heartbeat, old.changed_s if is_same and old is not None else now_s, now_s)
        self.seen, self.read_s = seen, now_s


def open_store(default: Store, rank: int) -> Store:
    """A part of the ranks' store for the heartbeats of one watch, over a connection of its own.

    Ranks open their watches in the same order: the n-th of each rank uses the same part.
    """
    number = default.add(f"ds_moe_ep/heartbeats/opened/{rank}", 1)
    own: Store = default.clone()  # type: ignore[attr-defined] # missing in the stubs
    own.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return PrefixStore(f"ds_moe_ep/heartbeats/{number}", own)


def serves(store: Store) -> bool:
    """True where this process serves the store, as far as the description of the store that it was given tells."""
    text = repr(innermost(store))
    return "server=" in text and "server=<nullptr>" not in text


def innermost(store: Store) -> Store:
    """The store behind prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store
