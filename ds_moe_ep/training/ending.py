"""How a training run ends before its last step: by a signal, by what it was given, or by another rank's failure.

No traceback where the cause is known. Exit codes: 2 for what it was given, 1 for a failure, 128 + the signal's number
after a signal, as shells count it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last one is what mpirun hands on and gives time for
ECHO_S = 2.0  # in which launchers repeat a signal that came from the terminal
HEAD_START_S = 2.0  # of rank 0, which speaks for all: launchers end a job at the first rank that ends


def end_quietly() -> None:
    """Lets Ctrl-C end the process at once and without a traceback, as SIGTERM does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Stop:
    """A scope in which the first of STOPPING asks for the end after the running step, and a later one ends at once.

    Ranks may hear of it at different steps, or one alone: they agree by the maximum of `votes`.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._ends, self._heard = socket.socketpair()
        for end in (self._ends, self._heard):
            end.setblocking(end is self._ends)

    def __enter__(self) -> Stop:
        # Python's handlers wait for the end of a call; what is written to this socket does not.
        self._before = signal.set_wakeup_fd(self._heard.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, _go_on)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(self._before)
        self._heard.close()  # ends the thread

    def votes(self) -> list[float]:
        """Signals that this rank has heard, a number for each of STOPPING."""
        return [float(number == self._asked) for number in STOPPING]

    @staticmethod
    def decided(votes: Sequence[float]) -> signal.Signals | None:
        """The signal for which the ranks end, from the maximum of their votes; None where they go on."""
        return next((number for number, vote in zip(STOPPING, votes, strict=True) if vote), None)

    def _listen(self) -> None:
        asked_s = 0.0
        while numbers := self._ends.recv(1):
            if numbers[0] not in STOPPING:
                continue
            if self._asked is None:
                self._asked, asked_s = numbers[0], time.monotonic()
            elif time.monotonic() > asked_s + ECHO_S:
                os._exit(128 + numbers[0])
        self._ends.close()


def _go_on(number: int, frame: FrameType | None) -> None:
    """Keeps a signal from its default action."""


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main()`. Errors of the package are told in a line."""
    from ds_moe_ep.errors import MoEError

    sys.excepthook = tell
    try:
        code = main()
    except MoEError as error:
        # Not `tell`: the watch has put itself behind it and lets the other ranks know.
        sys.excepthook(type(error), error, error.__traceback__)
        code = 2 if isinstance(error, ValueError) else 1
        if code == 2:  # which all ranks have: nothing is on its way
            leave_the_world()
    sys.exit(code)


def leave_the_world() -> None:
    """Ends the process's groups, which may else abort an interpreter that ends around them. Local."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells an error on stderr: in a line where it says all, and once where all ranks have it."""
    from ds_moe_ep.engine.explain_errors import first_line, is_collective
    from ds_moe_ep.errors import MoEError

    rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    if isinstance(error, MoEError) and isinstance(error, ValueError):  # of what all ranks were given
        if rank == "0":
            print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(HEAD_START_S)
    elif isinstance(error, MoEError):
        print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)  # torch puts the rank before it
    elif is_collective(error):
        words = f"a rank ended or stalled meanwhile ({first_line(error)}); look for the first error of another rank"
        print(words, file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
