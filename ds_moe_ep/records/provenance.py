"""Origin of numbers: the revision, the machine, the command; and Records of all Quantities that share one."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ds_moe_ep.records.quantity import Quantity, number
from ds_moe_ep.records.record import Record

CPU_INFO = Path("/proc/cpuinfo")
GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin that all Records of one command share; `emulated` where a device or a link is not a real one."""

    command: str
    commit: str
    hardware: str
    emulated: bool = False

    def record(self, quantity: Quantity, start: str = "", notes: str = "") -> Record:
        """A Quantity as a Record, named for `start` and itself; `notes` are of one without a note."""
        return Record(
            name=f"{start}.{quantity.name}" if start else quantity.name,
            value=quantity.value,
            unit=quantity.unit,
            spread=(quantity.low, quantity.high),
            n=quantity.n,
            command=self.command,
            commit=self.commit,
            hardware=self.hardware,
            emulated=self.emulated,
            notes=quantity.note or notes,
        )


def commit() -> str:
    """The short revision of the sources that run, -dirty where they were changed; "unknown" without git."""
    here = Path(__file__).parent
    try:
        revision = _git(here, "rev-parse", "--short", "HEAD")
        changed = _git(here, "status", "--porcelain", "--", str(here.parent))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}-dirty" if changed else revision


def _git(folder: Path, *words: str) -> str:
    call = ["git", "-C", str(folder), *words]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line that runs `module` again."""
    return shlex.join(["python", "-m", module, *arguments])


def hardware(device: str, num_ranks: int) -> str:
    """One line: processor, cores, memory, ranks and the versions that matter."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "deepspeed"))
    python = ".".join(str(part) for part in sys.version_info[:3])
    ranks = "gloo ranks of one thread" if device == "cpu" else f"{device} ranks"
    machine = f"{_processor()}, {os.cpu_count()} cores, {number(memory, 0)} GiB"
    return f"{machine}; {num_ranks} {ranks}; {versions}, python {python}"


def _processor() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
