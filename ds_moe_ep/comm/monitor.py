"""The monitor: a thread that looks at what the rank knows of the others and acts on it. It never blocks.

1. A rank that failed or went: the use of the lanes that it stands on ends, which wakes whoever waits on them here. One
   line says who and why, since the launcher may end this process before its own error is out.
2. A step that takes 10 times the median: one rank's line says which ranks are where; again at each doubling.
3. A process that is stuck in a collective that is not this package's, for a rank that is gone or silent: it is ended
   after the time limit. A rank that shows signs of life is never the reason, however slow it is.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time

from ds_moe_ep.comm.pulse import Pulse
from ds_moe_ep.comm.verdict import View, explain, is_gone, is_silent, slow_step, troubles

logger = logging.getLogger(__name__)

MANY_TIMES = 10  # the median: from there on a step is slow
SHORTEST_SLOW_S = 3.0
FEWEST_STEPS = 5  # before there is a median to speak of
SOON_S = 0.1  # to the next look where a process went
LATEST_S = 0.5  # for its goodbye to be read
MARGIN_S = 3.0  # in which a transfer that is late for the same reason says so itself
EXIT_CODE = 70  # "internal software error" of sysexits.h


class Monitor:
    """Looks every `interval_s`."""

    def __init__(self, pulse: Pulse, timeout_s: float, interval_s: float) -> None:
        self._pulse, self._timeout_s, self._interval_s = pulse, timeout_s, interval_s
        self._known: set[int] = set()  # who has failed or gone
        self._gone_since: dict[int, float] = {}  # without a goodbye as yet
        self._in_trouble_since: dict[int, float] = {}
        self._next_line_s = 0.0  # of the running step
        self._step = -1
        self._end = threading.Event()
        threading.Thread(target=self._run, name="ds_moe_ep monitor", daemon=True).start()

    def end(self) -> None:
        """Ends the thread, which may look once more."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(SOON_S if self._gone_since.keys() - self._known else self._interval_s):
            view = self._pulse.view()
            self._see_the_fallen(view)
            self._see_the_step(view)
            self._see_whether_stuck(view)

    def _see_the_fallen(self, view: View) -> None:
        fallen = {rank for rank in view.seen if rank != view.own and self._has_fallen(view, rank)}
        new = fallen - self._known
        self._known |= new
        if not new or self._end.is_set():
            return
        text = explain(view, new)
        for standing in list(self._pulse.standings):
            if new & set(standing.ranks):
                standing.end(text)
        logger.error("ds_moe_ep: rank %d sees: %s", view.own, text)

    def _has_fallen(self, view: View, rank: int) -> bool:
        """Whether a rank failed by itself, or went without a goodbye, which may be unread for a moment."""
        fault = view.seen[rank].sign.fault
        if fault is not None or view.seen[rank].sign.has_left or not is_gone(view, rank):
            return fault is not None and not fault.is_echo
        if rank not in self._gone_since:
            self._gone_since[rank] = time.monotonic()
            self._pulse.board.hurry()
        since_s = self._gone_since[rank]
        return view.seen[rank].read_s > since_s + SOON_S or time.monotonic() > since_s + LATEST_S

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
        wrong = troubles(view)
        if view.own == min(rank for rank in {*view.seen, view.own} if rank not in wrong):
            logger.warning("ds_moe_ep: %s", slow_step(view, pulse.sign(), took_s, median_s))

    def _see_whether_stuck(self, view: View) -> None:
        now_s, pulse = time.monotonic(), self._pulse
        wrong = [rank for rank in view.seen if is_gone(view, rank) or is_silent(view, rank)]
        if view.store_silent_s > view.silence_s:
            wrong += [rank for rank, seen in view.seen.items() if seen.sign.serves_store]
        self._in_trouble_since = {rank: self._in_trouble_since.get(rank, now_s) for rank in wrong if rank != view.own}
        longest_s = max((now_s - since_s for since_s in self._in_trouble_since.values()), default=0.0)
        stuck_s = now_s - pulse.moved_s
        is_among_others = pulse.is_in_step or pulse.is_saving
        if is_among_others and min(longest_s, stuck_s) > self._timeout_s + MARGIN_S:
            what = "a checkpoint" if pulse.is_saving else f"step {pulse.step}"
            _end_process(
                f"ds_moe_ep: rank {view.own} has waited for {stuck_s:.0f} s in {what}, in "
                f"{pulse.sign().place}: {explain(view, self._in_trouble_since)}; the process ends. "
                "moe_ep.timeout_s sets the limit\n"
            )


def _end_process(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(EXIT_CODE)
