"""Filesystems that are small, in memory: what a save meets on a full disk."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(disk: pathlib.Path, limit: str) -> Iterator[pathlib.Path]:
    """A filesystem with this limit, an option of tmpfs, at a folder that is made. Skips without root."""
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    if subprocess.run([mount, "-t", "tmpfs", "-o", limit, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
