"""Stillness: how long the main thread has not moved, told by another one, since its own call does not return."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import deque
from functools import partial
from itertools import accumulate, chain, islice, repeat, takewhile
from operator import is_not, methodcaller
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")  # in paths of modules whose calls wait for other ranks
WRAPPERS = (*COLLECTIVES, "/torch/_dynamo/", "/threading.py")  # whose callers tell more of where a rank is
DECORATORS = ("wrapper", "log_wrapper", "_fn")  # of theirs, which name no collective
STILL_S = 0.05  # of the processor's time: what a thread takes that moves on


class Frame(NamedTuple):
    """One call on a thread's stack."""

    file: str
    line: int
    function: str

    @classmethod
    def of(cls, call: FrameType) -> Frame:
        """The call as text."""
        code = call.f_code
        return cls(code.co_filename.replace("\\", "/"), call.f_lineno, code.co_name)

    def is_in(self, paths: tuple[str, ...]) -> bool:
        """True where the call's module lies at one of these paths."""
        return any(path in self.file for path in paths)


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
        frames = calls_of(self._main)
        inner: list[Frame] = []
        here: Frame | None = None
        for here in map(Frame.of, frames):  # few of them: the line of a call is slow to find
            if not here.is_in(WRAPPERS):
                break
            inner.append(here)
        calls = [frame for frame in inner if frame.is_in(COLLECTIVES)]
        place = "the process" if here is None else _text(here)
        name = next((frame.function for frame in reversed(calls) if frame.function not in DECORATORS), "")
        place = f"{name}, called from {place}" if name else place
        busy_s, now_s = _processor_s(self._main), time.monotonic()
        if place != self._place or busy_s is None or busy_s - self._busy_s > STILL_S:
            self._place, self._busy_s, self._since_s = place, busy_s or 0.0, now_s
        return place, now_s - self._since_s if calls else 0.0


def stack_of(thread: int) -> list[Frame]:
    """The calls of a thread, the innermost first; none where there is no such thread."""
    return list(map(Frame.of, calls_of(thread)))


def calls_of(thread: int) -> list[FrameType]:
    """The same as Python's frames.

    Walked by one call of C, so that no other thread runs meanwhile. Step by step the walked thread may go on, and a
    generator's frame that was suspended points at a caller that is no frame any more. Nor may the collector run (up to
    Python 3.11 inside of an allocation), since finalizers let other threads run. A dump of all threads is no way: on
    Python 3.11 it reads one that is being made, by a thread of C++ that frees a tensor, and ends the process.
    """
    innermost = islice(map(methodcaller("get", thread), iter(sys._current_frames, None)), 1)
    calls = takewhile(partial(is_not, None), accumulate(chain(innermost, repeat("f_back")), getattr))
    frames: list[FrameType] = []
    walk = partial(frames.extend, calls)
    steps = (gc.disable, walk, gc.enable) if gc.isenabled() else (walk,)
    deque(map(methodcaller("__call__"), steps), maxlen=0)
    return frames


def _text(frame: Frame) -> str:
    return f"{frame.function} ({PurePath(frame.file).name}:{frame.line})"


def _processor_s(thread: int) -> float | None:
    """The processor's time that a thread has taken, where the system tells."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
