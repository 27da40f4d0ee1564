"""Starts the ranks of a benchmark on this machine and listens to them; they never outlive the caller."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ds_moe_ep.config.command_line import refused
from ds_moe_ep.errors import EngineError, MoEError

POLL_S = 0.5
END_S = 10.0
PR_SET_PDEATHSIG = 1
FAILED = 1  # the exit code of a benchmark that did not come to its end


@dataclass(frozen=True)
class Finding:
    """Numbers about one side of one case, or (what="error"/"phase") a line of text."""

    case: str
    side: str
    what: str  # what was measured (time in s, bytes, ...), or phase, error, done
    values: tuple[float, ...] = ()
    text: str = ""


RunRank = Callable[[int, Any, Any], None]  # rank, plan, where its findings go


def die_with_parent() -> None:
    """Asks Linux to end this process when the thread that started it ends, however it ends."""
    parent = os.getppid()
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked
        os._exit(1)


def live_as_rank(rank: int, findings: Any, run: Callable[[Callable[[Finding], object]], None]) -> None:
    """The life of one rank: `run(tell)` to its end, with its error told to the parent; rank 0 tells what it finds."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    tell = findings.put if rank == 0 else _silent
    try:
        run(tell)
        tell(Finding("", "", "done"))
    except Exception:
        findings.put(Finding("", f"rank {rank}", "error", text=traceback.format_exc()))
        raise SystemExit(1) from None


def _silent(finding: Finding) -> None:
    return None


def loopback_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The launcher's variables for one rank of a world on this machine's loopback."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_ranks(
    run: RunRank, plan: object, num_ranks: int, preload: Sequence[str] = ()
) -> Iterator[tuple[list[BaseProcess], multiprocessing.Queue[Finding]]]:
    """The started ranks; they are gone when the block ends, however it ends.

    With modules to preload the ranks are forked from one process that has imported them, else each imports its own.
    """
    context = multiprocessing.get_context("forkserver") if preload else multiprocessing.get_context("spawn")
    inbox: multiprocessing.Queue[Finding] = context.Queue()
    processes: list[BaseProcess] = [
        context.Process(target=run, args=(rank, plan, inbox), daemon=True) for rank in range(num_ranks)
    ]
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C must not reach starting ranks
    try:
        if preload:
            context.set_forkserver_preload(list(preload))
            forkserver.ensure_running()
        else:
            _start(processes)
    finally:
        signal.signal(signal.SIGINT, previous)
    try:
        if preload:
            with late_interrupt():  # a rank asked for and abandoned would end in a traceback
                _start(processes)  # behind the imports
        yield processes, inbox
        for process in processes:
            process.join(END_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join(END_S)


@contextmanager
def late_interrupt() -> Iterator[None]:
    """A scope in which Ctrl-C waits for the end of the scope."""
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


def _start(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.start()


def on_console(run: Callable[[list[str], Console], int], arguments: Sequence[str] | None, width: int) -> int:
    """The status of `run(words, console)` on a command line, sys.argv's by default; an error is told on stderr.

    2 where the command line cannot be, before any rank starts; 1 for what failed while it ran. The console is as wide
    as the terminal, and `width` columns where there is none.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else width)
    try:
        return run(words, console)
    except EngineError as error:
        refused(error)
        return FAILED
    except MoEError as error:
        return refused(error)


def follow(
    console: Console,
    ranks: AbstractContextManager[tuple[list[BaseProcess], multiprocessing.Queue[Finding]]],
    bar: tuple[str, int],
    see: Callable[[Finding, Callable[..., None]], object],
    save: Callable[[], object],
) -> int:
    """Follows started ranks to their end behind a progress bar of a title and a total; 0, or 130 after Ctrl-C.

    `see(finding, update)` takes each finding and may move the bar by rich's `update(description=..., advance=...)`.
    `save` is called at the end, however it comes.
    """
    title, total = bar
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress, ranks as (processes, inbox):
            update = partial(progress.update, progress.add_task(title, total=total))
            for finding in arriving(processes, inbox):
                see(finding, update)
            update(completed=total)
    except KeyboardInterrupt:
        console.print("interrupted: the records hold what was measured until now")
        return 130
    finally:
        save()
    return 0


def arriving(processes: Sequence[BaseProcess], inbox: multiprocessing.Queue[Finding]) -> Iterator[Finding]:
    """Findings until the ranks are done. Raises EngineError with the error of the rank that failed first."""
    while True:
        try:
            finding = inbox.get(timeout=POLL_S)
        except queue.Empty:
            failed = [f"rank {r} ended with {p.exitcode}" for r, p in enumerate(processes) if p.exitcode]
            if failed:
                message = f"bench.ranks={len(processes)}: {', '.join(failed)} without a word; run it again"
                raise EngineError(message) from None
            continue
        if finding.what == "error":
            raise EngineError(f"bench.ranks={len(processes)}: {finding.side} failed:\n{finding.text}")
        if finding.what == "done":
            return
        yield finding
