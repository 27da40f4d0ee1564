"""Stillness: how long the main thread has not moved, told by another one, since its own call does not return."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import PurePath
from types import FrameType

COLLECTIVES = ("torch.distributed", "deepspeed.comm")  # modules whose calls wait for other ranks
WRAPPERS = (*COLLECTIVES, "torch._dynamo", "threading")  # whose callers tell more of where a rank is
DECORATORS = ("wrapper", "log_wrapper", "_fn")  # of theirs, which name no collective
STILL_S = 0.05  # of the processor's time: what a thread takes that moves on


class Stillness:
    """The main thread, watched by another one that asks from time to time."""

    def __init__(self) -> None:
        self._main = threading.main_thread().ident or 0
        self._place = ""
        self._since_s = time.monotonic()
        self._busy_s = 0.0

    def look(self) -> tuple[str, float]:
        """Where the main thread is, and for how long it has not moved in one call that waits for other ranks.

        0 where it waits for none: a thread that computes, reads or sleeps may be slow, and comes in the end.
        """
        frames = list(_frames(sys._current_frames().get(self._main)))
        inner = list(takewhile(lambda frame: _module(frame).startswith(WRAPPERS), frames))
        calls = [frame for frame in inner if _module(frame).startswith(COLLECTIVES)]
        place = _text(frames[min(len(inner), len(frames) - 1)]) if frames else "the process"
        name = next((f.f_code.co_name for f in reversed(calls) if f.f_code.co_name not in DECORATORS), "")
        place = f"{name}, called from {place}" if name else place
        busy_s, now_s = _processor_s(self._main), time.monotonic()
        if place != self._place or busy_s is None or busy_s - self._busy_s > STILL_S:
            self._place, self._busy_s, self._since_s = place, busy_s or 0.0, now_s
        return place, now_s - self._since_s if calls else 0.0


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _text(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({PurePath(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The calls of a thread, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _processor_s(thread: int) -> float | None:
    """The processor's time that a thread has taken, where the system tells."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
