"""Whether the lanes of a group may still be used, and how their use ends.

When a transfer fails, or a pass is abandoned, ranks no longer agree on what is on the wire: a retry could read rows of
the pass before. So the lanes' use ends on the spot, for every layer on them: connections close, which wakes the peers
that wait on them, and each later use raises with the first failure's text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

CLOSING_TAG = 0x7FFFFFFF  # of a message that nobody sends
_MOMENT = timedelta(milliseconds=1)


class Standing:
    """The standing of one group's lanes; `ranks` are global."""

    def __init__(self, rank: int, ranks: Sequence[int], lanes: Iterable[dist.ProcessGroup]) -> None:
        self.ranks = tuple(ranks)
        self.failure: str | None = None  # the first one
        self._other = (rank + 1) % len(ranks)
        self._lanes = tuple(lanes)
        self._lock = threading.Lock()

    def end(self, failure: str) -> None:
        """Ends the use of the lanes. Local, from any thread; only the first failure is kept."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        for lane in self._lanes:
            _close(lane, self._other)


def _close(group: dist.ProcessGroup, other: int) -> None:
    """Closes a gloo group's connections, as gloo does where a receive times out: so one is posted in vain.

    Whatever is on its way there fails at once, here and on the peers. NCCL's groups are left to its watchdog.
    """
    with suppress(RuntimeError):
        group.recv([torch.empty(1)], other, CLOSING_TAG).wait(_MOMENT)
