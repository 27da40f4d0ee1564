"""The excepthook: an exception that nobody catches is told to the other ranks, and the process ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

LONGEST_END_S = 15  # from an uncaught exception to the end of the process


class FaultReporter(Protocol):
    """Tells the other ranks of the end of the process."""

    def die(self, error: BaseException) -> None:
        """Tells that the process ends with `error`."""


def chain(reporter: FaultReporter) -> Callable[[], None]:
    """Puts the reporter behind sys.excepthook, which runs first; returns what takes it away again.

    Destructors of communicators may wait for transfers that no peer answers, up to the group's time limit: the process
    is ended by SIGALRM when it takes longer than 15 s, unless the program has a use for that signal. An interactive
    interpreter survives its exceptions: there nothing is told.
    """
    previous, own, pid = sys.excepthook, weakref.ref(reporter), os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        reporter = own()
        if reporter is not None and os.getpid() == pid and not (sys.flags.interactive or hasattr(sys, "ps1")):
            _bound_the_end()
            reporter.die(error)

    def unchain() -> None:
        if sys.excepthook is hook:
            sys.excepthook = previous

    sys.excepthook = hook
    return unchain


def _bound_the_end() -> None:
    if not hasattr(signal, "SIGALRM"):
        return
    is_free = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    if is_free and threading.current_thread() is threading.main_thread():
        signal.alarm(LONGEST_END_S)
