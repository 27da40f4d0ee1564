"""Benchmark of schedules beside serial, in stages: the schedule that a layer takes. No clock: the caller measures.

1. All schedules and serial run two rounds. Where none is near serial, serial it is. The half with the best showings
   stay: of each its round counts in which it was nearest to that round's fastest, since what disturbs a pass, its first
   one among them, makes it longer, and no two rounds disturb the same.
2. Those run on, and two stay: by the fastest of their rounds, or by the middle of their times beside the others' in the
   same round, since a fast moment of the machine is no merit of the schedule that ran then.
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

STAGES = (1, 3, 2)  # rounds, behind one that warms up and counts as far as it goes
MOST_ROUNDS = 16  # of the last stage
MORE_ROUNDS = 2  # at a time, while the last two are not told apart
TIE = 0.01  # of a time: what is closer is as fast
LIKELY, SURE = 2.5, 3  # standard errors of a median: between two schedules; before serial is left
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
    first_s: dict[str, float] = field(default_factory=dict)  # of the round that warmed up
    leader: Knobs = field(default_factory=lambda: SERIAL)

    def add(self, sides: Sequence[Knobs], times: Sequence[Sequence[float]], serial_s: Sequence[float]) -> None:
        """Takes the rounds of a stage."""
        for knobs, seconds in zip(sides, times, strict=True):
            self.seconds.setdefault(described(knobs), []).extend(seconds)
        self.serial_s += serial_s

    def warm_up(self, sides: Sequence[Knobs], times: Sequence[float]) -> None:
        """Takes the first round, which is longer for some than for others."""
        self.first_s = dict(zip(map(described, sides), times, strict=True))

    def fastest_s(self, knobs: Knobs) -> float:
        """The fastest of all its rounds."""
        name = described(knobs)
        return min([self.first_s[name], *self.seconds[name]])

    def showing(self, knobs: Knobs) -> float:
        """Its time over the fastest one's of the same round, in the round that was best for it."""
        rounds = [self.first_s, *({n: s[i] for n, s in self.seconds.items()} for i in range(len(self.serial_s)))]
        return min(times[described(knobs)] / min(times.values()) for times in rounds)

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
        or is: also by the fastest of all, since few rounds may all be disturbed."""
        best = self.faster(left)
        middle, error = median_of(self.to_serial(described(best)))
        is_slower = middle - SURE * error > 1 and self.fastest_s(best) > min(filter(None, self.serial_s))
        is_serial_sure = middle + SURE * error < 1 or is_slower or (error < TIE / 2 and abs(middle - 1) < TIE)
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
    serial_s, *times = measure([SERIAL, *left], 1 + STAGES[0], 0)
    found.warm_up(left, [seconds.pop(0) for seconds in times])
    found.add(left, times, serial_s[1:])
    if not left or min(map(found.fastest_s, left)) > HOPELESS * min(serial_s):
        return found
    kept = sorted(left, key=found.showing)[: max(2, -(-len(left) // 2))]
    left = [knobs for knobs in left if knobs in kept]
    if len(left) > 2:
        found.add(left, measure(left, STAGES[1], 0), [0.0] * STAGES[1])
        left = found.best(left, 2)
    num_rounds = 0
    while num_rounds < MOST_ROUNDS and (not num_rounds or not found.is_decided(left)):
        rounds = MORE_ROUNDS if num_rounds else STAGES[2]
        serial_s, *times = measure([SERIAL, *left], rounds, 0)
        found.add(left, times, serial_s)
        num_rounds += rounds
    best = found.faster(left)
    sure = [knobs for knobs in (best, *left) if found.beats_serial(knobs)]  # the other one, where that alone is sure
    found.leader = sure[0] if sure else SERIAL
    return found
