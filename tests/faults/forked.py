"""Runs `train.py` in forked ranks that may die: nobody ends the survivors, they have to end by themselves.

The ranks come from the fork server of `tests.ranks`, so a job starts in a second. They meet as the launcher's do, at a
store that rank 0 serves, and end as a process of its own does: through `sys.excepthook` and `atexit`.
"""

from __future__ import annotations

import atexit
import multiprocessing.connection
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from ds_moe_ep.bench.harness.processes import end_with_caller, free_port
from tests.faults.outcomes import NUM_RANKS, LoadSinceFault, Outcome
from tests.ranks import _fork_server, _keep_shm_op_out, is_stopped, note_start


def run_forked(folder: pathlib.Path, *arguments: str, num_ranks: int = NUM_RANKS, limit_s: float = 90.0) -> Outcome:
    """How the job ended. One that has not ended after `limit_s` is killed and fails the test; stopped ranks may."""
    folder.mkdir(exist_ok=True)
    context, port = _fork_server(), free_port()
    note_start(num_ranks)
    argv = ["--folder", str(folder), *arguments]
    lives = [(rank, num_ranks, port, argv) for rank in range(num_ranks)]
    processes = [context.Process(target=_life, args=life, daemon=True) for life in lives]
    for process in processes:
        process.start()
    ended, start = [0.0] * num_ranks, time.monotonic()  # the fork server's own start lies behind
    load = LoadSinceFault(folder)
    try:
        while alive := [p for p in processes if p.is_alive()]:
            ended = [end or (0.0 if p in alive else time.time()) for end, p in zip(ended, processes, strict=True)]
            load.look([os.getpid(), *(p.pid for p in alive)])
            if all(is_stopped(p.pid) for p in alive):
                break
            late = time.monotonic() - start > limit_s
            assert not late, f"ranks {[processes.index(p) for p in alive]} have not ended after {limit_s:g} s"
            multiprocessing.connection.wait([p.sentinel for p in alive], timeout=0.2)
        ended = [end or time.time() for end in ended]
        seconds = time.monotonic() - start
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
    codes = tuple(p.exitcode for p in processes)
    return Outcome(folder, codes, tuple(ended), seconds, num_ranks=num_ranks, held_up_s=load.seconds())


def _life(rank: int, num_ranks: int, port: int, argv: Sequence[str]) -> None:
    """A rank, from the launcher's environment to the end of its process."""
    end_with_caller()
    atexit._clear()  # the fork server's are not this job's
    size = str(num_ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _keep_shm_op_out()
    from tests.faults import train

    code: Any = 0
    try:
        train.main(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)
