"""Placements: what the arithmetic of skewed loads promises, never worse than none, the same in every process."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule import placement as placement_module
from ds_moe_ep.schedule.copies import filling
from ds_moe_ep.schedule.placement import MARGIN, CopyCosts, Placement, levelled_rows, place, price_us
from ds_moe_ep.schedule.price import Costs
from tests.schedule.plain_placement import host_by_sorting, place_plainly

NODES = Torus(2, 8)
ROWS_ALONE = CopyCosts(row_us=1.0)  # transfers that cost nothing
PASS = MoEConfig().replica_pass_share


def by_sizes(**knobs: float) -> CopyCosts:
    """Costs of 16 ranks' experts of 2 MiB for rows of 1 KiB, by the knobs."""
    config = MoEConfig(**knobs)  # type: ignore[arg-type]
    both = {"traffic": config.replica_traffic, "pass_share": config.replica_pass_share}
    return CopyCosts.by_sizes(2**10, 2**21, 2**21, 16, **both)


def zipf(exponent: float, num_experts: int = 16) -> list[float]:
    shares = [(1 + index) ** -exponent for index in range(num_experts)]
    return [1000 * num_experts * share / sum(shares) for share in shares]


def one_hot(times: float, expert: int = 3) -> list[float]:
    return [1000 * times if index == expert else 1000 * (16 - times) / 15 for index in range(16)]


def fullest(rows_E: list[float], placement: Placement) -> float:
    """Rows of the fullest rank over the mean."""
    return max(levelled_rows([round(1000 * rows) for rows in rows_E], placement)) * placement.ranks / sum(rows_E) / 1000


@pytest.mark.parametrize("torus", [Torus(1, 16), NODES, Torus(4, 4)], ids=str)
@pytest.mark.parametrize(
    ("rows_E", "without", "bound"),
    [
        (zipf(1.0), 4.73, 1.001),
        (zipf(0.5), 2.40, 1.001),
        (one_hot(4.0), 4.0, 1.001),
        (one_hot(8.0), 8.0, 1.001),
        ([0.0, 1000.0, 1000.0, 1000.0] * 4, 1.33, 1.001),  # three busy ranks share an idle one, in a chain
    ],
    ids=["zipf 1.0", "zipf 0.5", "hot 4", "hot 8", "idle"],
)
def test_one_slot_per_rank_levels_skewed_loads(torus: Torus, rows_E: list[float], without: float, bound: float) -> None:
    assert fullest(rows_E, Placement.without_guests(16, 1)) == pytest.approx(without, abs=0.01)
    assert fullest(rows_E, place(rows_E, torus, 1, ROWS_ALONE)) <= bound


def test_even_loads_get_no_copies_whatever_the_slots() -> None:
    for slots in (1, 3, "auto"):
        assert place([1000.0] * 16, NODES, slots, ROWS_ALONE).copies == ()


def test_a_hot_expert_among_several_of_a_rank_is_the_one_that_is_copied() -> None:
    rows_E = [100.0] * 16
    rows_E[5] = 2000.0
    placement = place(rows_E, Torus(1, 4), 1, ROWS_ALONE)
    assert {expert for expert, _, _ in placement.copies} == {5}
    assert placement.hosts(5) == (1, 0, 2, 3)
    assert placement.place_on(1, 5) == 1 and placement.place_on(0, 5) == 4  # behind the four own ones


def test_placements_are_those_of_a_plain_search_that_prices_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, found, are_kept = random.Random(5), [], 0
    for _ in range(16):
        torus, slots = draw.choice([Torus(1, 4), Torus(2, 3), Torus(4, 4)]), draw.choice([1, 1, 2, "auto"])
        costs = CopyCosts(
            row_us=1.0,
            near_us=draw.choice([0.0, 300.0]),
            far_us=draw.choice([0.0, 3000.0]),
            each_us=draw.choice([0.0, 0.0, 30.0]),
            pass_share=draw.choice([0.0, PASS, 0.1]),
            pass_us=draw.choice([0.0, 20.0]),
            hidden_us=draw.choice([0.0, 1000.0]),
            micro_batches=draw.choice([1, 4, 64]),
        )
        num, previous = draw.choice([1, 2]) * torus.size, None
        for moves in (False, False, True):
            ways = (
                [1000 * draw.random() for _ in range(num)],
                draw.sample(zipf(draw.random(), num), num),
                [1000.0 * (draw.random() < 0.7) for _ in range(num)],
            )
            case = (draw.choice(ways), torus, slots, costs, previous, [ways[0][::-1], ways[2]] if moves else [])
            placement = place(*case)
            found.append((case, placement))
            are_kept, previous = are_kept + (placement == previous), placement
    monkeypatch.setattr(filling, "_host_for", host_by_sorting)
    assert [placement == place_plainly(*case) for case, placement in found] == [True] * len(found)
    assert 3 < are_kept < len(found) - 16, "some stay, and some move"


def test_where_no_copies_can_pay_none_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 KiB, experts of 2 MiB: the search is left out, which is most of the time that a placement takes."""
    looked: list[int] = []
    monkeypatch.setattr(placement_module, "levelled", lambda rows, *_: iter(looked.append(1) or ()))
    sizes = by_sizes()
    for micro_batches in (1, 4, 64):
        costs = replace(sizes, micro_batches=micro_batches)
        for rows_E in ([1000.0] * 16, [0.0, 4000 / 3, 4000 / 3, 4000 / 3] * 4):
            assert place(rows_E, NODES, 1, costs).copies == ()
    assert not looked
    place(zipf(1.0), NODES, 1, sizes)
    assert looked


ANY_TORUS = st.builds(Torus, st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    torus=ANY_TORUS,
    local=st.integers(1, 3),
    slots=st.one_of(st.integers(0, 2), st.just("auto")),
    costs=st.builds(
        CopyCosts,
        row_us=st.floats(0.001, 10),
        near_us=st.floats(0, 1e4),
        far_us=st.floats(0, 1e5),
        each_us=st.one_of(st.just(0.0), st.floats(0, 1e4)),
        pass_share=st.one_of(st.just(0.0), st.floats(0, 1)),
        pass_us=st.one_of(st.just(0.0), st.floats(0, 1e3)),
        gradient_ratio=st.floats(0.5, 4),
        hidden_us=st.floats(0, 1e5),
        micro_batches=st.integers(1, 64),
    ),
)
def test_no_placement_is_dearer_than_none_nor_has_more_than_its_slots(
    data: st.DataObject, torus: Torus, local: int, slots: int | Literal["auto"], costs: CopyCosts
) -> None:
    loads = st.lists(st.floats(0, 1e4), min_size=local * torus.size, max_size=local * torus.size)
    none, previous = Placement.without_guests(torus.size, local), None
    for _ in range(3):
        rows_E = data.draw(loads)
        found = place(rows_E, torus, slots, costs, previous)
        price = price_us(rows_E, found, torus, costs)
        assert price <= price_us(rows_E, none, torus, costs)
        if previous is not None and found != previous:
            others = price_us(rows_E, previous, torus, costs)
            assert price <= others * (1 - MARGIN) or (price <= others and len(found.copies) < len(previous.copies))
        assert slots == "auto" or found.slots <= max(slots, 0)
        previous = found


def test_copies_that_cost_more_than_they_take_away_are_not_made() -> None:
    far = Torus(16, 1)

    def copies(far_us: float, micro_batches: int) -> int:
        costs = CopyCosts(row_us=1.0, far_us=far_us, micro_batches=micro_batches)
        return len(place(one_hot(4.0), far, 1, costs).copies)

    assert copies(100.0, 1) > 0
    assert copies(5000.0, 1) == 0  # one transfer and its gradient takes longer than all that could be taken away
    assert copies(5000.0, 64) > copies(5000.0, 16) > 0  # a longer window pays for more


def test_by_sizes_alone_idle_experts_do_not_pay_for_copies_in_any_window_and_hot_ones_do() -> None:
    """Rows of 1 KiB, experts of 2 MiB, 1,000 rows per rank."""
    idle = [0.0, 4000 / 3, 4000 / 3, 4000 / 3] * 4

    def copies(rows_E: list[float], micro_batches: int, pass_share: float = PASS) -> int:
        costs = replace(by_sizes(replica_pass_share=pass_share), micro_batches=micro_batches)
        return len(place(rows_E, NODES, 1, costs).copies)

    for micro_batches in (1, 4, 16):
        assert copies(idle, micro_batches) == 0  # twelve copies, each as long as 31 rows, would take away 333 rows
        assert copies(one_hot(4.0), micro_batches) > 5
        assert copies(zipf(1.0), micro_batches) > 5
    assert (copies(idle, 1, 0.0), copies(idle, 2, 0.0)) == (0, 12)  # by transfers alone a longer window pays


def test_the_knobs_say_what_transfers_and_passes_of_copies_cost_by_sizes() -> None:
    """By hand: a row's exchanges are 4 KiB and take half of its time, an expert is 512 times that, on 16 links."""
    found = by_sizes()
    assert (found.each_us, found.pass_share, found.gradient_ratio) == (0.5 * 512 / 16, 1 / 32, 1.0)
    other = by_sizes(replica_traffic=0.125, replica_pass_share=0.25)
    assert (other.each_us, other.pass_share) == (found.each_us / 4, 0.25)
    loads = (zipf(1.0), zipf(0.5), one_hot(4.0), one_hot(8.0), [0.0, 4000 / 3, 4000 / 3, 4000 / 3] * 4)
    for share, expected in ((1 / 32, [1.02, 1.08, 1.12, 1.0, 1.33]), (1 / 128, [1.02, 1.01, 1.0, 1.0, 1.0])):
        costs = replace(by_sizes(replica_pass_share=share), micro_batches=16)
        levels = [fullest(rows_E, place(rows_E, NODES, 1, costs)) for rows_E in loads]
        assert levels == pytest.approx(expected, abs=0.01), "as the page has them"
    dear = by_sizes(replica_traffic=64.0)
    assert place(one_hot(4.0), NODES, 1, found).copies and not place(one_hot(4.0), NODES, 1, dear).copies


def test_where_loads_move_all_slots_are_used_if_copies_cost_nothing_and_fewer_where_they_cost_rows() -> None:
    rows_E = zipf(1.0)
    others_E = [[rows * (1.5 if index % 2 else 0.5) for index, rows in enumerate(rows_E)], rows_E[::-1]]
    for slots in (1, 2):
        free = place(rows_E, NODES, slots, ROWS_ALONE, None, others_E)
        assert len(free.copies) == 16 * slots
    none = Placement.without_guests(16, 1, 1)
    for each_us in (0.0, 10.0, 100.0, 1e6):
        costs = CopyCosts(row_us=1.0, each_us=each_us)
        found = place(rows_E, NODES, 1, costs, None, others_E)
        assert price_us(rows_E, found, NODES, costs, others_E) <= price_us(rows_E, none, NODES, costs, others_E)
    assert found.copies == ()


def test_copies_that_are_there_stay_unless_others_pay_for_a_second_transfer() -> None:
    costs = CopyCosts(row_us=1.0, each_us=20.0, gradient_ratio=1.0)
    first, almost = place(one_hot(4.0), NODES, 1, costs), one_hot(4.0)
    almost[5] += 500.0
    assert place(almost, NODES, 1, costs, first) != first
    assert place(almost, NODES, 1, costs, first, has_begun=True) == first
    other = one_hot(4.0, expert=12)
    assert {expert for expert, *_ in place(other, NODES, 1, costs, first, has_begun=True).copies} == {12}


def test_a_copy_costs_its_rank_a_little_in_each_pass_however_long_the_window() -> None:
    """The fullest of 16 ranks has 333 rows more than the mean, which a copy on each of the idle ones takes away."""
    idle = [0.0, 4000 / 3, 4000 / 3, 4000 / 3] * 4
    for micro_batches in (1, 64):
        copies = [
            len(place(idle, NODES, 1, CopyCosts(row_us=1.0, pass_us=pass_us, micro_batches=micro_batches)).copies)
            for pass_us in (0.0, 200.0, 340.0)
        ]
        assert copies[0] == copies[1] == 12 and copies[2] == 0


def test_near_ranks_are_taken_first_where_the_far_link_is_slow() -> None:
    costs = CopyCosts(row_us=1.0, near_us=1.0, far_us=1e6)
    placement = place(one_hot(4.0), NODES, 1, costs)
    assert placement.copies and all(rank < 8 for _, rank, _ in placement.copies)


def test_auto_takes_a_second_slot_only_where_it_pays() -> None:
    rows_E = [0.0, 0.0, 1000.0, 1000.0]
    assert place(rows_E, Torus(1, 4), "auto", ROWS_ALONE).slots == 1
    many = [*[250.0] * 4, *[0.0] * 4]  # of the first rank's four experts the other takes half with a slot for each
    assert place(many, Torus(1, 2), "auto", ROWS_ALONE).slots == 2
    dear = CopyCosts(row_us=1.0, near_us=400.0)
    assert place(many, Torus(1, 4), "auto", dear).slots == 0


def test_the_previous_placement_stays_until_another_gains_more_than_the_margin() -> None:
    first = place(one_hot(4.0), NODES, 1, ROWS_ALONE)
    assert place(one_hot(4.2), NODES, 1, ROWS_ALONE, first) == first
    moved = place(one_hot(4.0, expert=12), NODES, 1, ROWS_ALONE, first)
    assert moved.copies and not set(moved.copies) & set(first.copies)
    assert place([1000.0] * 16, NODES, 1, ROWS_ALONE, first).copies == ()  # slots are given back
    assert place(one_hot(4.0), NODES, 2, ROWS_ALONE, first).slots == 2  # one of other slots is no previous one


def test_the_key_is_the_same_in_another_process_and_differs_between_placements() -> None:
    placement = place(zipf(1.0), NODES, 1, ROWS_ALONE)
    script = f"""
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.placement import CopyCosts, place
print(place({zipf(1.0)}, {NODES}, 1, {ROWS_ALONE}).key)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == placement.key
    assert placement.key != place(zipf(0.5), NODES, 1, ROWS_ALONE).key


def test_a_guest_at_home_or_twice_on_a_rank_is_no_placement() -> None:
    Placement(2, 2, 2, ((2, 3), (0, None)))
    for guests in (((0, None), (None, None)), ((2, 2), (None, None)), ((4, None), (None, None))):
        with pytest.raises(AssertionError):
            Placement(2, 2, 2, guests)


def test_costs_follow_from_those_of_a_schedule() -> None:
    """8 ranks of 2 nodes: 3 eighths of the rows go near, 4 eighths far."""
    costs = Costs(near_us=30.0, far_us=400.0, latency_us=5.0, forward_us=1000, input_grad_us=1000, weight_grad_us=1000)
    found = CopyCosts.of(costs, Torus(2, 4), 800.0, 10.0, 6000.0, 12000.0, 16)
    assert found == CopyCosts(
        row_us=3000 / 800,
        near_us=65.0,
        far_us=605.0,
        pass_us=10.0,
        gradient_ratio=2.0,
        hidden_us=1400.0,
        micro_batches=16,
    )
    one_node = CopyCosts.of(costs, Torus(1, 8), 800.0, 10.0, 7000.0, 7000.0, 1)
    assert one_node.near_us == one_node.far_us == 405.0  # its peers are what `far_us` was measured with
