"""Locks of torch's extension builds, and the processes that hold them.

torch makes the file `lock` in an extension's build folder, keeps it open while it builds, and removes it. Whoever wants
the extension waits for the file to go. A build that was killed leaves the file without a process that has it open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from ds_moe_ep.doctor.facts import BuildLock


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch builds extensions."""
    folder = environment.get("TORCH_EXTENSIONS_DIR")
    if folder:
        return Path(folder)
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def build_locks(folder: Path) -> dict[str, BuildLock]:
    """The locks under `folder`, by path, with the process that holds each, where one does."""
    found: dict[str, BuildLock] = {}
    for path in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            found[str(path)] = lock_at(path)
        except FileNotFoundError:  # its build has ended
            continue
    return found


def lock_at(path: Path) -> BuildLock:
    """The lock and its holder. Raises FileNotFoundError where there is no lock."""
    its = path.stat()
    holders = (process for process in psutil.process_iter() if _holds(process, its))
    holder = next(map(named, holders), "")
    all_seen = os.geteuid() in (0, its.st_uid)
    path.stat()  # a lock that is gone by now was released, not left
    return BuildLock(age_s=time.time() - its.st_mtime, holder=holder, all_seen=all_seen)


def _holds(process: psutil.Process, lock: os.stat_result) -> bool:
    with suppress(psutil.Error):  # it has ended
        return bool(process.uids().real == lock.st_uid) and any(
            os.path.samestat(file, lock) for file in open_files(process.pid)
        )
    return False


def open_files(pid: int) -> Iterator[os.stat_result]:
    """The files that a process has open; none of a daemon that nobody may look into, and that builds nothing.

    psutil tells them by path, and a container may have the folder in another place.
    """
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                yield descriptor.stat()


def named(process: psutil.Process) -> str:
    """A process in few words: its number, and how it was started."""
    command = ""
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
    return f"process {process.pid}" + (f" ({command[:60]})" if command else "")
