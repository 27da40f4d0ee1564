"""Assignments: exact sums, level totals, near hosts first, and one view of them on both ends of a message."""

from __future__ import annotations

import random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.assignment import Assignment, assign
from ds_moe_ep.schedule.copies.forecast import LoadAverage
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


def test_rows_stay_on_their_rank_then_on_their_node_up_to_an_even_spreads_share() -> None:
    placement = Placement(4, 1, 1, ((None,), (0,), (None,), (0,)))  # expert 0 also on rank 1 and on rank 3
    assignment = assign([[30, 0, 0, 0]] * 4, placement, Torus(2, 2))  # a host's node would send it half of its 40 rows
    assert assignment.split[0] == ((23, 3, 4), (3, 23, 4), (10, 11, 9), (4, 3, 23))
    assert assignment.rows_R() == (40, 40, 0, 40)
    on_one_node = assign([[30, 0, 0, 0]] * 4, placement, Torus(1, 4)).split[0]
    assert on_one_node == ((30, 0, 0), (0, 30, 0), (10, 10, 10), (0, 0, 30))


def near_rows(assignment: Assignment, torus: Torus) -> list[tuple[int, int]]:
    """Rows of each rank from its own node, and all of them."""
    received = [[sum(row) for row in assignment.received_PL(rank)] for rank in range(torus.size)]
    return [
        (sum(rows for source, rows in enumerate(row) if source // torus.node_size == rank // torus.node_size), sum(row))
        for rank, row in enumerate(received)
    ]


def test_near_hosts_take_rows_off_the_links_and_no_rank_has_far_more_near_rows_than_another() -> None:
    """A rank that is busy with near rows sends its far rows late, where the host issues them behind each other."""
    torus = Torus(4, 4)
    rows_RE, placement = skewed(torus, 1, 1)
    found = near_rows(assign(rows_RE, placement, torus), torus)
    near, rows = (sum(column) for column in zip(*found, strict=True))
    assert near > 1.2 * rows / 4, "without placing near hosts first a quarter stays on its node"
    assert max(near for near, _ in found) < 0.5 * rows / 16


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


def test_two_passes_of_other_loads_are_the_loads_and_a_burst_is_smoothed() -> None:
    average = LoadAverage(4)
    for _ in range(8):
        average.add([100, 100, 100, 100])
    before = average.rows_E
    average.add([340, 20, 20, 20])
    burst = average.rows_E
    assert burst[0] == pytest.approx(before[0] + (340 - before[0]) * (1 - 0.875) / (1 - 0.875**9))
    average.add([100, 100, 100, 100])
    assert average.rows_E[0] < burst[0]
    for _ in range(2):
        average.add([20, 340, 20, 20])
    assert average.rows_E == pytest.approx([20.0, 340.0, 20.0, 20.0])


@pytest.mark.parametrize("tokens", [20, 200])
def test_draws_of_one_routing_are_averaged_however_few(tokens: int) -> None:
    average, shares = LoadAverage(8), [1 / (1 + expert) for expert in range(8)]
    drawn = [[sum(column) for column in zip(*counts(shares, 4, tokens, seed), strict=True)] for seed in range(60)]
    weights = [0.0]
    for rows_E in drawn:
        average.add(rows_E)
        weights.append(0.875 * weights[-1] + 1)
        assert average._weight == weights[-1], "nothing was forgotten"


def test_an_average_is_that_of_exponential_weights() -> None:
    average, passes = LoadAverage(1, kept=0.5), [8, 4, 2]
    for rows in passes:
        average.add([rows])
    assert average.rows_E == [pytest.approx((2 + 4 / 2 + 8 / 4) / (1 + 1 / 2 + 1 / 4))]
