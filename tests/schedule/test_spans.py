"""Interval arithmetic, against counting points; the trace, against its format."""

from __future__ import annotations

import json
import time

from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.schedule.spans import (
    Overlap,
    Span,
    Tags,
    accounts,
    accounts_of_lanes,
    chrome_trace,
    length,
    overlap,
    union,
    without,
)

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


TRANSFERS = st.lists(
    st.builds(
        lambda layer, phase, peers, lane, start, stop: Span("t", 0, lane, start, stop, Tags(layer, phase, peers)),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["forward", "backward"]),
        st.sampled_from(["near (1/2)", "near (2/2)", "node +1"]),
        st.sampled_from(["dispatch", "combine"]),
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    max_size=12,
)


@given(TRANSFERS, INTERVALS)
def test_each_account_is_the_points_of_its_own_transfers(
    transfers: list[Span], compute: list[tuple[float, float]]
) -> None:
    """Compute of layer "b" covers transfers of "a" too. Row parts of a peer group are one group."""
    found = accounts([*transfers, *(Span("c", 0, "compute", *interval, Tags("b", "forward")) for interval in compute)])
    for key, account in found.items():
        own = [
            (span.start_us, span.stop_us)
            for span in transfers
            if key.layer in ("", span.tags.layer)
            and key.phase in ("", span.tags.phase)
            and span.tags.peers.startswith(key.peers)
        ]
        assert account == Overlap(len(points(own)), len(points(own) - points(compute))), key
    groups = {(s.tags.layer, s.tags.phase, s.tags.peers.split(" (")[0]) for s in transfers}
    assert {(key.layer, key.phase, key.peers) for key in found if key.peers} == groups
    assert found[Tags()] == overlap([*transfers, *(Span("c", 0, "compute", *interval) for interval in compute)])


def test_accounts_by_hand() -> None:
    """Two groups of layer "a" cross between 4 and 6; each is charged for it, their layer once."""
    spans = [
        Span("dispatch 0", 0, "dispatch", 0, 6, Tags("a", "forward", "near")),
        Span("combine 1", 0, "combine", 4, 10, Tags("a", "forward", "node +1")),
        Span("dispatch 0", 0, "dispatch", 20, 25, Tags("a", "backward", "near")),
        Span("compute 0", 0, "compute", 2, 5, Tags("b", "forward", "near")),
    ]
    assert accounts(spans) == {
        Tags("a", "forward", "near"): Overlap(6, 3),
        Tags("a", "forward", "node +1"): Overlap(6, 5),
        Tags("a", "backward", "near"): Overlap(5, 5),
        Tags("a", "forward"): Overlap(10, 7),
        Tags("a", "backward"): Overlap(5, 5),
        Tags("a"): Overlap(15, 12),
        Tags("", "forward"): Overlap(10, 7),
        Tags("", "backward"): Overlap(5, 5),
        Tags(): Overlap(15, 12),
    }
    assert accounts_of_lanes(spans) == {"dispatch": Overlap(11, 8), "combine": Overlap(6, 5)}


def test_without_spans_everything_is_zero() -> None:
    assert accounts([]) == {Tags(): Overlap(0, 0)}
    assert accounts_of_lanes([]) == {"dispatch": Overlap(0, 0), "combine": Overlap(0, 0)}


def test_a_transfer_without_rows_has_an_account() -> None:
    span = Span("dispatch 1", 0, "dispatch", 7, 7, Tags("a", "forward", "node +1"))
    assert accounts([span])[Tags("a", "forward", "node +1")] == Overlap(0, 0)


def test_many_spans_are_accounted_for_in_time() -> None:
    """64 micro-batches of 4 layers in 9 pieces. Comparing each transfer with each compute would take minutes."""
    spans = []
    for index in range(64 * 4 * 2 * 9):
        tags = Tags(f"layer {index % 4}", "forward", f"node +{index % 9}")
        spans += [Span("t", 0, lane, 3 * index, 3 * index + 2, tags) for lane in ("dispatch", "combine")]
        spans.append(Span("c", 0, "compute", 3 * index + 1, 3 * index + 3, tags))
    start_s = time.process_time()  # others on the machine do not count
    assert accounts(spans)[Tags()].hidden_percent == 50
    assert time.process_time() - start_s < 5


def test_the_trace_has_a_process_a_rank_and_a_thread_a_lane() -> None:
    spans = [
        Span("dispatch 1", 3, "dispatch", 105, 107.5, Tags("moe", "forward", "near (1/2)")),
        Span("weights 0", 3, "compute", 100, 104, Tags("moe", "backward")),
        Span("combine 1", 0, "combine", 5000, 5001, Tags("moe", "forward", "node +1")),
    ]
    trace = json.loads(chrome_trace(spans))
    assert trace["displayTimeUnit"] == "ms"
    events = {(e["pid"], e["name"]): e for e in trace["traceEvents"] if e["ph"] == "X"}
    event = events[3, "dispatch near (1/2)"]
    assert (event["ts"], event["dur"], event["cat"]) == (5, 2.5, "forward"), "times from the rank's first span on"
    assert event["args"] == {"op": "dispatch 1", "layer": "moe", "phase": "forward", "peers": "near (1/2)"}
    assert events[3, "weights 0"]["ts"] == 0 and events[0, "combine node +1"]["ts"] == 0
    heads = [e for e in trace["traceEvents"] if e["ph"] == "M"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in heads if e["name"] == "thread_name"}
    assert {names[e["pid"], e["tid"]] for e in events.values()} == {"dispatch", "compute", "combine"}
    assert names[3, event["tid"]] == "dispatch"
    order = {e["tid"]: e["args"]["sort_index"] for e in heads if e["name"] == "thread_sort_index" and e["pid"] == 3}
    assert [names[3, tid] for tid in sorted(order, key=lambda tid: order[tid])] == ["compute", "dispatch", "combine"]
    processes = {e["pid"]: e["args"]["name"] for e in heads if e["name"] == "process_name"}
    assert processes == {0: "rank 0", 3: "rank 3"}
    assert all(type(e["pid"]) is int and type(e["tid"]) is int for e in trace["traceEvents"])


def test_a_trace_without_spans_is_a_trace() -> None:
    assert json.loads(chrome_trace([]))["traceEvents"] == []
