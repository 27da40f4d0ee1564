"""Status of a process, asked of the machine that it runs on: at once, without its help."""

from __future__ import annotations

import os
import socket
from enum import Enum
from pathlib import Path

from ds_moe_ep.health.heartbeat import Identity

_PROCESSES = Path("/proc")


class ProcessStatus(Enum):
    """State of a process, as far as it is known."""

    RUNS = "runs"
    STOPPED = "is stopped"
    GONE = "is gone"
    UNKNOWN = "unknown"  # it runs on another machine, or this one does not tell


def identify() -> Identity:
    """This process."""
    host, pid = socket.gethostname(), os.getpid()
    try:
        boot = (_PROCESSES / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {os.readlink(_PROCESSES / 'self/ns/pid')}"  # the kernel's boot and the container
        if os.readlink(_PROCESSES / "self") != str(pid):
            machine = ""  # /proc shows another container's processes
        return Identity(host, machine, pid, _read(pid)[1])
    except OSError:
        return Identity(host, "", pid, 0)


def status_of(identity: Identity, machine: str) -> ProcessStatus:
    """The status of a process, as this machine knows it. A zombie is gone."""
    if not machine or identity.machine != machine:
        return ProcessStatus.UNKNOWN
    try:
        state, born = _read(identity.pid)
    except (FileNotFoundError, ProcessLookupError):
        return ProcessStatus.GONE
    except OSError:
        return ProcessStatus.UNKNOWN
    if born != identity.born or state in "ZXx":
        return ProcessStatus.GONE
    return ProcessStatus.STOPPED if state in "Tt" else ProcessStatus.RUNS


def _read(pid: int) -> tuple[str, int]:
    """The state of a process and when it was born, in the kernel's ticks."""
    with open(f"{_PROCESSES}/{pid}/stat", "rb", buffering=0) as file:  # each rank asks for all others, twice per second
        text = file.read()
    fields = text[text.rindex(b")") + 2 :].split(None, 20)  # behind its name, which may hold anything
    return fields[0].decode(), int(fields[19])
