"""Abort guard: closes the lanes of a group after a failure, and remembers why.

When a transfer fails, or a pass is abandoned, ranks no longer agree on what is on the wire: a retry could read rows of
the pass before. So the lanes' use ends on the spot, for every layer on them: gloo's connections close, which wakes the
peers that wait on them, NCCL's communicators are aborted, which ends the kernels that wait here, and each later use
raises with the first failure's text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CLOSING_TAG = 0x7FFFFFFF  # of a message that nobody sends
LONGEST_ABORT_S = 5.0  # how long a failure waits for communicators to end, which may wait for a connection
_MOMENT = timedelta(milliseconds=1)


class AbortGuard:
    """The guard of one group's lanes; `ranks` are global."""

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
        of_nccl = [lane for lane in self._lanes if _nccl_of(lane) is not None]
        if of_nccl:
            thread = threading.Thread(target=_abort, args=(of_nccl,), name="ds_moe_ep abort", daemon=True)
            thread.start()
            thread.join(LONGEST_ABORT_S)


def _close(group: dist.ProcessGroup, other: int) -> None:
    """Closes a gloo group's connections, as gloo does where a receive times out: so one is posted in vain.

    Whatever is on its way there fails at once, here and on the peers.
    """
    with suppress(RuntimeError):  # NCCL takes no tensor of the host
        group.recv([torch.empty(1)], other, CLOSING_TAG).wait(_MOMENT)


def _nccl_of(group: dist.ProcessGroup) -> Any:
    """The part of a group that NCCL moves, or None."""
    with suppress(RuntimeError):  # a group without a GPU
        backend = group._get_backend(torch.device("cuda"))
        return backend if hasattr(backend, "_group_start") else None
    return None


def _abort(groups: Sequence[dist.ProcessGroup]) -> None:
    """Aborts NCCL's communicators; else its kernels wait for a rank that failed until NCCL's own watchdog acts.

    Inside of one NCCL group: one after another they may wait for each other (pytorch/pytorch#119797).
    """
    backend = _nccl_of(groups[0])
    backend._group_start()
    try:
        for group in groups:
            with suppress(RuntimeError):  # one that never began
                group.abort()
    finally:
        backend._group_end()
