"""Runs `train.py` under the real `deepspeed` launcher, and makes sure that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import psutil

from ds_moe_ep.bench.harness.processes import free_port
from tests.faults.outcomes import NUM_RANKS, LoadSinceFault, Outcome
from tests.ranks import REPOSITORY, SERVER_ENV, note_start

MARK = "DS_MOE_EP_FAULTS"  # in the environment of every process of a job


def launch(folder: pathlib.Path, *arguments: str, num_ranks: int = NUM_RANKS, limit_s: float = 240.0) -> Outcome:
    """How the job ended. Fails where it takes longer than `limit_s` or leaves a process behind."""
    folder.mkdir(exist_ok=True)
    note_start(num_ranks)
    mark, start = uuid.uuid4().hex, time.monotonic()
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(num_ranks), "--master_port", str(free_port())]
    command += [str(REPOSITORY / "tests" / "faults" / "train.py"), "--folder", str(folder), *arguments]
    environment = os.environ | SERVER_ENV | {"PYTHONPATH": str(REPOSITORY), MARK: mark}
    with (folder / "launcher.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log)
    load, job = LoadSinceFault(folder), psutil.Process(process.pid)
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                load.look([os.getpid(), process.pid, *(child.pid for child in job.children(recursive=True))])
            assert time.monotonic() - start < limit_s, f"the launcher has not ended after {limit_s:g} s"
            time.sleep(0.2)
        code, ended, seconds = process.returncode, time.time(), time.monotonic() - start
        orphans = left_behind(mark, patience_s=10.0)  # a process that was ended needs a processor for its end
    finally:
        for left in left_behind(mark, 0.0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait()
    assert orphans == [], f"processes are left of the job: {orphans}"
    output = (folder / "launcher.log").read_text(errors="replace")
    return Outcome(folder, (code,), (ended,), seconds, output, num_ranks, load.seconds())


def left_behind(mark: str, patience_s: float) -> list[int]:
    """The processes with the mark, once there are none or the patience ends. Zombies are no processes."""
    deadline = time.monotonic() + patience_s
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
