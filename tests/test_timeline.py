"""Interval arithmetic, against counting points; the trace, against its format."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.timeline import Overlap, Span, chrome_trace, length, overlap, union, without

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


def points(intervals: list[tuple[float, float]]) -> set[int]:
    return {p for start, stop in intervals for p in range(int(start), int(stop))}


@given(INTERVALS, INTERVALS)
def test_exposed_time_is_the_points_of_traffic_that_no_compute_covers(
    traffic: list[tuple[float, float]], compute: list[tuple[float, float]]
) -> None:
    spans = [Span("t", 0, "dispatch", *interval) for interval in traffic]
    spans += [Span("c", 0, "compute", *interval) for interval in compute]
    measured = overlap(spans)
    assert measured.total_us == len(points(traffic))
    assert measured.exposed_us == len(points(traffic) - points(compute))
    left = without(union(traffic), union(compute))
    assert points(left) == points(traffic) - points(compute) and length(left) == measured.exposed_us


def test_lanes_that_carry_traffic_at_once_count_once() -> None:
    spans = [Span("d", 0, "dispatch", 0, 10), Span("c", 0, "combine", 5, 15), Span("e", 0, "compute", 0, 12)]
    assert overlap(spans) == Overlap(total_us=15, exposed_us=3)
    assert overlap(spans).hidden_percent == 80


def test_without_traffic_there_is_no_percentage() -> None:
    assert overlap([Span("e", 0, "compute", 0, 12)]).hidden_percent is None


def test_the_trace_has_a_process_a_rank_and_a_thread_a_lane() -> None:
    (event,) = json.loads(chrome_trace([Span("dispatch 1", 3, "dispatch", 5, 7.5)]))["traceEvents"]
    assert (event["pid"], event["tid"], event["ts"], event["dur"], event["ph"]) == (3, "dispatch", 5, 2.5, "X")
