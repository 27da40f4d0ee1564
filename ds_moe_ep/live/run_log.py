"""A run's log on disk: lines of JSON in files of a bounded size, of which the oldest go.

Files are called RUN.NUMBER.jsonl, and the names sort by time. A line goes out in one write: a run that is killed leaves
half a line at most, at the end of its last file. Nothing is ever written to another run's files.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_moe_ep.live.lines import RunHead, RunReport, end_line, to_text

MAX_FILE_BYTES = 8_000_000
MAX_FILES = 8  # of one run
NAME = re.compile(r"(\d{8}-\d{6}-[0-9a-f]{4})\.(\d{5})\.jsonl")


def new_run(time_s: float) -> str:
    """The name of a run that starts now."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(time_s))}-{os.urandom(2).hex()}"


class RunLog:
    """Writer of one run's lines. One process writes; every method may raise OSError."""

    def __init__(
        self, folder: Path, head: RunHead, max_file_bytes: int = MAX_FILE_BYTES, max_files: int = MAX_FILES
    ) -> None:
        self.head = head
        self._folder, self._max_file_bytes, self._max_files = folder, max_file_bytes, max_files
        self._number, self._num_bytes = 0, 0
        self._step, self._is_ended = 0, False
        folder.mkdir(parents=True, exist_ok=True)
        self._append(head.line())

    @property
    def path(self) -> Path:
        """The file that is written now."""
        return self._folder / f"{self.head.run}.{self._number:05d}.jsonl"

    def write(self, report: RunReport) -> None:
        """Appends a report."""
        self._step = report.step
        self._append(report.line())

    def end(self) -> None:
        """Appends the last line. A second call does nothing."""
        if not self._is_ended:
            self._is_ended = True
            self._append(end_line(self._step, time.time()))

    def _append(self, line: Mapping[str, Any]) -> None:
        text = to_text(line).encode()
        if self._num_bytes and self._num_bytes + len(text) > self._max_file_bytes:
            self._turn()
        with self.path.open("ab", buffering=0) as file:
            written = file.write(text)
        self._num_bytes += len(text)
        if written != len(text):
            raise OSError(28, "only a part of a line could be written", str(self.path))

    def _turn(self) -> None:
        """Begins the next file, and removes the oldest of this run where there are too many."""
        self._number, self._num_bytes = self._number + 1, 0
        self._append(self.head.line())
        for number in range(self._number - self._max_files, -1, -1):
            oldest = self._folder / f"{self.head.run}.{number:05d}.jsonl"
            if not oldest.exists():
                break
            oldest.unlink()
