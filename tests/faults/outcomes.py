"""Results of a job of `train.py`: each rank's losses, error and stderr."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

from tests.load_clock import held_up_s

NUM_RANKS = 4
Losses = dict[int, list[str]]  # step -> the bits of each rank's loss


class LoadSinceFault:
    """For how long each of some processes was ready to run and had no processor since the fault of a job."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._last: dict[int, float] = {}
        self._before: dict[int, float] = {}

    def look(self, pids: Iterable[int]) -> None:
        """Notes it now. Of a process that has ended the last look stays."""
        self._last |= {pid: max(self._last.get(pid, 0.0), held_up_s(pid)) for pid in pids}
        if not (self._folder / "fault").exists():
            self._before = dict(self._last)

    def seconds(self) -> float:
        """Seconds of the process that was held up most."""
        return max(seconds - self._before.get(pid, 0.0) for pid, seconds in self._last.items())


@dataclass(frozen=True)
class Ending:
    """How a rank ended."""

    type_name: str
    text: str
    after_s: float  # since the fault

    def __str__(self) -> str:
        return f"{self.type_name} after {self.after_s:.1f} s: {self.text}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `exit_codes` and the times of `ended` are the ranks' or, of a launched job, the launcher's.

    `held_up_s`: for how long since the fault one of the ranks was ready and had no processor, on a busy machine.
    """

    folder: pathlib.Path
    exit_codes: tuple[int, ...]
    ended: tuple[float, ...]
    seconds: float
    output: str = ""
    num_ranks: int = NUM_RANKS
    held_up_s: float = 0.0

    def ending(self, rank: int) -> Ending | None:
        """The error that ended a rank; None where it wrote none."""
        path = self.folder / f"error.{rank}"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return Ending(found["type"], found["text"], found["time"] - self.fault_time())

    def fault_time(self) -> float:
        return float((self.folder / "fault").read_text())

    def ended_after_s(self, index: int = 0) -> float:
        """From the fault to the end of a process, without what held ranks up."""
        return self.ended[index] - self.fault_time() - self.held_up_s

    def stderr(self, rank: int) -> str:
        path = self.folder / f"stderr.{rank}"
        return path.read_text(errors="replace") if path.exists() else ""

    def told(self, rank: int) -> str:
        """All that a rank said about its end."""
        return f"{self.ending(rank)}\n{self.stderr(rank)}"

    def losses(self) -> Losses:
        """The losses of the steps that every rank finished. Of a step that was run twice, the last."""
        by_rank = []
        for rank in range(self.num_ranks):
            path = self.folder / f"losses.{rank}"
            lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
            by_rank.append({int(step): bits for step, bits in lines})
        return {step: [bits[step] for bits in by_rank] for step in sorted(set.intersection(*map(set, by_rank)))}
