"""Who was busy when, and what that hides: spans of work on lanes, and interval arithmetic over them.

The same spans come from measured runs and from simulated ones. Times are in microseconds of one rank's clock; work of
several ranks is never compared by it, only summed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import replace_file

Interval = tuple[float, float]

LANES = ("compute", "dispatch", "combine")  # in the order in which a trace shows them
NEAR_LANES = ("spread", "gather")  # transfers inside of a node, of two-level dispatch


@dataclass(frozen=True)
class Tags:
    """Whose work it was: the layer, the pass ("forward", "backward"), and the peers that it concerns."""

    layer: str = ""
    phase: str = ""
    peers: str = ""

    @property
    def group(self) -> Tags:
        """The same with the peers alone: without the part of their rows, "(1/2)", that a piece may name."""
        return Tags(self.layer, self.phase, self.peers.partition(" (")[0])


NO_TAGS = Tags()


@dataclass(frozen=True)
class Span:
    """One piece of work: `name` on `lane` of `rank`, from start to stop in microseconds of that rank's clock."""

    name: str
    rank: int
    lane: str
    start_us: float
    stop_us: float
    tags: Tags = Tags()


@dataclass(frozen=True)
class Overlap:
    """How long some transfer was on its way, and how much of that no compute covered; of one rank, or summed."""

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
    traffic: list[Interval] = []
    compute: list[Interval] = []
    for span in spans:
        (compute if span.lane == "compute" else traffic).append((span.start_us, span.stop_us))
    return _overlap(traffic, union(compute))


def accounts(spans: Iterable[Span]) -> dict[Tags, Overlap]:
    """The communication of one rank's spans by layer, pass and peer group; an empty field of a key stands for all.

    Keys are Tags(layer, phase, peers) for each group of peers, its sums Tags(layer, phase), Tags(layer) and
    Tags("", phase), and Tags() for everything.

    A transfer is exposed while no compute of the rank runs, of whatever layer. Each entry counts its own transfers
    alone, and time in which several of them are on their way counts once. Groups whose transfers run side by side
    are each charged for the same moment, so the entries of groups may add up to more than their layer's.
    """
    compute: list[Interval] = []
    by_tags: dict[Tags, list[Interval]] = {}
    for span in spans:
        found = compute if span.lane == "compute" else by_tags.setdefault(span.tags, [])
        found.append((span.start_us, span.stop_us))
    traffic: dict[Tags, list[Interval]] = {Tags(): []}
    for tags, intervals in by_tags.items():
        for key in keys_of(tags):
            traffic.setdefault(key, []).extend(intervals)
    covers = union(compute)
    return {key: _overlap(intervals, covers) for key, intervals in traffic.items()}


def keys_of(tags: Tags) -> list[Tags]:
    """The entries of `accounts` that a transfer with these tags counts for, the finest first."""
    layer, phase = tags.layer, tags.phase
    return list(dict.fromkeys((tags.group, Tags(layer, phase), Tags(layer), Tags("", phase), Tags())))


def accounts_of_lanes(spans: Iterable[Span]) -> dict[str, Overlap]:
    """The communication of one rank's spans on each lane: rows that go out, and results that come back."""
    spans = list(spans)
    lanes = [lane for lane in LANES if lane != "compute"]
    return {lane: overlap(span for span in spans if span.lane in ("compute", lane)) for lane in lanes}


def _overlap(traffic: Sequence[Interval], covers: Sequence[Interval]) -> Overlap:
    traffic = union(traffic)
    return Overlap(length(traffic), length(without(traffic, covers)))


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
    stops = [stop for _, stop in covers]
    for start, stop in intervals:
        for index in range(bisect_right(stops, start), len(covers)):
            cover_start, cover_stop = covers[index]
            if cover_start >= stop:
                break
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
    """The spans as a Chrome or Perfetto trace (JSON): a process per rank, a thread per lane, labels in "args".

    A rank's times start at its own first span. Clocks of different machines, and events of different devices, share
    no origin: compare lengths between ranks, not moments.
    """
    by_rank: dict[int, list[Span]] = {}
    for span in spans:
        by_rank.setdefault(span.rank, []).append(span)
    events: list[Mapping[str, object]] = []
    for rank, mine in sorted(by_rank.items()):
        origin_us = min(span.start_us for span in mine)
        lanes = [*LANES, *sorted({span.lane for span in mine} - set(LANES))]
        events += _headings(rank, lanes)
        events += [_event(span, lanes.index(span.lane), origin_us) for span in sorted(mine, key=_start)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _headings(rank: int, lanes: Sequence[str]) -> list[Mapping[str, object]]:
    """Events that name and sort a rank's process and its threads."""

    def heading(what: str, thread: int, args: Mapping[str, object]) -> Mapping[str, object]:
        return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": args}

    events = [
        heading("process_name", 0, {"name": f"rank {rank}"}),
        heading("process_sort_index", 0, {"sort_index": rank}),
    ]
    for thread, lane in enumerate(lanes):
        events.append(heading("thread_name", thread, {"name": lane}))
        events.append(heading("thread_sort_index", thread, {"sort_index": thread}))
    return events


def _event(span: Span, thread: int, origin_us: float) -> Mapping[str, object]:
    tags = span.tags
    return {
        "name": f"{span.lane} {tags.peers}" if tags.peers else span.name,
        "cat": tags.phase or span.lane,
        "ph": "X",
        "pid": span.rank,
        "tid": thread,
        "ts": span.start_us - origin_us,
        "dur": span.stop_us - span.start_us,
        "args": {"op": span.name, "layer": tags.layer, "phase": tags.phase, "peers": tags.peers},
    }


def _start(span: Span) -> float:
    return span.start_us


def write_spans(path: str | Path, spans: Iterable[Span]) -> int:
    """How many spans were written to `path`, one line of JSON each; the file is never half written."""
    lines = [line_of(span) + "\n" for span in spans]
    replace_file(Path(path), "".join(lines))
    return len(lines)


def write_trace(path: str | Path, spans: Iterable[Span]) -> None:
    """Replaces the file at `path` by the spans as a Chrome trace."""
    replace_file(Path(path), chrome_trace(spans))


def read_spans(path: str | Path) -> Iterator[Span]:
    """The spans of a file in its order. Raises ConfigError, with the line's number, for a broken one."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield span_of(line, f"{path}:{number}")


def line_of(span: Span) -> str:
    """The span as one line of JSON, without a newline."""
    return json.dumps(dataclasses.asdict(span), ensure_ascii=False, allow_nan=False)


def span_of(line: str, where: str) -> Span:
    """The span that `line` holds. Raises ConfigError, with `where` it stands, for a broken one."""
    fix = "write the file with timeline.write_spans"
    try:
        values: Any = json.loads(line)
        span = Span(**{**values, "tags": Tags(**values["tags"])})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{where}={line[:40]!r}: not a span ({error}); {fix}") from error
    texts = (span.name, span.lane, span.tags.layer, span.tags.phase, span.tags.peers)
    if type(span.rank) is not int or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{where}={line[:40]!r}: a span has an integer rank and texts for names; {fix}")
    times_us = (span.start_us, span.stop_us)
    if not all(type(time_us) in (int, float) and math.isfinite(time_us) for time_us in times_us):
        raise ConfigError(f"{where}={line[:40]!r}: a span starts and stops at finite times; {fix}")
    if span.stop_us < span.start_us:
        raise ConfigError(f"{where}={line[:40]!r}: a span cannot stop before it starts; {fix}")
    return span
