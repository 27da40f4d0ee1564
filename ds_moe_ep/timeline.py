"""Who was busy when, and what that hides: spans of work on lanes, and interval arithmetic over them.

The same spans come from measured runs and from simulated ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """One piece of work: `name` on `lane` of `rank`, from start to stop in microseconds of that rank's clock."""

    name: str
    rank: int
    lane: str
    start_us: float
    stop_us: float


@dataclass(frozen=True)
class Overlap:
    """Communication of one rank: how long some transfer was on its way, and how much of that compute covered."""

    total_us: float
    exposed_us: float

    @property
    def hidden_us(self) -> float:
        return self.total_us - self.exposed_us

    @property
    def hidden_percent(self) -> float | None:
        """The covered share of the communication; None where there was none."""
        return 100 * self.hidden_us / self.total_us if self.total_us else None


def overlap(spans: Iterable[Span]) -> Overlap:
    """The communication of one rank's spans, and the part of it under which no compute ran."""
    compute: list[Interval] = []
    traffic: list[Interval] = []
    for span in spans:
        (compute if span.lane == "compute" else traffic).append((span.start_us, span.stop_us))
    traffic = union(traffic)
    return Overlap(length(traffic), length(without(traffic, union(compute))))


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; empty intervals vanish."""
    merged: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def without(intervals: Sequence[Interval], covers: Sequence[Interval]) -> list[Interval]:
    """The points of `intervals` that no cover contains. Both are disjoint and in order."""
    left: list[Interval] = []
    for start, stop in intervals:
        for cover_start, cover_stop in covers:
            if cover_stop <= start or cover_start >= stop:
                continue
            if cover_start > start:
                left.append((start, cover_start))
            start = max(start, cover_stop)
        if start < stop:
            left.append((start, stop))
    return left


def length(intervals: Sequence[Interval]) -> float:
    """The summed length of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)


def chrome_trace(spans: Iterable[Span]) -> str:
    """The spans as a Chrome or Perfetto trace (JSON): a process a rank, a thread a lane."""
    events = [
        {
            "name": span.name,
            "ph": "X",
            "pid": span.rank,
            "tid": span.lane,
            "ts": span.start_us,
            "dur": span.stop_us - span.start_us,
        }
        for span in spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
