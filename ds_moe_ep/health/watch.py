"""The watch: tells the other ranks of this one, and knows of the others.

Each rank posts heartbeats in a store (`store.py`), reads the others', and asks its own machine about their processes
(`processes.py`). Errors of transfers ask it why a peer did not answer (`diagnosis.py`). Two threads do it: the store's,
which may block, and the watchdog's (`watchdog.py`), which never blocks.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.diagnosis import View, explain, failed_ranks, first_fault, is_clear, unhealthy
from ds_moe_ep.health.excepthook import chain
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.health.rank_state import RankState
from ds_moe_ep.health.store import innermost, open_store, serves
from ds_moe_ep.health.watchdog import Watchdog

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5  # between heartbeats
PATIENCE_S = 5.0  # how long an error waits for the heartbeats that explain it


class Watch(Protocol):
    """The watch as layers, lanes and the engine use it."""

    def enters(self, place: Place) -> None:
        """The calling thread begins to wait at `place` for other ranks."""

    def leaves(self) -> None:
        """It waits no longer."""

    def guards(self, guard: AbortGuard) -> None:
        """Ends the use of these lanes when one of their ranks fails or goes."""

    def report(self, error: BaseException, place: str) -> None:
        """Tells all ranks that a pass, or the process, ended with `error`. Returns once it is posted, or after 1 s."""

    def explain(self, suspects: Iterable[int]) -> str:
        """The reason why these ranks do not answer, or an empty string. Waits up to 5 s for heartbeats that tell.

        Another rank's end is no reason before each of these shows that it lives: two ranks may die at once.
        """

    def failed_ranks(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks that are gone or silent, or failed by themselves, as far as is known now."""

    def knows_failure(self) -> bool:
        """True where any rank is known now to be gone or silent, or to have failed by itself."""

    def step_begins(self, number: int) -> None:
        """A step begins, unless this one runs already."""

    def step_ends(self, is_done: bool = True) -> None:
        """The step is done, or given up: no line about a slow step until the next."""

    def among_others(self, call: str) -> AbstractContextManager[None]:
        """A scope in which ranks need each other: a process that is stuck there is ended, and says in which call."""

    def end(self) -> None:
        """Says goodbye and ends the threads; the end of the process does it too."""


class Unwatched:
    """The watch of a group that nobody watches."""

    def enters(self, place: Place) -> None:
        return None

    def leaves(self) -> None:
        return None

    def guards(self, guard: AbortGuard) -> None:
        return None

    def report(self, error: BaseException, place: str) -> None:
        return None

    def explain(self, suspects: Iterable[int]) -> str:
        return ""

    def failed_ranks(self, ranks: Iterable[int]) -> list[int]:
        return []

    def knows_failure(self) -> bool:
        return False

    def step_begins(self, number: int) -> None:
        return None

    def step_ends(self, is_done: bool = True) -> None:
        return None

    def among_others(self, call: str) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        return None


class RankWatch:
    """The watch of one rank over all others of the world."""

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, interval_s: float, serves_store: bool = False
    ) -> None:
        self._state = state = RankState(store, rank, size, interval_s, serves_store)
        self._finalizer = weakref.finalize(self, _end, state, Watchdog(state, timeout_s, interval_s), chain(state))
        multiprocessing.util.Finalize(self, self._finalizer, exitpriority=1)  # its children end without atexit

    def enters(self, place: Place) -> None:
        self._state.enter(place)

    def leaves(self) -> None:
        self._state.leave()

    def guards(self, guard: AbortGuard) -> None:
        self._state.guard(guard)

    def report(self, error: BaseException, place: str) -> None:
        self._state.fail(error, place)

    def explain(self, suspects: Iterable[int]) -> str:
        suspects, end_s = tuple(suspects), time.monotonic() + PATIENCE_S
        first = view = self._fresh_view()
        while time.monotonic() < end_s:
            if is_clear(view, suspects) or _all_show_life(view, first, suspects):
                break
            time.sleep(max(0.1, self._state.heartbeats.interval_s / 10))
            view = self._fresh_view()
        return explain(view, suspects)

    def failed_ranks(self, ranks: Iterable[int]) -> list[int]:
        return failed_ranks(self._state.view(), ranks)

    def knows_failure(self) -> bool:
        view = self._state.view()
        return bool(unhealthy(view)) or first_fault(view) is not None or view.store_silent_s > view.silence_s

    def _fresh_view(self) -> View:
        """The view behind a new look at the store, unless the rank that serves it is known to be unhealthy.

        That rank's store would let each look wait in vain.
        """
        view = self._state.view()
        if any(view.seen[rank].heartbeat.serves_store for rank in unhealthy(view)):
            return view
        self._state.heartbeats.ask(1.0)
        return self._state.view()

    def step_begins(self, number: int) -> None:
        self._state.begin_step(number)

    def step_ends(self, is_done: bool = True) -> None:
        self._state.end_step(is_done)

    def among_others(self, call: str) -> AbstractContextManager[None]:
        return self._state.among_others(call)

    def end(self) -> None:
        self._finalizer()


def _all_show_life(view: View, before: View, suspects: Iterable[int]) -> bool:
    """True where each suspect has given a heartbeat since an earlier look, which may have shown one from before it."""
    return all(
        rank in view.seen and rank in before.seen and view.seen[rank].heartbeat.beat > before.seen[rank].heartbeat.beat
        for rank in suspects
    )


def _end(state: RankState, watchdog: Watchdog, unchain: Callable[[], None]) -> None:
    if os.getpid() != state.identity.pid:
        return  # a forked child, which has neither threads nor a say
    watchdog.end()
    unchain()
    state.say_goodbye()


def open_watch(timeout_s: float, interval_s: float = INTERVAL_S) -> Watch:
    """The watch of this rank over the world of torch.distributed's default group.

    Every rank opens its watches in the same order; none waits for another here. `timeout_s` is for how long a rank may
    be gone or silent before a process that waits for it inside a call of the engine's is ended.
    """
    default = _get_default_store()
    if not hasattr(default, "clone"):  # torch before 2.8
        return _unwatched("this torch has no Store.clone")
    if not isinstance(innermost(default), dist.TCPStore):  # type: ignore[attr-defined] # missing in the stubs
        return _unwatched(f"the ranks meet at a {type(innermost(default)).__name__}, which is no TCPStore")
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        store = open_store(default, rank)
    except RuntimeError as error:
        return _unwatched(f"the ranks' store takes no second connection ({error})")
    return RankWatch(store, rank, size, timeout_s, interval_s, serves(default))


def _unwatched(reason: str) -> Unwatched:
    logger.warning("ds_moe_ep: no rank watches the others: %s; errors name fewer causes", reason)
    return Unwatched()
