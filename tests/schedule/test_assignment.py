"""Assignments: exact sums, level totals, near hosts first, and one view of them on both ends of a message."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.assignment import Assignment, LoadAverage, assign
from ds_moe_ep.schedule.placement import CopyCosts, Placement, place

NODES = Torus(2, 8)
ROWS_ALONE = CopyCosts(row_us=1.0)


def counts(shares_E: list[float], num_ranks: int, tokens: int = 2000, seed: int = 0) -> list[list[int]]:
    """Rows by source and expert, drawn."""
    draw = random.Random(seed)
    experts = range(len(shares_E))
    drawn = [draw.choices(experts, shares_E, k=tokens) for _ in range(num_ranks)]
    return [[chosen.count(expert) for expert in experts] for chosen in drawn]


def skewed(torus: Torus, local: int, slots: int) -> tuple[list[list[int]], Placement]:
    num_experts = torus.size * local
    rows_RE = counts([1 / (1 + expert) for expert in range(num_experts)], torus.size)
    return rows_RE, place([sum(rows) for rows in zip(*rows_RE, strict=True)], torus, slots, ROWS_ALONE)


def check_sums(assignment: Assignment) -> None:
    """Every row has one host, and both ends of each message say the same."""
    placement, ranks = assignment.placement, range(assignment.placement.ranks)
    sent = [assignment.sent_PL(rank) for rank in ranks]
    for rank in ranks:
        assert [sent[source][rank] for source in ranks] == list(assignment.received_PL(rank))
    for source in ranks:
        found = [0] * placement.num_experts
        for expert, host, rows in assignment.parts(source):
            assert rows >= 0
            found[expert] += rows
            assert rows == sent[source][host][placement.place_on(host, expert)]
        assert found == list(assignment.rows_RE[source])
        assert sum(map(sum, sent[source])) == sum(found)
    assert assignment.rows_R() == tuple(sum(map(sum, assignment.received_PL(rank))) for rank in ranks)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), torus=st.builds(Torus, st.integers(1, 3), st.integers(1, 3)), local=st.integers(1, 3))
def test_any_counts_have_exact_sums_under_any_placement(data: st.DataObject, torus: Torus, local: int) -> None:
    experts = range(torus.size * local)
    others = [[expert for expert in experts if expert // local != rank] or [None] for rank in range(torus.size)]
    guests = [data.draw(st.lists(st.sampled_from(found), max_size=2, unique=True)) for found in others]
    placement = Placement(torus.size, local, 2, tuple((*own, *[None] * (2 - len(own))) for own in guests))
    rows = st.lists(st.integers(0, 30), min_size=len(experts), max_size=len(experts))
    check_sums(assign(data.draw(st.lists(rows, min_size=torus.size, max_size=torus.size)), placement, torus))


@pytest.mark.parametrize(("torus", "local", "slots"), [(NODES, 1, 1), (Torus(4, 4), 4, 1), (Torus(1, 4), 2, 2)])
def test_drawn_counts_of_skewed_routing_are_levelled(torus: Torus, local: int, slots: int) -> None:
    rows_RE, placement = skewed(torus, local, slots)
    before = assign(rows_RE, Placement.without_guests(torus.size, local), torus)
    after = assign(rows_RE, placement, torus)
    check_sums(before)
    check_sums(after)
    assert max(before.rows_R()) > 1.6 * mean(before.rows_R())
    assert max(after.rows_R()) < 1.05 * mean(after.rows_R())


def test_rows_stay_on_their_rank_then_on_their_node() -> None:
    placement = Placement(4, 1, 1, ((None,), (0,), (None,), (0,)))  # expert 0 also on rank 1 and on rank 3
    assignment = assign([[30, 0, 0, 0]] * 4, placement, Torus(2, 2))
    assert assignment.split[0] == ((30, 0, 0), (0, 30, 0), (10, 10, 10), (0, 0, 30))
    assert assignment.rows_R() == (40, 40, 0, 40)


def test_rows_that_must_travel_are_shared_out_in_proportion() -> None:
    placement = Placement(4, 1, 1, ((None,), (0,), (0,), (0,)))
    rows_RE = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [400, 0, 0, 0]]
    assert assign(rows_RE, placement, Torus(4, 1)).split[0][3] == (100, 100, 100, 100)


def test_the_same_counts_give_the_same_assignment_in_any_order_of_copies() -> None:
    rows_RE, placement = skewed(NODES, 1, 1)
    again = Placement(16, 1, 1, tuple(tuple(guests) for guests in placement.guests_RS))
    assert assign(rows_RE, placement, NODES) == assign([list(rows) for rows in rows_RE], again, NODES)


def test_an_average_follows_a_change_within_some_passes() -> None:
    average = LoadAverage(2)
    assert not average.has_passes and average.rows_E == [0.0, 0.0]
    average.add([100, 0])
    assert average.rows_E == [100.0, 0.0]
    for _ in range(50):
        average.add([100, 0])
    assert average.rows_E == pytest.approx([100.0, 0.0])
    for _ in range(16):
        average.add([0, 100])
    assert average.rows_E[1] > 85


def test_an_average_is_that_of_exponential_weights() -> None:
    average, passes = LoadAverage(1, kept=0.5), [8, 4, 2]
    for rows in passes:
        average.add([rows])
    assert average.rows_E == [pytest.approx((2 + 4 / 2 + 8 / 4) / (1 + 1 / 2 + 1 / 4))]
