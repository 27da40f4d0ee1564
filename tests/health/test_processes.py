"""Knowledge of a machine's processes: real ones that run, are stopped, have ended, or whose number is another's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ds_moe_ep.health.heartbeat import Identity
from ds_moe_ep.health.processes import ProcessStatus, identify, status_of
from tests.health.test_watch import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HERE = "this machine"


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps, with a name that looks like the end of a name and the state of a zombie."""
    name = tmp_path / "a) Z 1 (b) T"
    name.symlink_to("/bin/sleep")
    with subprocess.Popen([str(name), "60"]) as process:
        wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        yield process
        process.kill()


def identity_of(pid: int) -> Identity:
    process = psutil.Process(pid)
    born = round((process.create_time() - psutil.boot_time()) * os.sysconf("SC_CLK_TCK"))
    return Identity("n0", HERE, pid, born)


def test_a_process_tells_its_host_number_and_birth_and_the_same_machine_as_another_process_of_it() -> None:
    own = identify()
    code = "from ds_moe_ep.health.processes import identify; print(identify().machine)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert own.machine == other != ""
    assert (own.host, own.pid) == (socket.gethostname(), os.getpid())
    assert own.born == identity_of(own.pid).born
    assert status_of(own, own.machine) is ProcessStatus.RUNS


def test_a_process_runs_is_stopped_runs_again_and_is_gone_as_a_zombie_too(child: subprocess.Popen[bytes]) -> None:
    known = identity_of(child.pid)
    assert status_of(known, HERE) is ProcessStatus.RUNS
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: status_of(known, HERE) is ProcessStatus.STOPPED)
    child.send_signal(signal.SIGCONT)
    wait_for(lambda: status_of(known, HERE) is ProcessStatus.RUNS)
    child.kill()
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert status_of(known, HERE) is ProcessStatus.GONE
    child.wait()
    assert status_of(known, HERE) is ProcessStatus.GONE


def test_a_number_that_another_process_has_by_now_is_a_process_that_is_gone(child: subprocess.Popen[bytes]) -> None:
    known = identity_of(child.pid)
    for other in (known.born - 1, known.born + 1):
        assert status_of(replace(known, born=other), HERE) is ProcessStatus.GONE


def test_of_another_machines_processes_and_where_a_machine_does_not_tell_nothing_is_known(
    child: subprocess.Popen[bytes],
) -> None:
    known = identity_of(child.pid)
    assert status_of(known, "that machine") is ProcessStatus.UNKNOWN
    assert status_of(replace(known, machine=""), "") is ProcessStatus.UNKNOWN
