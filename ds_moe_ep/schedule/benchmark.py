"""Benchmark of schedules beside serial, round by round: the schedule that a layer takes. No clock: the caller measures.

1. All schedules and serial run two rounds. Where none is near serial, serial it is. Those with the best showings stay:
   of each its round counts in which it was nearest to that round's fastest, since what disturbs a pass, its first one
   among them, makes it longer, and no two rounds disturb the same. How far the two rounds differ says how near is near.
2. Those run on, back and forth. A round has its own share in all of its times, taken out as the median of how much
   longer than its own median each schedule took in it. What then is left in the rounds is the noise of a pass, the same
   for all of them: few rounds of several schedules tell it as many rounds of two would. So few that they may be alike
   by chance are taken together with a percent.
3. Behind each round those leave that are not likely to be faster than the first by more than LOSS: the slower ones, and
   those that are as fast. So near ones have many rounds, two or three of them, and the others few. It ends where the
   first one is left, or behind MOST_ROUNDS. The first is the one that the caller has in front, the cheapest, of those
   that are as fast.
4. Serial runs beside them until it is told apart, with neighbours of its own round. It costs nothing to keep: the first
   is taken where one of them, which it is as fast as, is faster by more than the rounds' spread lets happen by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_ROUNDS, MOST_ROUNDS = 4, 17  # the first one warms up, and counts as far as it goes
LEAST_SHOWING, MOST_SHOWING = 1.03, 1.1  # times the best showing: what stays behind two rounds,
SHOWN = 3  # by so many standard deviations of a pass,
MOST_KEPT = 3  # and two of them in any case
LOSS, LIKELY = 0.015, 3  # of a time, that may be lost; standard errors that it is certain by
NOISE, NOISE_VALUES = 0.01, 4  # of a pass, expected, and the number of measured values that it counts as much as
MIDDLE = 1.15  # standard error of `mean_of_middle` over that of a mean
TIE = 0.005  # of a time: what is closer is as fast
SURE, SURE_EARLY = 3, 5  # standard errors of a median before serial is left; before it runs no more
LEAST_TOLD = 4  # rounds that tell an error, or which are disturbed
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
    leader: Knobs = field(default_factory=lambda: SERIAL)

    def add(self, sides: Sequence[Knobs], times: Sequence[float], serial_s: float) -> None:
        """Takes a round."""
        for knobs, seconds in zip(sides, times, strict=True):
            self.seconds.setdefault(described(knobs), []).append(seconds)
        self.serial_s.append(serial_s)

    def fastest_s(self, knobs: Knobs) -> float:
        """The fastest of all its rounds."""
        return min(self.seconds[described(knobs)])

    def showing(self, knobs: Knobs) -> float:
        """Its time over the fastest one's of the same round, in the better one of the first two rounds."""
        rounds = [{name: seconds[index] for name, seconds in self.seconds.items()} for index in range(2)]
        return min(times[described(knobs)] / min(times.values()) for times in rounds)

    def standing(self, left: Sequence[Knobs]) -> Standing:
        """The standing of schedules that ran in the same rounds."""
        logs = {name: [math.log(max(s, 1e-9)) for s in self.seconds[name]] for name in map(described, left)}
        middles = {name: statistics.median(times) for name, times in logs.items()}
        num_rounds, num_sides = len(self.serial_s), len(logs)
        shares = [statistics.median(logs[name][i] - middles[name] for name in logs) for i in range(num_rounds)]
        own = {name: [t - share for t, share in zip(times, shares, strict=True)] for name, times in logs.items()}
        times = {name: mean_of_middle(found) for name, found in own.items()}
        noise = [each - times[name] for name, found in own.items() for each in found]
        # Medians of rounds and sides took a part of the noise with them.
        free = (num_rounds - 1) * (num_sides - 1)
        measured = deviation_of(noise) ** 2 * len(noise) * (free > 0)
        deviation = math.sqrt((NOISE_VALUES * NOISE**2 + measured) / (NOISE_VALUES + free))
        return Standing(times, MIDDLE * math.sqrt(2 / num_rounds) * deviation)

    def shown(self) -> float:
        """Times the best showing that others may show and be as fast, by how far the first two rounds differ."""
        changes = [math.log(first / second) for first, second, *_ in self.seconds.values()]
        own = [change - statistics.median(changes) for change in changes]
        return min(max(1 + SHOWN * deviation_of(own) / math.sqrt(2), LEAST_SHOWING), MOST_SHOWING)

    def to_serial(self, name: str) -> list[float]:
        """Its times over serial's, round by round: both had the same neighbours on the machine and on the link."""
        return [mine / its for mine, its in zip(self.seconds[name], self.serial_s, strict=False) if its]

    def beats_serial(self, knobs: Knobs, sure: float) -> bool:
        """True where it is faster than serial by so many of the errors that the rounds' spread makes, or clearly."""
        name = described(knobs)
        rounds = self.to_serial(name)
        middle, error = median_of(rounds)
        return middle + sure * error < 1 or max(rounds) < CLEAR

    def is_serial_decided(self, knobs: Knobs) -> bool:
        """True where the rounds say that this one is faster than serial, or that serial is, or that they are as fast.

        That serial is faster also by the fastest of all, since few rounds may all be disturbed.
        """
        middle, error = median_of(self.to_serial(described(knobs)))
        is_slower = middle - SURE * error > 1 and self.fastest_s(knobs) > min(filter(None, self.serial_s))
        return self.beats_serial(knobs, SURE_EARLY) or is_slower or (error < TIE and abs(middle - 1) < 2 * TIE)


def mean_of_middle(values: Sequence[float]) -> float:
    """The mean of the middle half: a fourth at each end may be disturbed, and it is surer than a median."""
    ordered, end = sorted(values), len(values) / 4
    if len(values) < LEAST_TOLD:
        return statistics.median(values)
    whole = int(end)
    left, right = ordered[whole], ordered[-1 - whole]
    inner = ordered[whole + 1 : len(ordered) - whole - 1]
    return (sum(inner) + (1 - end + whole) * (left + right)) / (len(values) / 2)


def deviation_of(noise: Sequence[float]) -> float:
    """The standard deviation of noise, within which two values in three are."""
    return sorted(map(abs, noise))[math.ceil(0.68 * (len(noise) - 1))]


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
    for index in range(2):
        found.add(left, [seconds[index] for seconds in times], serial_s[index])
    if not left or min(map(found.fastest_s, left)) > HOPELESS * min(serial_s):
        return found
    best, is_serial_decided = sorted(left, key=found.showing), False
    most = found.shown() * found.showing(best[0])
    near = [each for each in best if found.showing(each) <= most][:MOST_KEPT]
    kept = left = [knobs for knobs in left if knobs in (*near, *best[:2])]
    while len(found.serial_s) < MOST_ROUNDS:
        standing = found.standing(left)
        first = first_of(left, standing)
        if len(found.serial_s) >= LEAST_ROUNDS:
            left = [knobs for knobs in left if knobs is first or may_be_faster(knobs, first, standing)]
        is_serial_decided = is_serial_decided or found.is_serial_decided(first)
        if is_serial_decided and left == [first]:
            break
        with_serial = [] if is_serial_decided else [SERIAL]
        seconds = [each[0] for each in measure([*with_serial, *left], 1)]
        found.add(left, seconds[len(with_serial) :], seconds[0] if with_serial else 0.0)
    first = first_of(left, found.standing(left))
    # One of them that is surely faster than serial serves, since the first is as fast; else that one itself.
    sure = [knobs for knobs in kept if found.beats_serial(knobs, SURE)]
    if sure:
        found.leader = next(knobs for knobs in (first, *sure) if median_of(found.to_serial(described(knobs)))[0] < 1)
    return found


def first_of(left: Sequence[Knobs], standing: Standing) -> Knobs:
    """The first one of those that are as fast as the fastest."""
    return next(knobs for knobs in left if standing.behind(described(knobs)) <= TIE)


def may_be_faster(knobs: Knobs, first: Knobs, standing: Standing) -> bool:
    """True where it is likely enough to be faster than the first by more than may be lost."""
    behind = standing.times[described(knobs)] - standing.times[described(first)]
    return LIKELY * standing.error - behind > LOSS
