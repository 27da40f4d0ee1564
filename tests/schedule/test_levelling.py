"""Levels are as low as the hosts allow, by an exact formula over all sets of ranks."""

from __future__ import annotations

import math
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.schedule.levelling import level, pour

RANKS = 5
ROWS = st.integers(0, 1000)
HOSTS = st.lists(st.integers(0, RANKS - 1), min_size=1, max_size=RANKS, unique=True)


def lowest_top(rows_E: list[int], hosts_E: dict[int, list[int]], base_R: list[int]) -> float:
    """The lowest maximum of any split: some set of ranks holds all rows that have no host outside of it (Hall)."""
    sets = [set(ranks) for size in range(1, RANKS + 1) for ranks in combinations(range(RANKS), size)]

    def bound(ranks: set[int]) -> float:
        inside = sum(rows_E[expert] for expert, hosts in hosts_E.items() if ranks.issuperset(hosts))
        return (sum(base_R[rank] for rank in ranks) + inside) / len(ranks)

    return max(map(bound, sets))


@settings(max_examples=60)
@given(rows=st.integers(0, 100), loads=st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_water_is_level_where_it_stands_and_no_drop_is_lost(rows: int, loads: list[int]) -> None:
    poured = pour(rows, loads)
    assert sum(poured) == rows and min(poured) >= 0
    wet = [load + drops for load, drops in zip(loads, poured, strict=True) if drops]
    dry = [load for load, drops in zip(loads, poured, strict=True) if not drops]
    assert not wet or max(wet) - min(wet) <= 1
    assert not wet or not dry or min(dry) >= min(wet) - 1


@settings(max_examples=60)
@given(found=st.lists(st.tuples(ROWS, HOSTS), max_size=5), base_R=st.lists(ROWS, min_size=RANKS, max_size=RANKS))
def test_the_fullest_rank_is_as_low_as_any_split_can_make_it(
    found: list[tuple[int, list[int]]], base_R: list[int]
) -> None:
    rows_E, hosts_E = [rows for rows, _ in found], {expert: hosts for expert, (_, hosts) in enumerate(found)}
    load_R = list(base_R)
    for expert, quotas in level(rows_E, hosts_E, base_R).items():
        assert sum(quotas) == rows_E[expert] and min(quotas) >= 0
        for host, rows in zip(hosts_E[expert], quotas, strict=True):
            load_R[host] += rows
    best = math.ceil(lowest_top(rows_E, hosts_E, base_R))
    assert best <= max(load_R) <= 1.01 * best + RANKS


def test_a_chain_of_experts_that_share_hosts_levels_through_all_of_them() -> None:
    quotas = level([1000, 0, 0], {0: [0, 1], 1: [1, 2], 2: [2, 3]}, [0, 600, 0, 0])
    assert quotas[0] == [800, 200]  # the others have no rows that could make place
    quotas = level([800, 800, 800], {0: [0, 1], 1: [1, 2], 2: [2, 3]}, [0, 0, 0, 0])
    first, second, third = (quotas[expert] for expert in range(3))
    assert [first[0], first[1] + second[0], second[1] + third[0], third[1]] == [600] * 4
