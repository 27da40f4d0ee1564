"""Gradient sums reach their home whole and once, over ranks that have them, one buffer and few rounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.schedule.way_home import Move, rounds_home

RANKS, LOCAL = 16, 2


def home(expert: int) -> int:
    return expert // LOCAL


def owed_of(hosts_E: dict[int, set[int]], bits: int = 1) -> dict[tuple[int, int], int]:
    return {(expert, host): bits for expert, hosts in hosts_E.items() for host in hosts - {home(expert)}}


@given(st.dictionaries(st.integers(0, RANKS * LOCAL - 1), st.sets(st.integers(0, RANKS - 1)), max_size=12))
def test_each_hosts_sum_is_at_home_once_and_a_rank_takes_in_one_expert_a_round(hosts_E: dict[int, set[int]]) -> None:
    owed = owed_of(hosts_E)
    held = {(expert, host): [host] for expert, host in owed}  # whose sums lie where
    rounds = rounds_home(owed, home)
    for moves in rounds:
        assert len({move.target for move in moves}) == len(moves) > 0
        sent = [held.pop((move.expert, move.source)) for move in moves]  # an error where it has left already
        for move, its in zip(moves, sent, strict=True):
            assert move.is_summed == (len(its) > 1)
            held.setdefault((move.expert, move.target), []).extend(its)
    at_home = {expert: hosts - {home(expert)} for expert, hosts in hosts_E.items() if hosts - {home(expert)}}
    assert {(expert, home(expert)): sorted(hosts) for expert, hosts in at_home.items()} == {
        place: sorted(its) for place, its in held.items()
    }


def test_fifteen_hosts_of_one_expert_take_four_rounds() -> None:
    rounds = rounds_home(owed_of({5: set(range(RANKS))}), home)
    assert [len(moves) for moves in rounds] == [8, 4, 2, 1]
    assert [sum(move.target == home(5) for move in moves) for moves in rounds] == [1, 1, 1, 1]


def test_a_sum_has_the_weights_of_all_that_is_in_it() -> None:
    rounds = rounds_home({(0, 1): 0b01, (0, 2): 0b01, (0, 3): 0b10}, home=lambda expert: 0)
    assert rounds == (
        (Move(0, 1, 0, 0b01, is_summed=False), Move(0, 3, 2, 0b10, is_summed=False)),
        (Move(0, 2, 0, 0b11, is_summed=True),),
    )
