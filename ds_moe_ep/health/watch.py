"""The watch: what a rank tells of itself, and what it knows of the others.

Each rank posts signs of life on a board (`board.py`), reads the others', and looks after the processes of its own
machine (`processes.py`). Errors of transfers ask it why a peer did not answer (`diagnosis.py`). Two threads do it: the
board's, which may block on the store, and the monitor's (`watchdog.py`), which never blocks.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.diagnosis import View, explain, failed_ranks, first_fault, unhealthy
from ds_moe_ep.health.excepthook import chain
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.health.rank_state import RankState
from ds_moe_ep.health.store import innermost, open_store, serves
from ds_moe_ep.health.watchdog import Watchdog

logger = logging.getLogger(__name__)

INTERVAL_S = 0.5  # between signs of life
PATIENCE_S = 5.0  # how long an error waits for the signs that explain it


class Watch(Protocol):
    """What layers, lanes and the engine tell the watch and ask of it."""

    def enters(self, place: Place) -> None:
        """The calling thread begins to wait at `place` for other ranks."""

    def leaves(self) -> None:
        """It waits no longer."""

    def guards(self, guard: AbortGuard) -> None:
        """Ends the use of these lanes when one of their ranks fails or goes."""

    def report(self, error: BaseException, place: str) -> None:
        """Tells all ranks that a pass, or the process, ended with `error`. Returns once it is posted, or after 1 s."""

    def explain(self, suspects: Iterable[int]) -> str:
        """Why these ranks do not answer, or an empty string. Waits up to 5 s for signs that tell."""

    def failed_ranks(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks that are gone or silent, or failed by themselves, as far as is known now."""

    def knows_failure(self) -> bool:
        """Whether any rank is known now to be gone or silent, or to have failed by itself."""

    def step_begins(self, number: int) -> None:
        """A step begins, unless this one runs already."""

    def step_ends(self, is_done: bool = True) -> None:
        """The step is done, or given up: no line about a slow step until the next."""

    def among_others(self, what: str) -> AbstractContextManager[None]:
        """A scope in which ranks need each other: a process that is stuck there is ended, and says in what it was."""

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

    def among_others(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        return None


class RankWatch:
    """The watch of one rank over all others of the world."""

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, interval_s: float, serves_store: bool = False
    ) -> None:
        self._pulse = pulse = RankState(store, rank, size, interval_s, serves_store)
        self._finalizer = weakref.finalize(self, _end, pulse, Watchdog(pulse, timeout_s, interval_s), chain(pulse))
        multiprocessing.util.Finalize(self, self._finalizer, exitpriority=1)  # its children end without atexit

    def enters(self, place: Place) -> None:
        self._pulse.places[threading.get_ident()] = place

    def leaves(self) -> None:
        pulse = self._pulse
        pulse.last = pulse.places.pop(threading.get_ident(), None)
        pulse.moved_s = time.monotonic()

    def guards(self, guard: AbortGuard) -> None:
        self._pulse.guard(guard)

    def report(self, error: BaseException, place: str) -> None:
        self._pulse.fail(error, place)

    def explain(self, suspects: Iterable[int]) -> str:
        suspects, end_s = tuple(suspects), time.monotonic() + PATIENCE_S
        first = view = self._fresh_view()
        while time.monotonic() < end_s:
            is_clear = first_fault(view) or unhealthy(view) or view.store_silent_s > view.silence_s
            if is_clear or _all_show_life(view, first, suspects):
                break
            time.sleep(max(0.1, self._pulse.board.interval_s / 10))
            view = self._fresh_view()
        return explain(view, suspects)

    def failed_ranks(self, ranks: Iterable[int]) -> list[int]:
        return failed_ranks(self._pulse.view(), ranks)

    def knows_failure(self) -> bool:
        view = self._pulse.view()
        return bool(unhealthy(view)) or first_fault(view) is not None or view.store_silent_s > view.silence_s

    def _fresh_view(self) -> View:
        """The view behind a new look at the board, unless whoever serves the store is known to be in trouble."""
        view = self._pulse.view()
        if any(view.seen[rank].heartbeat.serves_store for rank in unhealthy(view)):
            return view
        self._pulse.board.ask(1.0)
        return self._pulse.view()

    def step_begins(self, number: int) -> None:
        pulse = self._pulse
        if pulse.is_in_step and pulse.step == number:
            return
        pulse.step, pulse.step_began_s = number, time.monotonic()
        pulse.moved_s, pulse.is_in_step = pulse.step_began_s, True

    def step_ends(self, is_done: bool = True) -> None:
        pulse = self._pulse
        if pulse.is_in_step:
            pulse.moved_s, pulse.is_in_step = time.monotonic(), False
            if is_done:
                pulse.durations_s.append(pulse.moved_s - pulse.step_began_s)

    def among_others(self, what: str) -> AbstractContextManager[None]:
        return self._pulse.among_others(what)

    def end(self) -> None:
        self._finalizer()


def _all_show_life(view: View, before: View, suspects: Iterable[int]) -> bool:
    """Whether each suspect has given a sign of life since an earlier look, which may have shown one from before it."""
    return all(
        rank in view.seen and rank in before.seen and view.seen[rank].heartbeat.beat > before.seen[rank].heartbeat.beat
        for rank in suspects
    )


def _end(pulse: RankState, monitor: Watchdog, unchain: Callable[[], None]) -> None:
    if os.getpid() != pulse.identity.pid:
        return  # a forked child, which has neither threads nor a say
    monitor.end()
    unchain()
    pulse.say_goodbye()


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
