"""The loads to expect: rows of each expert in the passes to come, from those that were, the same on every rank.

Loads of a trained router are draws from shares that hardly move: many passes give them best. In the first steps they
move from pass to pass: the last pass says more than all before. `Forecast` keeps averages that forget at several paces,
and takes the one that foretold the last passes best.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 0.875  # of the loads so far behind one more pass: some eight passes count
CHANGE = 0.1  # of the rows go to other experts than before: more than draws of the same routing differ by
PACES = (KEPT, 0.5, 0.0)  # of averages, the calmest first
REMEMBERED = 0.9  # of an average's errors behind one more pass
CLEARLY = 0.8  # of a calmer average's errors: only a quicker one with fewer is followed, lest bursts are
ERRORS = 2  # passes whose errors may come again
UNEVEN = 1.2  # rows of the fullest rank over the mean, beyond which a window's first pass may move copies
MOVES = 0.05  # of the rows went to other experts than foretold: more than draws of many rows differ by


class Forecast:
    """Rows of each expert per pass, as the average has them that was nearest to the passes so far.

    The arithmetic is that of IEEE 754 alone, so machines of different kinds agree.
    """

    def __init__(self, num_experts: int) -> None:
        self._averages = [LoadAverage(num_experts, kept) for kept in PACES]
        self._missed = [0.0] * len(PACES)  # shares of the rows, summed
        self._errors: list[list[float]] = []  # rows of each expert over those that were foretold

    def add(self, rows_E: Sequence[int]) -> None:
        """One more pass, with the rows of all sources."""
        if self.has_passes:
            told_E = self.rows_E
            self._errors = [*self._errors, [a - b for a, b in zip(rows_E, told_E, strict=True)]][-ERRORS:]
            missed = [moved_share(rows_E, average.rows_E) for average in self._averages]
            self._missed = [REMEMBERED * before + now for before, now in zip(self._missed, missed, strict=True)]
        for average in self._averages:
            average.add(rows_E)
        if self.has_changed:
            self._errors = []  # of a forecast of loads that are no more

    @property
    def has_passes(self) -> bool:
        return self._averages[0].has_passes

    @property
    def has_changed(self) -> bool:
        """True where the calmest average has begun anew with the last two passes."""
        return self._averages[0].has_changed

    @property
    def rows_E(self) -> list[float]:
        """Rows of each expert in a pass to come; zeros before the first."""
        taken = 0
        for pace in range(1, len(PACES)):
            if self._missed[pace] < CLEARLY * self._missed[taken]:
                taken = pace
        return self._averages[taken].rows_E

    @property
    def others_E(self) -> list[list[float]]:
        """Loads that come as well, where the forecast errs as in one of the last passes; none where it errs little."""
        told_E = self.rows_E
        found = [[max(a + b, 0.0) for a, b in zip(told_E, errors, strict=True)] for errors in self._errors]
        return found if any(moved_share(rows_E, told_E) > MOVES for rows_E in found) else []


class LoadAverage:
    """Rows of each expert per pass, smoothed exponentially: equal on all ranks that add the same counts.

    Two passes in a row that are like each other, and unlike all before, are the loads from there on: what was before
    is forgotten. One alone may be a burst, and is smoothed. The arithmetic is that of IEEE 754 alone, so machines of
    different kinds agree.
    """

    def __init__(self, num_experts: int, kept: float = KEPT) -> None:
        self._sum_E = [0.0] * num_experts
        self._weight = 0.0
        self._kept = kept
        self._last: Sequence[int] = ()
        self.has_changed = False  # by the last pass

    def add(self, rows_E: Sequence[int]) -> None:
        """One more pass, with the rows of all sources."""
        self.has_changed = self._is_another_load(rows_E)
        if self.has_changed:
            self._sum_E, self._weight = [float(rows) for rows in self._last], 1.0
        self._last = rows_E
        self._sum_E = [self._kept * before + rows for before, rows in zip(self._sum_E, rows_E, strict=True)]
        self._weight = self._kept * self._weight + 1.0

    def _is_another_load(self, rows_E: Sequence[int]) -> bool:
        if not self._last:
            return False
        apart = moved_share(rows_E, self._sum_E)
        return min(apart, moved_share(self._last, self._sum_E)) > max(CHANGE, 2 * moved_share(rows_E, self._last))

    @property
    def has_passes(self) -> bool:
        return self._weight > 0

    @property
    def rows_E(self) -> list[float]:
        """Rows of each expert in a pass as the last ones were; zeros before the first."""
        return [total / self._weight if self._weight else 0.0 for total in self._sum_E]


def moved_share(rows_E: Sequence[float], before_E: Sequence[float]) -> float:
    """The share of the rows that goes to other experts than before; 0 where there are none."""
    total, total_before = sum(rows_E), sum(before_E)
    if not total or not total_before:
        return 0.0
    return sum(abs(a / total - b / total_before) for a, b in zip(rows_E, before_E, strict=True)) / 2
