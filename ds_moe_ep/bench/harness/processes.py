"""Starts the ranks of a benchmark on this machine and listens to them; they never outlive the caller."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pathlib
import queue
import random
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

from ds_moe_ep.errors import EngineError

POLL_S = 0.5
END_S = 10.0
PR_SET_PDEATHSIG = 1
NUM_PORTS = 12_000  # below those of outgoing connections; Linux gives 32,768 and up


@dataclass(frozen=True)
class Finding:
    """A rank's message: samples under the names of their Records, or a text of some kind."""

    kind: str = "samples"  # or phase, line, error, done; others are a benchmark's own
    text: str = ""
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rank: int = 0
    advance: int = 0  # steps that the progress bar moves by


Tell = Callable[[Finding], object]
RunRank = Callable[[int, Any, Any], None]  # rank, plan, where its findings go


def die_with_parent() -> None:
    """Asks Linux to end this process when the thread that started it ends, however it ends."""
    parent = os.getppid()
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked
        os._exit(1)


def end_with_caller() -> None:
    """Ends this rank when the process that asked for it ends, however it ends.

    A fork server lives as long as one of its ranks does, and no rank of it would hear of the caller's end as its child.
    """
    die_with_parent()
    caller = multiprocessing.parent_process()
    if caller is not None:
        threading.Thread(target=_end_behind, args=(caller,), name="end with the caller", daemon=True).start()


def _end_behind(caller: Any) -> None:
    caller.join()
    os.kill(os.getpid(), signal.SIGKILL)


def live_as_rank(rank: int, findings: Any, run: Callable[[Tell], object]) -> None:
    """The life of one rank: `run(tell)` to its end, with its error told to the parent; rank 0 tells what it finds."""
    end_with_caller()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    tell = findings.put if rank == 0 else silent
    try:
        run(tell)
        tell(Finding("done"))
    except Exception:
        findings.put(Finding("error", traceback.format_exc(), rank=rank))
        raise SystemExit(1) from None


def silent(finding: Finding) -> None:
    """Tells nobody."""


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
    """A port that nothing listens on, and that no outgoing connection gets until the caller listens on it.

    A port that the system chose itself would be one of those that it gives to the next connections of every process.
    """
    first = _first_outgoing_port()
    for port in random.SystemRandom().sample(range(first - NUM_PORTS, first), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineError(f"ports {first - NUM_PORTS} to {first - 1}: 100 tried, all taken; end a job and start again")


def _first_outgoing_port() -> int:
    """The lowest port that the system gives to outgoing connections, or its usual one where that is not to be had."""
    with suppress(OSError, ValueError):
        first = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        if first > NUM_PORTS + 1024:
            return first
    return 32768


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
        if finding.kind == "error":
            raise EngineError(f"bench.ranks={len(processes)}: rank {finding.rank} failed:\n{finding.text}")
        if finding.kind == "done":
            return
        yield finding
