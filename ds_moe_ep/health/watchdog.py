"""The monitor: a thread that looks at what the rank knows of the others and acts on it. It never blocks.

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
import statistics
import sys
import threading
import time

from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.diagnosis import View, explain, is_deadlocked, is_gone, is_silent, slow_step, spread, unhealthy
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.rank_state import RankState

logger = logging.getLogger(__name__)

MANY_TIMES = 10  # the median: from there on a step is slow
SHORTEST_SLOW_S = 3.0
FEWEST_STEPS = 5  # before there is a median to speak of
SOON_S = 0.1  # to the next look where a process went
LATEST_S = 10.0  # for its goodbye to be read
ENDING_S = 5.0  # for the last line to be written
MARGIN_S = 3.0  # in which a transfer that is late for the same reason says so itself
EXIT_CODE = 70  # "internal software error" of sysexits.h


class Watchdog:
    """Looks every `interval_s`."""

    def __init__(self, pulse: RankState, timeout_s: float, interval_s: float) -> None:
        self._pulse, self._timeout_s, self._interval_s = pulse, timeout_s, interval_s
        self._known: set[int] = set()  # who has failed or gone
        self._told: set[int] = set()  # who went, and was named in a line
        self._is_checking = False  # whether somebody who went said goodbye
        self._gone_since: dict[int, tuple[float, int]] = {}  # and the look that would read a goodbye
        self._num_read = 0
        self._looked_s = time.monotonic()
        self._in_trouble_since: dict[int, float] = {}
        self._deadlocked_since: float | None = None
        self._next_line_s = 0.0  # of the running step
        self._step = -1
        self._end = threading.Event()
        threading.Thread(target=self._run, name="ds_moe_ep monitor", daemon=True).start()

    def end(self) -> None:
        """Ends the thread, which may look once more."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(SOON_S if self._is_checking else self._interval_s):
            try:
                self._num_read = self._pulse.board.num_read  # before the view, which must not be older
                view = self._pulse.view()
                self._see_the_fallen(view)
                self._see_the_step(view)
                self._see_whether_stuck(view)
            except Exception:
                logger.exception("ds_moe_ep: rank %d: a look at the other ranks failed", self._pulse.rank)

    def _see_the_fallen(self, view: View) -> None:
        self._is_checking = False
        others = [rank for rank in view.seen if rank != view.own and rank not in self._known]
        gone = {rank for rank in others if self._has_gone(view, rank)}
        fallen = {rank for rank in others if _has_failed(view, rank)} | (gone & self._pulse.awaited())
        missed = gone - self._told if self._pulse.inside else set()
        if self._end.is_set() or not fallen | missed:
            return
        text = explain(view, fallen | missed)
        for guard in self._pulse.guarded():
            if fallen & set(guard.ranks):
                guard.end(text)
        if not fallen <= self._told or missed:
            logger.error("ds_moe_ep: rank %d sees: %s", view.own, text)
        self._known |= fallen
        self._told |= missed

    def _has_gone(self, view: View, rank: int) -> bool:
        """Whether a rank told of no fault and went without a goodbye, which may be unread for a moment."""
        heartbeat, board = view.seen[rank].heartbeat, self._pulse.board
        if heartbeat.fault is not None or heartbeat.has_left or not is_gone(view, rank):
            self._gone_since.pop(rank, None)
            return False
        if board.is_lost:
            return heartbeat.serves_store  # of the others no goodbye can be read
        if rank not in self._gone_since:
            self._gone_since[rank] = (time.monotonic(), board.hurry())
        since_s, number = self._gone_since[rank]
        is_sure = self._num_read >= number or time.monotonic() > since_s + LATEST_S
        self._is_checking |= not is_sure
        return is_sure

    def _see_the_step(self, view: View) -> None:
        pulse = self._pulse
        if not pulse.is_in_step or len(pulse.durations_s) < FEWEST_STEPS:
            return
        median_s = statistics.median(pulse.durations_s)
        took_s = time.monotonic() - pulse.step_began_s
        if self._step != pulse.step:
            self._step, self._next_line_s = pulse.step, max(MANY_TIMES * median_s, SHORTEST_SLOW_S)
        if took_s < self._next_line_s:
            return
        self._next_line_s = 2 * took_s
        wrong = unhealthy(view)
        if view.own == min(rank for rank in {*view.seen, view.own} if rank not in wrong):
            logger.warning("ds_moe_ep: %s", slow_step(view, pulse.heartbeat(), took_s, median_s))

    def _see_whether_stuck(self, view: View) -> None:
        now_s, pulse = time.monotonic(), self._pulse
        was_paused, self._looked_s = now_s - self._looked_s > view.silence_s, now_s
        if was_paused:  # as the other ranks may have been: nobody's silence counts
            self._in_trouble_since.clear()
            self._deadlocked_since = None
            pulse.moved_s = now_s
            return
        wrong = [rank for rank in view.seen if is_gone(view, rank) or is_silent(view, rank) or _has_failed(view, rank)]
        if view.store_silent_s > view.silence_s:
            servers = [rank for rank, seen in view.seen.items() if seen.heartbeat.serves_store]
            wrong += [rank for rank in servers if view.statuses.get(rank) is not ProcessStatus.RUNS]
        self._in_trouble_since = {rank: self._in_trouble_since.get(rank, now_s) for rank in wrong if rank != view.own}
        own = pulse.heartbeat()
        is_deadlocked_now = is_deadlocked(view, own, MARGIN_S)
        self._deadlocked_since = (self._deadlocked_since or now_s) if is_deadlocked_now else None
        inside, stuck_s = pulse.inside.copy(), now_s - pulse.moved_s
        if not inside or stuck_s <= self._timeout_s + MARGIN_S:
            return
        text = f"rank {view.own} has waited for {stuck_s:.0f} s in {inside[0]}, in {own.place}: "
        if now_s - min(self._in_trouble_since.values(), default=now_s) > self._timeout_s + MARGIN_S:
            self._end_process(text + explain(view, self._in_trouble_since))
        elif now_s - (self._deadlocked_since or now_s) > self._timeout_s:
            others = [rank for rank in view.seen if rank != view.own]
            self._end_process(f"{text}no rank moves, and they wait for each other: {spread(view, others)}")

    def _end_process(self, text: str) -> None:
        """Tells the other ranks, and ends the process."""
        error = PeerError(text)
        error.is_secondary = bool(self._in_trouble_since)
        self._pulse.fail(error, "")
        time.sleep(3 * self._interval_s)  # the peers read it before their connections close
        _end_process(f"ds_moe_ep: {text}; the process ends. moe_ep.timeout_s sets the limit\n")


def _has_failed(view: View, rank: int) -> bool:
    """Whether a rank told of a fault of its own."""
    fault = view.seen[rank].heartbeat.fault
    return fault is not None and not fault.is_secondary


def _end_process(text: str) -> None:
    timer = threading.Timer(ENDING_S, os._exit, (EXIT_CODE,))  # whoever reads stderr may not, and then it blocks
    timer.daemon = True
    timer.start()
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(EXIT_CODE)
