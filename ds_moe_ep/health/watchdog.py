"""The watchdog: a thread that looks at what the rank knows of the others and acts on it. It never blocks.

1. A rank that failed, or that went without a goodbye while this one waits for it: the use of the lanes that it stands
   on ends, which wakes whoever waits on them here. One line says who and why, since the launcher may end this process
   before its own error is out. A rank that went and that no transfer waits for may just be done: lanes stay in use.
2. A step that takes 10 times the median: one rank's line says which ranks are where; again at each doubling.
3. A process that is stuck in a call of the engine's: it is ended after the time limit, where a rank is gone or silent
   or has failed, or where all ranks wait for others and not in one place. A rank that moves is never the reason,
   however slow it is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.diagnosis import (
    View,
    are_blocked,
    explain,
    is_deadlocked,
    is_gone,
    is_silent,
    slow_step,
    spread,
    unhealthy,
)
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.rank_state import RankState
from ds_moe_ep.records.quantity import number

logger = logging.getLogger(__name__)

MANY_TIMES = 10  # the median: from there on a step is slow
SHORTEST_SLOW_S = 3.0  # of a job whose steps take milliseconds, a pause of the machine is no news
SOON_S = 0.1  # to the next look where a process went
LATEST_S = 10.0  # for its goodbye to be read
ENDING_S = 5.0  # for the last line to be written
MARGIN_S = 3.0  # in which a transfer that is late for the same reason says so itself
EXIT_CODE = 70  # "internal software error" of sysexits.h


class Watchdog:
    """Looks every `interval_s`."""

    def __init__(self, state: RankState, timeout_s: float, interval_s: float) -> None:
        self._state, self._timeout_s, self._interval_s = state, timeout_s, interval_s
        self._known: set[int] = set()  # who has failed or gone
        self._told: set[int] = set()  # who went, and was named in a line
        self._is_checking = False  # whether somebody who went said goodbye
        self._gone_since: dict[int, tuple[float, int]] = {}  # and the look that would read a goodbye
        self._num_read = 0
        self._looked_s = time.monotonic()
        self._unhealthy_since: dict[int, float] = {}
        self._deadlocked_since: float | None = None
        self._next_line_s = 0.0  # of the running step
        self._step = -1
        self._end = threading.Event()
        threading.Thread(target=self._run, name="ds_moe_ep watchdog", daemon=True).start()

    def end(self) -> None:
        """Ends the thread, which may look once more."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(SOON_S if self._is_checking else self._interval_s):
            try:
                self._num_read = self._state.heartbeats.num_read  # before the view, which must not be older
                view = self._state.view()
                self._look_for_failed_ranks(view)
                self._look_at_the_step(view)
                self._look_at_the_process(view)
            except Exception:
                logger.exception("ds_moe_ep: rank %d: a look at the other ranks failed", self._state.rank)

    def _look_for_failed_ranks(self, view: View) -> None:
        self._is_checking = False
        others = [rank for rank in view.seen if rank != view.own and rank not in self._known]
        gone = {rank for rank in others if self._has_gone(view, rank)}
        # A rank that is gone and that nothing here waits for may be done: its last transfer was this rank's last too.
        failed = {rank for rank in others if _has_failed(view, rank)} | (gone & self._state.awaited())
        missed = gone - self._told if self._state.waiting() is not None else set()
        if self._end.is_set() or not failed | missed:
            return
        text = explain(view, failed | missed)
        for guard in self._state.guards():
            if failed & set(guard.ranks):
                guard.end(text)
        if not failed <= self._told or missed:
            logger.error("ds_moe_ep: rank %d sees: %s", view.own, text)
        self._known |= failed
        self._told |= missed

    def _has_gone(self, view: View, rank: int) -> bool:
        """True where a rank told of no fault and went without a goodbye, which may be unread for a moment.

        A process ends between its goodbye and the next look at the store: so a look that begins now must be waited for.
        """
        heartbeat, heartbeats = view.seen[rank].heartbeat, self._state.heartbeats
        if heartbeat.fault is not None or heartbeat.has_left or not is_gone(view, rank):
            self._gone_since.pop(rank, None)
            return False
        if heartbeats.is_lost:
            return heartbeat.serves_store  # of the others no goodbye can be read
        if rank not in self._gone_since:
            self._gone_since[rank] = (time.monotonic(), heartbeats.hurry())
        since_s, number = self._gone_since[rank]
        is_sure = self._num_read >= number or time.monotonic() > since_s + LATEST_S
        self._is_checking |= not is_sure
        return is_sure

    def _look_at_the_step(self, view: View) -> None:
        step = self._state.running_step()
        if step is None:
            return
        if self._step != step.number:
            self._step, self._next_line_s = step.number, max(MANY_TIMES * step.median_s, SHORTEST_SLOW_S)
        if step.took_s < self._next_line_s:
            return
        self._next_line_s = 2 * step.took_s
        wrong = unhealthy(view)
        # One line per job, and not one per rank: the first rank that is well writes it.
        if view.own == min(rank for rank in {*view.seen, view.own} if rank not in wrong):
            logger.warning("ds_moe_ep: %s", slow_step(view, self._state.heartbeat(), step.took_s, step.median_s))

    def _look_at_the_process(self, view: View) -> None:
        """Ends the process where it is stuck, and no error of a transfer will say so."""
        now_s = time.monotonic()
        was_paused, self._looked_s = now_s - self._looked_s > view.silence_s, now_s
        if was_paused:  # as the other ranks may have been: nobody's silence counts
            self._unhealthy_since.clear()
            self._deadlocked_since = None
            self._state.forgive_pause()
            return
        wrong = [rank for rank in view.seen if is_gone(view, rank) or is_silent(view, rank) or _has_failed(view, rank)]
        if view.store_silent_s > view.silence_s:
            servers = [rank for rank, seen in view.seen.items() if seen.heartbeat.serves_store]
            wrong += [rank for rank in servers if view.statuses.get(rank) is not ProcessStatus.RUNS]
        self._unhealthy_since = {rank: self._unhealthy_since.get(rank, now_s) for rank in wrong if rank != view.own}
        # The own heartbeat reads the main thread's stack: it is asked for where the others leave the question open.
        is_deadlocked_now = are_blocked(view, MARGIN_S) and is_deadlocked(view, self._state.heartbeat(), MARGIN_S)
        self._deadlocked_since = (self._deadlocked_since or now_s) if is_deadlocked_now else None
        waiting = self._state.waiting()
        if waiting is None or waiting.still_s <= self._timeout_s + MARGIN_S:
            return
        where = f"{waiting.call}, in {self._state.heartbeat().place}"
        text = f"rank {view.own} has waited for {number(waiting.still_s, 0)} s in {where}: "
        # Each reason must have held for the limit itself: a rank may fail late in a wait that was long for another.
        if now_s - min(self._unhealthy_since.values(), default=now_s) > self._timeout_s + MARGIN_S:
            self._end_process(text + explain(view, self._unhealthy_since))
        elif now_s - (self._deadlocked_since or now_s) > self._timeout_s:
            others = [rank for rank in view.seen if rank != view.own]
            self._end_process(f"{text}no rank moves, and they wait for each other: {spread(view, others)}")

    def _end_process(self, text: str) -> None:
        """Tells the other ranks, and ends the process."""
        error = PeerError(text)
        error.is_secondary = bool(self._unhealthy_since)
        self._state.fail(error, "")
        time.sleep(3 * self._interval_s)  # the peers read it before their connections close
        _end_process(f"ds_moe_ep: {text}; the process ends. moe_ep.timeout_s sets the limit\n")


def _has_failed(view: View, rank: int) -> bool:
    """True where a rank told of a fault of its own."""
    fault = view.seen[rank].heartbeat.fault
    return fault is not None and not fault.is_secondary


def _end_process(text: str) -> None:
    timer = threading.Timer(ENDING_S, os._exit, (EXIT_CODE,))  # whoever reads stderr may not, and then it blocks
    timer.daemon = True
    timer.start()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(EXIT_CODE)
