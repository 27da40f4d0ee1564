"""Stillness: how long the main thread has not moved, told by another one, since its own call does not return."""

from __future__ import annotations

import faulthandler
import re
import tempfile
import threading
import time
from itertools import takewhile
from pathlib import PurePath
from typing import IO, NamedTuple

COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")  # in paths of modules whose calls wait for other ranks
WRAPPERS = (*COLLECTIVES, "/torch/_dynamo/", "/threading.py")  # whose callers tell more of where a rank is
DECORATORS = ("wrapper", "log_wrapper", "_fn")  # of theirs, which name no collective
STILL_S = 0.05  # of the processor's time: what a thread takes that moves on


class Frame(NamedTuple):
    """One call on a thread's stack."""

    file: str
    line: int
    function: str

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
        self._dump: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)

    def look(self) -> tuple[str, float]:
        """Where the main thread is, and for how long it has not moved in one call that waits for other ranks.

        0 where it waits for none: a thread that computes, reads or sleeps may be slow, and comes in the end.
        """
        frames = stack_of(self._main, self._dump)
        inner = list(takewhile(lambda frame: frame.is_in(WRAPPERS), frames))
        calls = [frame for frame in inner if frame.is_in(COLLECTIVES)]
        place = _text(frames[min(len(inner), len(frames) - 1)]) if frames else "the process"
        name = next((frame.function for frame in reversed(calls) if frame.function not in DECORATORS), "")
        place = f"{name}, called from {place}" if name else place
        busy_s, now_s = _processor_s(self._main), time.monotonic()
        if place != self._place or busy_s is None or busy_s - self._busy_s > STILL_S:
            self._place, self._busy_s, self._since_s = place, busy_s or 0.0, now_s
        return place, now_s - self._since_s if calls else 0.0


def stack_of(thread: int, dump: IO[bytes]) -> list[Frame]:
    """The calls of a thread, the innermost first.

    Read from a dump that the interpreter writes in one go. Frame objects of a thread that runs are no way: one that is
    ended meanwhile points at memory that is no frame any more, and to ask it for its caller ends the process.
    """
    dump.seek(0)
    dump.truncate()
    faulthandler.dump_traceback(dump, all_threads=True)
    dump.seek(0)
    for part in dump.read().decode(errors="replace").split("\n\n"):
        head, _, calls = part.partition("\n")
        ident = re.search(r"hread 0x([0-9a-f]+)", head)
        if ident and int(ident[1], 16) == thread:
            found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', calls, re.MULTILINE)
            return [Frame(PurePath(file).as_posix(), int(line), function) for file, line, function in found]
    return []


def _text(frame: Frame) -> str:
    return f"{frame.function} ({PurePath(frame.file).name}:{frame.line})"


def _processor_s(thread: int) -> float | None:
    """The processor's time that a thread has taken, where the system tells."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
