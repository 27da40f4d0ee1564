"""Benchmark of schedules beside serial, round by round: the schedule that a layer takes. No clock: the caller measures.

1. All schedules and serial run two rounds. Where none is near serial, serial it is. Those with the best showings stay:
   of each its round counts in which it was nearest to that round's fastest, since what disturbs a pass, its first one
   among them, makes it longer, and no two rounds disturb the same.
2. Those run on, back and forth. A round has its own share in all of its times, taken out as the median of how much
   longer than its own median each schedule took in it. What then is left in the rounds is the noise of a pass, the same
   for all of them: few rounds of several schedules tell it as many rounds of two would. Behind each round those leave
   that are surely slower than the first.
3. It ends where none that is left is likely to be faster than the first by more than LOSS, or behind MOST_ROUNDS. Of
   those that are as fast the one that came first is taken: the caller has the cheapest first.
4. Serial runs beside them until it is told apart, with neighbours of its own round. It costs nothing to keep: another
   one is taken where it is faster by more than the rounds' spread lets happen by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_ROUNDS, MOST_ROUNDS = 3, 16  # behind one that warms up and counts as far as it goes
SHOWING = 1.1  # times the best showing: what stays behind two rounds,
MOST_KEPT = 4  # and two of them in any case
SLOWER = 3  # standard errors between two schedules: the slower one leaves
LOSS, LIKELY = 0.015, 2.5  # of a time, that may be lost; standard errors that it is certain by
TIE = 0.005  # of a time: what is closer is as fast
SURE, SURE_EARLY = 3, 5  # standard errors of a median before serial is left; before it runs no more
LEAST_TOLD = 4  # rounds beside serial that tell an error
CLEAR = 0.93  # times serial's, in each of two rounds: it is left without more of them
HOPELESS = 1.1  # times serial's, of all of them behind two rounds

Knobs = Mapping[str, Any]
Measure = Callable[[Sequence[Knobs], int], list[list[float]]]  # sides, rounds -> seconds per side, round
SERIAL: Knobs = {"schedule": "serial"}


def described(knobs: Knobs) -> str:
    """The schedule that the knobs name, for people."""
    others = ", ".join(f"{name}={value}" for name, value in knobs.items() if name != "schedule")
    return f"{knobs['schedule']} ({others})" if others else str(knobs["schedule"])


@dataclass(frozen=True)
class Standing:
    """Schedules beside each other: logarithms of their times with the rounds' shares taken out, and their error."""

    times: Mapping[str, float]
    error: float  # of the difference of two

    def behind(self, name: str) -> float:
        """How much more time it takes than the first, as a share."""
        return self.times[name] - min(self.times.values())


@dataclass
class ScheduleTimes:
    """Times of the schedules, round by round. `leader` is the one to take, serial where none is faster."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    serial_s: list[float] = field(default_factory=list)  # 0 in rounds in which serial stood by
    first_s: dict[str, float] = field(default_factory=dict)  # of the round that warmed up
    first_serial_s: float = 0.0
    leader: Knobs = field(default_factory=lambda: SERIAL)

    def warm_up(self, sides: Sequence[Knobs], times: Sequence[float], serial_s: float) -> None:
        """Takes the first round, which is longer for some than for others."""
        self.first_s, self.first_serial_s = dict(zip(map(described, sides), times, strict=True)), serial_s

    def add(self, sides: Sequence[Knobs], times: Sequence[float], serial_s: float) -> None:
        """Takes a round."""
        for knobs, seconds in zip(sides, times, strict=True):
            self.seconds.setdefault(described(knobs), []).append(seconds)
        self.serial_s.append(serial_s)

    def fastest_s(self, knobs: Knobs) -> float:
        """The fastest of all its rounds."""
        return min(self.first_s[described(knobs)], *self.seconds[described(knobs)])

    def showing(self, knobs: Knobs) -> float:
        """Its time over the fastest one's of the same round, in the better one of the first two rounds."""
        rounds = [self.first_s, {name: seconds[0] for name, seconds in self.seconds.items()}]
        return min(times[described(knobs)] / min(times.values()) for times in rounds)

    def standing(self, left: Sequence[Knobs]) -> Standing:
        """The standing of schedules that ran in the same rounds."""
        logs = {name: [math.log(max(s, 1e-9)) for s in self.seconds[name]] for name in map(described, left)}
        middles = {name: statistics.median(times) for name, times in logs.items()}
        num_rounds, num_sides = len(self.serial_s), len(logs)
        shares = [statistics.median(logs[name][i] - middles[name] for name in logs) for i in range(num_rounds)]
        own = {name: [t - share for t, share in zip(times, shares, strict=True)] for name, times in logs.items()}
        times = {name: statistics.median(found) for name, found in own.items()}
        noise = sorted(abs(each - times[name]) for name, found in own.items() for each in found)
        # Two in three are within a standard deviation; medians of rounds and sides took a part of the noise with them.
        deviation = noise[math.ceil(0.68 * (len(noise) - 1))]
        deviation *= math.sqrt(len(noise) / max((num_rounds - 1) * (num_sides - 1), 1))
        return Standing(times, MEDIAN * math.sqrt(2 / num_rounds) * deviation)

    def to_serial(self, name: str) -> list[float]:
        """Its times over serial's, round by round: both had the same neighbours on the machine and on the link."""
        return [mine / its for mine, its in zip(self.seconds[name], self.serial_s, strict=False) if its]

    def beats_serial(self, knobs: Knobs, sure: float) -> bool:
        """True where it is faster than serial by so many of the errors that the rounds' spread makes, or clearly."""
        name = described(knobs)
        rounds = self.to_serial(name)
        middle, error = median_of(rounds)
        return middle + sure * error < 1 or max(*rounds, self.first_s[name] / self.first_serial_s) < CLEAR

    def is_serial_decided(self, knobs: Knobs) -> bool:
        """True where the rounds say that this one is faster than serial, or that serial is, or that they are as fast.

        That serial is faster also by the fastest of all, since few rounds may all be disturbed.
        """
        middle, error = median_of(self.to_serial(described(knobs)))
        is_slower = middle - SURE * error > 1 and self.fastest_s(knobs) > min(filter(None, self.serial_s))
        return self.beats_serial(knobs, SURE_EARLY) or is_slower or (error < TIE and abs(middle - 1) < 2 * TIE)


MEDIAN = 1.25  # standard error of a median over that of a mean


def median_of(ratios: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard error by the quartiles (which a few disturbed rounds do not move).

    Fewer rounds than LEAST_TOLD may be near each other by chance, and tell no error.
    """
    if len(ratios) < LEAST_TOLD:
        return statistics.median(ratios), math.inf
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, 0.93 * (high - low) / len(ratios) ** 0.5


def benchmark(finalists: Sequence[Knobs], measure: Measure) -> ScheduleTimes:
    """The benchmark of the schedules, the cheapest first. `measure` is called for one round after the other."""
    found, left = ScheduleTimes(), list(finalists)
    serial_s, *times = measure([SERIAL, *left], 2)
    found.warm_up(left, [first for first, _ in times], serial_s[0])
    found.add(left, [second for _, second in times], serial_s[1])
    if not left or min(map(found.fastest_s, left)) > HOPELESS * min(serial_s):
        return found
    best = sorted(left, key=found.showing)
    kept = [each for each in best if found.showing(each) <= SHOWING * found.showing(best[0])][:MOST_KEPT]
    left = [knobs for knobs in left if knobs in (*kept, *best[:2])]
    is_serial_decided, standing = False, found.standing(left)
    for num_rounds in range(1, MOST_ROUNDS):
        if num_rounds >= LEAST_ROUNDS:
            left = [knobs for knobs in left if standing.behind(described(knobs)) <= SLOWER * standing.error]
            standing = found.standing(left)
        first = first_of(left, standing, 0.0)
        is_serial_decided = is_serial_decided or found.is_serial_decided(first)
        if num_rounds >= LEAST_ROUNDS and is_serial_decided and is_settled(left, first, standing):
            break
        with_serial = [] if is_serial_decided else [SERIAL]
        seconds = [each[0] for each in measure([*with_serial, *left], 1)]
        found.add(left, seconds[len(with_serial) :], seconds[0] if with_serial else 0.0)
        standing = found.standing(left)
    first = first_of(left, standing, TIE)
    # Another one, where that alone is sure.
    sure = [knobs for knobs in (first, *left) if found.beats_serial(knobs, SURE)]
    found.leader = sure[0] if sure else SERIAL
    return found


def first_of(left: Sequence[Knobs], standing: Standing, tie: float) -> Knobs:
    """The first one of those that are as fast as the fastest."""
    return next(knobs for knobs in left if standing.behind(described(knobs)) <= tie)


def is_settled(left: Sequence[Knobs], first: Knobs, standing: Standing) -> bool:
    """True where none of the others is likely to be faster than the first by more than may be lost."""
    others = [standing.behind(described(knobs)) for knobs in left if knobs is not first]
    return not others or LIKELY * standing.error - min(others) <= LOSS
