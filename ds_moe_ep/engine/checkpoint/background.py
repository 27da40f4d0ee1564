"""Saves behind training: the step waits for the copy to host memory alone (`"async_save"`).

1. DeepSpeed saves as ever, but each of its files is made in host memory. Each rank leaves a mark, `rank3.begun`: a save
   that has no room for it is refused at once.
2. A thread of each rank writes its files, has them on disk, and renames its mark to `rank3.written`, or `rank3.failed`:
   a disk without room for another file takes that too.
3. The thread of the leading rank waits for everybody's end. Where all have written it takes the marks away and
   publishes the folder.

Ranks meet in the folder and in no collective: training has all communicators for itself, and a save ends also where the
process groups do not exist any more. The threads are no daemons: a process that ends waits for its save.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_moe_ep.engine.checkpoint.folders import flush, remove
from ds_moe_ep.errors import ConfigError

logger = logging.getLogger(__name__)

BEGUN, WRITTEN, FAILED = ".begun", ".written", ".failed"
PATIENCE_S = 1800.0  # how long the leading rank waits for the others' marks
LOOK_S = 0.05  # between two looks at the marks


@dataclass(frozen=True)
class StagedFile:
    """A file of a checkpoint in host memory."""

    path: str
    content: memoryview

    def write(self) -> int:
        """Writes the file and has it on disk; returns its bytes."""
        Path(self.path).write_bytes(self.content)
        return flush(self.path)


def stage(checkpoint_engine: Any, state: Any, path: str) -> StagedFile:
    """The file that DeepSpeed's engine for checkpoints would write to `path`, in host memory."""
    memory = io.BytesIO()
    torch.save(state, memory, _use_new_zipfile_serialization=checkpoint_engine.zipfile_serialization)
    return StagedFile(path, memory.getbuffer())


def refuse_background(engine: Any) -> None:
    """Raises ConfigError for an engine whose files cannot be made in memory, or whose ranks share no folder. Local."""
    kind = type(engine.checkpoint_engine).__name__
    if kind != "TorchCheckpointEngine":
        raise ConfigError(
            f"moe_ep.async_save=true: {kind} writes its files in a way of its own; remove it from the ds_config's "
            "section 'checkpoint', or set async_save to false"
        )
    if engine.use_node_local_storage():
        raise ConfigError(
            "moe_ep.async_save=true with checkpoint.use_node_local_storage: ranks tell each other of their files in "
            "the folder that they share; set one of the two to false"
        )
    if engine.zero_nvme_offload_optimizer():
        raise ConfigError(
            "moe_ep.async_save=true: optimizer states on NVMe are copied from disk to disk; set async_save to false"
        )


def leave_mark(folder: Path, rank: int) -> None:
    """Leaves a rank's mark in the folder of a save that begins: a full disk lets it be renamed. Local."""
    folder.mkdir(exist_ok=True)
    (folder / f"rank{rank}{BEGUN}").touch()


class BackgroundSave:
    """A save of this rank's files that goes on, behind `leave_mark` of every rank. `wait` returns its problem."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[StagedFile],
        rank: int,
        num_ranks: int,
        publish: Callable[[], None] | None,
        is_hopeless: Callable[[], bool],
    ) -> None:
        """`publish` is the leading rank's; `is_hopeless` tells it that a rank is gone, whose mark will not come."""
        self.num_bytes = 0
        self._folder, self._files, self._rank, self._num_ranks = folder, list(files), rank, num_ranks
        self._publish, self._is_hopeless = publish, is_hopeless
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="ds_moe_ep save", daemon=False)
        self._thread.start()

    def wait(self) -> str:
        """The problem of this rank's part in words, "" where there was none, once it has ended."""
        self._thread.join()
        return self._problem

    def _run(self) -> None:
        self._problem = self._attempt(self._write)
        of_the_mark = self._attempt(lambda: self._mark(FAILED if self._problem else WRITTEN))
        self._problem = self._problem or of_the_mark
        if self._publish is not None:
            of_the_end = self._attempt(self._end)
            self._problem = self._problem or of_the_end
        if self._problem:
            logger.error("%s: not saved, rank %d failed: %s", self._folder, self._rank, self._problem)

    def _write(self) -> None:
        while self._files:
            file = self._files.pop(0)  # its memory goes back as soon as it is written
            try:
                self.num_bytes += file.write()
            except OSError as error:
                self._files.clear()
                raise RuntimeError(f"{file.path}: {error.strerror}") from error

    def _mark(self, end: str) -> None:
        """Tells the leading rank how this rank's part ended."""
        (self._folder / f"rank{self._rank}{BEGUN}").rename(self._folder / f"rank{self._rank}{end}")

    def _end(self) -> None:
        """Publishes the folder once everybody's files are in it. Raises RuntimeError where they cannot be."""
        marks = self._marks()
        if len(marks) < self._num_ranks:  # the folder stays: somebody may still write there
            missing = self._num_ranks - len(marks)
            raise RuntimeError(f"{missing} of {self._num_ranks} ranks did not write their files")
        if any(mark.endswith(FAILED) for mark in marks):
            return remove(self._folder)  # those ranks tell why
        for mark in marks:
            (self._folder / mark).unlink()
        assert self._publish is not None
        self._publish()

    def _marks(self) -> list[str]:
        """The marks of all ranks, or those that are there once no other will come."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            is_last = self._is_hopeless() or time.monotonic() > end_s
            marks = [path.name for path in self._folder.iterdir() if path.name.endswith((WRITTEN, FAILED))]
            if is_last or len(marks) == self._num_ranks:
                return marks
            time.sleep(LOOK_S)

    def _attempt(self, action: Callable[[], Any]) -> str:
        try:
            action()
        except RuntimeError as error:  # told to all ranks when they meet again
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""
