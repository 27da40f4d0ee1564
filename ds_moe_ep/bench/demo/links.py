"""An emulated link: real messages, which leave a node no faster than a rate allows.

The model: each node has one uplink, which its ranks share, first come, first served. A transfer's messages to other
nodes are handed to the real transport once their bytes would have passed the uplink; so they arrive no earlier, and no
rank needs another one's clock. Messages within a node, and small collectives, pass at once. There is no latency, and
no limit at the receiving end: with even loads the senders' limits imply it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.schedule.spans import NO_TAGS, Tags


class Uplink:
    """The uplink of one node, shared by the processes that open the same file.

    The file holds the moment at which the link is free again, on the clock that all processes of a machine share. It
    is locked by the kernel, which takes the lock from a process that is killed.
    """

    def __init__(self, path: Path, bytes_per_s: float) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._bytes_per_s = bytes_per_s
        self._threads = threading.Lock()  # the file's lock is the whole process's

    def passes_at(self, num_bytes: int) -> float:
        """When so many bytes, from now on and behind those of before, have passed: a moment of time.monotonic."""
        with self._threads:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                word = os.pread(self._file, 8, 0)
                free_s = struct.unpack("d", word)[0] if word else 0.0
                free_s = max(free_s, time.monotonic()) + num_bytes / self._bytes_per_s
                os.pwrite(self._file, struct.pack("d", free_s), 0)
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
        return float(free_s)


class Paced(InFront):
    """A transport whose messages to other nodes pass the node's uplink; `far` are their peers in the group."""

    def __init__(self, inner: Transport, uplink: Uplink, far: frozenset[int]) -> None:
        super().__init__(inner)
        self._uplink, self._far = uplink, far

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        """Returns once the messages have passed the uplink: the lane's thread sleeps meanwhile."""
        num_bytes = sum(message.num_bytes for message in sends if message.peer in self._far)
        if num_bytes:
            time.sleep(max(0.0, self._uplink.passes_at(num_bytes) - time.monotonic()))
        return self._inner.start(lane, sends, receives, tags)
