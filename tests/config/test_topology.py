"""Ranks, groups and offsets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.config.topology import RankGrid, Torus, even_share, ranks_per_node, torus_of
from ds_moe_ep.errors import TopologyError


@pytest.mark.parametrize("data_before_expert", [False, True])
@given(ep_size=st.integers(1, 8), replicas=st.integers(1, 5))
def test_the_groups_of_each_axis_partition_the_world(data_before_expert: bool, ep_size: int, replicas: int) -> None:
    grid = RankGrid(world_size=ep_size * replicas, ep_size=ep_size, data_before_expert=data_before_expert)
    for groups, size in ((grid.ep_groups(), ep_size), (grid.expert_data_groups(), replicas)):
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert {len(group) for group in groups} == {size}
    for group in grid.ep_groups():
        assert [grid.ep_rank(rank) for rank in group] == list(range(ep_size))


def test_groups_lie_as_deepspeed_documents_them() -> None:
    grid = RankGrid(world_size=16, ep_size=2)
    assert grid.ep_groups()[:3] == [[0, 1], [2, 3], [4, 5]]
    assert grid.expert_data_groups() == [list(range(0, 16, 2)), list(range(1, 16, 2))]


@pytest.mark.parametrize(("world", "ep", "words"), [(2, 4, "only 2 ranks"), (6, 4, "does not divide")])
def test_sizes_that_do_not_fit_are_refused_with_the_way_out(world: int, ep: int, words: str) -> None:
    with pytest.raises(TopologyError, match=f"moe_ep.ep_size={ep}.*{words}"):
        RankGrid(world_size=world, ep_size=ep)


@pytest.mark.parametrize(
    ("group", "node_size", "expected"),
    [
        (range(16), 4, 4),
        (range(16), 0, 16),
        (range(4), 8, 4),  # the whole group on one node
        (range(0, 16, 4), 4, 1),  # one rank per node
        (range(0, 16, 2), 4, 2),  # every second rank
        (range(6), 4, 1),  # nodes hold unequal shares
        ([0, 4, 1, 5], 4, 1),  # nodes interleave
    ],
)
def test_the_ranks_that_share_a_node_are_counted(group: list[int], node_size: int, expected: int) -> None:
    assert ranks_per_node(group, node_size) == expected
    assert torus_of(group, node_size).size == len(group)


@pytest.mark.parametrize(("hosts", "expected"), [("aabb", 2), ("aaaa", 4), ("abab", 1), ("aabbbb", 1), ("a", 1)])
def test_ranks_of_a_host_are_counted_where_hosts_hold_equal_shares(hosts: str, expected: int) -> None:
    assert even_share(list(hosts)) == expected


@given(nodes=st.integers(1, 5), places=st.integers(1, 5), data=st.data())
def test_source_undoes_target_at_every_offset(nodes: int, places: int, data: st.DataObject) -> None:
    torus = Torus(nodes, places)
    rank = data.draw(st.integers(0, torus.size - 1))
    targets = [torus.target(rank, offset) for offset in torus.offsets()]
    assert targets[0] == rank and sorted(targets) == list(range(torus.size))
    assert [torus.source(target, offset) for target, offset in zip(targets, torus.offsets(), strict=True)] == [
        rank
    ] * torus.size
