"""Benchmark of schedules beside serial, in stages: the schedule that a layer takes. No clock: the caller measures.

1. All schedules and serial run some rounds. Where none is near serial, serial it is.
2. The slower half is out, and the rest go on; the last stage is that of two, with serial beside them again. Of each the
   fastest round counts: what disturbs a pass makes it longer, never shorter.
3. Of those two the faster one, or, where they are as fast, the one that came first (the caller has the cheapest first).
   It wins only where it is faster than serial by more than the spread of the rounds: a gain within it may be chance,
   and serial costs nothing to keep.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STAGES = (3, 2, 3)  # rounds, behind one that warms up
TIE = 0.01  # of a time: what is closer is as fast
HOPELESS = 1.1  # times serial's, of all of them after the first stage

Knobs = Mapping[str, Any]
Measure = Callable[[Sequence[Knobs], int, int], list[list[float]]]  # sides, rounds, warm-ups -> seconds per side, round
SERIAL: Knobs = {"schedule": "serial"}


def described(knobs: Knobs) -> str:
    """The schedule that the knobs name, for people."""
    others = ", ".join(f"{name}={value}" for name, value in knobs.items() if name != "schedule")
    return f"{knobs['schedule']} ({others})" if others else str(knobs["schedule"])


@dataclass
class Race:
    """Times of the schedules, round by round. `leader` is the one to take, serial where none is faster."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    serial_s: list[float] = field(default_factory=list)  # 0 in rounds in which serial stood by
    leader: Knobs = field(default_factory=lambda: SERIAL)

    def add(self, sides: Sequence[Knobs], times: Sequence[Sequence[float]], serial_s: Sequence[float]) -> None:
        """Takes the rounds of a stage."""
        for knobs, seconds in zip(sides, times, strict=True):
            self.seconds.setdefault(described(knobs), []).extend(seconds)
        self.serial_s += serial_s

    def fastest_s(self, knobs: Knobs) -> float:
        """The fastest of all its rounds."""
        return min(self.seconds[described(knobs)])

    def to_serial(self, name: str) -> list[float]:
        """Its times over serial's, round by round: both had the same neighbours on the machine and on the link."""
        return [mine / its for mine, its in zip(self.seconds[name], self.serial_s, strict=False) if its]

    def is_as_fast(self, knobs: Knobs, as_other: Knobs) -> bool:
        """True where it is faster, or slower by less than a tie."""
        return self.fastest_s(knobs) <= (1 + TIE) * self.fastest_s(as_other)

    def beats_serial(self, knobs: Knobs) -> bool:
        """True where it is faster than serial by more than the spread of the rounds."""
        low, _, high = statistics.quantiles(self.to_serial(described(knobs)), n=4, method="inclusive")
        return high + (high - low) < 1


def race(finalists: Sequence[Knobs], measure: Measure) -> Race:
    """The benchmark of the schedules, the cheapest first. `measure` is called for one stage after the other."""
    found, left = Race(), list(finalists)
    for stage, rounds in enumerate(STAGES):
        is_first, is_last = stage == 0, stage == len(STAGES) - 1
        if is_first or is_last:
            serial_s, *times = measure([SERIAL, *left], rounds, int(is_first))
        else:
            serial_s, times = [0.0] * rounds, measure(left, rounds, 0)
        found.add(left, times, serial_s)
        by_time = sorted(left, key=found.fastest_s)
        if not left or (is_first and found.fastest_s(by_time[0]) > HOPELESS * min(serial_s)):
            return found
        if not is_last:
            num_kept = 2 if stage == len(STAGES) - 2 else max(2, -(-len(left) // 2))
            left = [knobs for knobs in left if knobs in by_time[:num_kept]]
    best = next(knobs for knobs in left if found.is_as_fast(knobs, by_time[0]))
    if found.beats_serial(best):
        found.leader = best
    return found
