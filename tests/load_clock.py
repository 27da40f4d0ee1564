"""Seconds that ranks took, without those in which they were ready to run and others had the processors.

A stated bound, as "a survivor ends within 6 s", is that of a machine which runs whoever is ready. On a busy one the
clock alone would measure the load of the machine. Linux tells for how long each thread was ready and did not run. Who
waits for a message, a timer or another rank is not ready: all that a fault lets ranks wait for is counted in full, on
any machine. Ranks that need each other wait for whoever of them is held up most: so much is taken off.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROCESSES = Path("/proc")


class Took(NamedTuple):
    """Seconds by the clock, and those of them in which the main thread was ready and had no processor."""

    seconds: float
    held_up_s: float


def held_up_s(pid: int | str = "self") -> float:
    """For how long a process's main thread has been ready and had no processor; 0 where the system does not tell."""
    try:
        return int((PROCESSES / str(pid) / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # another system, or a process that has ended
        return 0.0


class Stopwatch:
    """Runs from now on."""

    def __init__(self) -> None:
        self._began_s, self._before_s = time.monotonic(), held_up_s()

    def read(self) -> Took:
        """Time since the start."""
        return Took(time.monotonic() - self._began_s, held_up_s() - self._before_s)


def without_load(took: Iterable[Took]) -> float:
    """The longest of the seconds of ranks that need each other, without what held one of them up most."""
    seconds, held_up = zip(*took, strict=True)
    return float(max(seconds) - max(held_up))
