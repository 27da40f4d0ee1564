"""The notice board: a thread that posts this rank's signs of life in a store and reads the others'.

The store is torch.distributed's own, over a connection of the board's. An operation on it may block for ever, as it
does when the process that serves it is stopped: only the board's thread uses it, and everybody else reads what it saw
last. A connection that broke is not used again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from ds_moe_ep.comm.signs import Sign

STORE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Seen:
    """Another rank's last sign, and since when it had not changed as the store was read last."""

    sign: Sign
    changed_s: float
    read_s: float

    @property
    def silent_s(self) -> float:
        return self.read_s - self.changed_s


class Board:
    """Signs of all ranks. `write` makes this rank's; it is called on the board's thread."""

    def __init__(self, store: Store, rank: int, size: int, interval_s: float, write: Callable[[], Sign]) -> None:
        self.seen: Mapping[int, Seen] = {}
        self.read_s = time.monotonic()  # when the store last answered
        self.is_lost = False  # the store cannot be reached any more
        self._store, self._rank, self._size, self._write = store, rank, size, write
        self.interval_s = interval_s * max(1.0, size / 64)  # a store serves all ranks, each of which reads all
        self._missing = [str(other) for other in range(size)]
        self._wake = threading.Event()
        self._news = threading.Condition()
        self._num_begun = self._num_done = 0
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="ds_moe_ep board", daemon=True)
        self._thread.start()

    def ask(self, timeout_s: float) -> bool:
        """Posts and reads at once; whether the store answered in time."""
        with self._news:
            wanted = self._num_begun + 1
            self._wake.set()
            return self._news.wait_for(lambda: self._num_done >= wanted or self.is_lost, timeout_s) and not self.is_lost

    def hurry(self) -> None:
        """Posts and reads soon. Never blocks."""
        self._wake.set()

    def end(self, timeout_s: float) -> None:
        """Posts a last time and ends the thread."""
        self._is_ending = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        is_last = False
        while not is_last and not self.is_lost:
            self._wake.clear()
            is_last = self._is_ending
            with self._news:
                self._num_begun += 1
                number = self._num_begun
            try:
                self._store.set(str(self._rank), self._write().pack())
                if not is_last:
                    self._read()
            except RuntimeError:  # the store's server has gone, or is too slow
                self.is_lost = True
            with self._news:
                self._num_done = number
                self._news.notify_all()
            if not is_last:
                self._wake.wait(self.interval_s)

    def _read(self) -> None:
        """Reads the signs of all ranks that have posted one."""
        self._missing = [key for key in self._missing if not self._store.check([key])]
        present = [str(rank) for rank in range(self._size) if str(rank) not in self._missing]
        signs = [Sign.unpack(text) for text in self._store.multi_get(present)]
        now_s, before = time.monotonic(), self.seen
        seen = {}
        for sign in signs:
            old = before.get(sign.rank)
            is_same = old is not None and old.sign.beat == sign.beat
            seen[sign.rank] = Seen(sign, old.changed_s if is_same and old is not None else now_s, now_s)
        self.seen, self.read_s = seen, now_s


def open_store(default: Store, rank: int) -> Store:
    """A part of the ranks' store for one board, over a connection of its own.

    Ranks open boards in the same order: the n-th of each rank is the same board.
    """
    number = default.add(f"ds_moe_ep/boards/{rank}", 1)
    own: Store = default.clone()  # type: ignore[attr-defined] # missing in the stubs
    own.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return PrefixStore(f"ds_moe_ep/board/{number}", own)


def serves(store: Store) -> bool:
    """Whether this process serves the store, as far as the description of the store that it was given tells."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    text = repr(store)
    return "server=" in text and "server=<nullptr>" not in text
