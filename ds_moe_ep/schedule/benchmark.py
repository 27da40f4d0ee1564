"""Benchmark of schedules beside serial, in stages: the schedule that a layer takes. No clock: the caller measures.

1. All schedules and serial run some rounds. Where none is near serial, serial it is.
2. The slower half is out, and the rest go on. Of each its fastest round counts, since what disturbs a pass makes it
   longer, and the middle of its times beside the others' in the same round, since a fast moment of the machine is no
   merit of the schedule that ran then: the best by one or the other stay.
3. The last two run beside serial until the rounds tell them apart, or show that they are as fast, and tell serial apart
   from both; at most MOST_ROUNDS. The faster one wins, or of two that are as fast the one that came first (the caller
   has the cheapest first), where it is faster than serial by more than the rounds' spread lets happen by chance: serial
   costs nothing to keep.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STAGES = (3, 2, 3)  # rounds, behind one that warms up
MOST_ROUNDS = 12  # of the last stage
MORE_ROUNDS = 3  # at a time, while the last two are not told apart
TIE = 0.01  # of a time: what is closer is as fast
LIKELY, SURE = 2, 3  # standard errors of a median: between two schedules; before serial is left
HOPELESS = 1.1  # times serial's, of all of them after the first stage

Knobs = Mapping[str, Any]
Measure = Callable[[Sequence[Knobs], int, int], list[list[float]]]  # sides, rounds, warm-ups -> seconds per side, round
SERIAL: Knobs = {"schedule": "serial"}


def described(knobs: Knobs) -> str:
    """The schedule that the knobs name, for people."""
    others = ", ".join(f"{name}={value}" for name, value in knobs.items() if name != "schedule")
    return f"{knobs['schedule']} ({others})" if others else str(knobs["schedule"])


@dataclass
class ScheduleTimes:
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

    def middle(self, knobs: Knobs, among: Sequence[Knobs]) -> float:
        """The median of its times over the mean of all these schedules in the same round."""
        rounds = zip(*(self.seconds[described(each)] for each in among), strict=True)
        means = [statistics.fmean(times) for times in rounds]
        return statistics.median(t / mean for t, mean in zip(self.seconds[described(knobs)], means, strict=True))

    def best(self, among: Sequence[Knobs], num_kept: int) -> list[Knobs]:
        """The best of them, in their order: by the fastest round and by the middle in turns."""
        by_fastest = sorted(among, key=self.fastest_s)
        by_middle = sorted(among, key=lambda knobs: self.middle(knobs, among))
        in_turns = [knobs for pair in zip(by_middle, by_fastest, strict=True) for knobs in pair]
        kept = {described(knobs): knobs for knobs in in_turns}
        return [knobs for knobs in among if described(knobs) in list(kept)[:num_kept]]

    def to_serial(self, name: str) -> list[float]:
        """Its times over serial's, round by round: both had the same neighbours on the machine and on the link."""
        return [mine / its for mine, its in zip(self.seconds[name], self.serial_s, strict=False) if its]

    def to_other(self, knobs: Knobs, other: Knobs) -> list[float]:
        """Its times over the other's, round by round."""
        pairs = zip(self.seconds[described(knobs)], self.seconds[described(other)], strict=True)
        return [mine / its for mine, its in pairs]

    def beats_serial(self, knobs: Knobs) -> bool:
        """True where it is faster than serial, and the rounds' spread says that this is no chance."""
        middle, error = median_of(self.to_serial(described(knobs)))
        return middle + SURE * error < 1

    def is_decided(self, left: Sequence[Knobs]) -> bool:
        """True where the rounds say which of the last two is faster, or that they are as fast; and that serial is not,
        or is."""
        middle, error = median_of(self.to_serial(described(self.faster(left))))
        is_serial_sure = abs(middle - 1) > SURE * error or error < TIE / 2
        if len(left) < 2:
            return is_serial_sure
        middle, error = median_of(self.to_other(*left))
        return is_serial_sure and (abs(middle - 1) > LIKELY * error or error < TIE / 2)

    def faster(self, left: Sequence[Knobs]) -> Knobs:
        """The faster one of the last two; the first one, where they are as fast or there is no other."""
        if len(left) < 2 or statistics.median(self.to_other(*left)) <= 1 + TIE:
            return left[0]
        return left[1]


def median_of(ratios: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error by the quartiles (which a few disturbed rounds do not move)."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, 0.93 * (high - low) / len(ratios) ** 0.5


def benchmark(finalists: Sequence[Knobs], measure: Measure) -> ScheduleTimes:
    """The benchmark of the schedules, the cheapest first. `measure` is called for one stage after the other."""
    found, left = ScheduleTimes(), list(finalists)
    for stage, rounds in enumerate(STAGES):
        is_first, is_last = stage == 0, stage == len(STAGES) - 1
        if is_first or is_last:
            serial_s, *times = measure([SERIAL, *left], rounds, int(is_first))
        else:
            serial_s, times = [0.0] * rounds, measure(left, rounds, 0)
        found.add(left, times, serial_s)
        if not left or (is_first and min(map(found.fastest_s, left)) > HOPELESS * min(serial_s)):
            return found
        if not is_last:
            left = found.best(left, 2 if stage == len(STAGES) - 2 else max(2, -(-len(left) // 2)))
    num_rounds = STAGES[-1]
    while num_rounds < MOST_ROUNDS and not found.is_decided(left):
        serial_s, *times = measure([SERIAL, *left], MORE_ROUNDS, 0)
        found.add(left, times, serial_s)
        num_rounds += MORE_ROUNDS
    if found.beats_serial(best := found.faster(left)):
        found.leader = best
    return found
