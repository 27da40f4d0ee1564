"""Locks of torch's extension builds, and the processes that hold them.

torch makes the file `lock` in an extension's build folder, keeps it open while it builds, and removes it. Whoever wants
the extension waits for the file to go. A build that was killed leaves the file without a process that has it open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_moe_ep.doctor.facts import BuildLock

PROCESSES = Path("/proc")


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
    holders = (
        process
        for process in processes_of(its.st_uid)
        if any((file.st_dev, file.st_ino) == (its.st_dev, its.st_ino) for file in open_files(process))
    )
    holder = next(map(named, holders), "")
    all_seen = os.geteuid() in (0, its.st_uid)
    path.stat()  # a lock that is gone by now was released, not left
    return BuildLock(age_s=time.time() - its.st_mtime, holder=holder, all_seen=all_seen)


def processes_of(user: int) -> Iterator[Path]:
    """The folders in /proc of a user's processes."""
    for process in PROCESSES.iterdir():
        try:
            if process.name.isdecimal() and process.stat().st_uid == user:
                yield process
        except FileNotFoundError:  # it has ended
            continue


def open_files(process: Path) -> Iterator[os.stat_result]:
    """The files that a process has open; none of a daemon that nobody may look into, and that builds nothing."""
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                yield descriptor.stat()
            except FileNotFoundError:
                continue
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return


def named(process: Path) -> str:
    """A process in few words: its number, and how it was started."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    command = " ".join(word for word in words if word)
    return f"process {process.name}" + (f" ({command[:60]})" if command else "")
