"""All-reduces over groups take what a message-by-message ring takes, and never less than their narrowest cut allows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import Load
from ds_moe_ep.simulate.cluster.all_reduce import (
    WAYS,
    Group,
    all_reduce_load,
    all_reduce_us,
    broadcasts_us,
    gather_us,
    group_of,
    levels_us,
    ring_us,
    send_us,
    tree_us,
)
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Host, Link

RATE = st.floats(1.0, 1e6)
NUM_BYTES = st.just(0.0) | st.floats(1, 1e9)  # no part of a byte: halves of the smallest numbers are nothing
CLUSTERS = st.builds(
    lambda nodes, size, near, far, shared, cores, latency: cluster(
        nodes, size, near=near, far=far, shared_by=min(shared, size), cores=cores, latency_us=latency
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4, 8]),
    RATE,
    RATE,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 2.0]),
    st.floats(0, 100),
)


def cluster(
    num_nodes: int = 4,
    node_size: int = 4,
    *,
    near: float = 400.0,
    far: float = 100.0,
    shared_by: float = 1.0,
    cores: float = 0.0,
    latency_us: float = 0.0,
    far_latency_us: float | None = None,
) -> Cluster:
    return Cluster(
        name="by hand",
        num_nodes=num_nodes,
        node_size=node_size,
        device=Device(memory_bytes=1e9),
        near=Link(bandwidth=near, latency_us=latency_us),
        far=Link(
            bandwidth=far, shared_by=shared_by, latency_us=latency_us if far_latency_us is None else far_latency_us
        ),
        host=Host(cores=cores),
    )


def ring_by_messages(num_bytes: float, rates: list[float], latencies: list[float]) -> float:
    """A ring all-reduce, message by message: rank r sends a chunk over link r when it has it and the link is free."""
    size = len(rates)
    has = [0.0] * size  # when the rank has the chunk that it sends next
    free = [0.0] * size
    for _ in range(2 * (size - 1)):
        sent = [max(has[r], free[r]) + num_bytes / size / rates[r] for r in range(size)]
        free = sent
        has = [sent[r - 1] + latencies[r - 1] for r in range(size)]
    return max(has)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_inside_a_node_takes_what_its_messages_take(size: int) -> None:
    group = group_of(cluster(1, size, near=50.0, latency_us=7.0), size)
    assert ring_us(group, 4000.0) == pytest.approx(ring_by_messages(4000.0, [50.0] * size, [7.0] * size))


def test_a_ring_over_two_nodes_takes_what_its_slow_messages_take() -> None:
    group = group_of(cluster(2, 4, near=4000.0, far=100.0, shared_by=4), 8)
    rates = [4000.0, 4000.0, 4000.0, 100.0] * 2
    by_messages = ring_by_messages(8e6, rates, [0.0] * 8)
    # beside the slow link's 14 chunks of 1e6 bytes at 100, a chunk passes a few fast ones: 2.5 % each of a slow one
    assert ring_us(group, 8e6) == pytest.approx(14e4)
    assert ring_us(group, 8e6) == pytest.approx(by_messages, rel=0.03)
    assert ring_us(group, 8e6) <= by_messages


def test_latencies_of_a_ring_are_near_ones_but_for_those_between_nodes() -> None:
    group = group_of(cluster(2, 4, near=math.inf, far=math.inf, latency_us=1.0, far_latency_us=10.0), 8)
    assert ring_us(group, 1e9) == 2 * (6 * 1.0 + 1 * 10.0)
    assert tree_us(group, 1e9) == 2 * (3 * 1.0 + 1 * 10.0)
    assert gather_us(group, 1e9) == ring_us(group, 1e9) / 2


@pytest.mark.parametrize(
    ("shared_by", "cores", "far"),
    [
        (4, 0.0, 100.0),  # one link per node
        (1, 0.0, 400.0),  # a ring for each of four links
        (1, 2.0, 100.0),  # gloo's one ring uses one of them
        (2, 0.0, 200.0),
    ],
)
def test_a_group_moves_over_its_links_what_its_transport_has_rings_for(
    shared_by: float, cores: float, far: float
) -> None:
    group = group_of(cluster(shared_by=shared_by, cores=cores), 8)
    assert (group.num_nodes, group.node_size, group.far) == (2, 4, far)


def test_copies_of_a_stage_share_the_links_of_their_nodes() -> None:
    """64 ranks as 8 copies of TP8: a node of 4 has one rank in each of four groups of copies, which share its links."""
    wide = cluster(16, 4, shared_by=4)
    assert (group_of(wide, 8, stride=8).far, group_of(wide, 8, stride=8).num_nodes) == (25.0, 8)
    assert group_of(cluster(16, 4, shared_by=1), 8, stride=8).far == 100.0
    assert group_of(wide, 8).far == 100.0  # two nodes of their own


def test_a_group_inside_a_node_never_uses_a_far_link() -> None:
    inside = group_of(cluster(far=1e-9), 4)
    assert (inside.num_nodes, inside.far, inside.ring) == (1, math.inf, 400.0)


def test_groups_that_lie_askew_share_the_node_in_which_they_meet() -> None:
    """Two groups of 6 on three nodes of 4 lie on two nodes each, and both cross the middle one's link."""
    askew = group_of(cluster(3, 4, shared_by=4), 6)
    assert (askew.num_nodes, askew.far) == (2, 50.0)


def test_trees_and_levels_by_hand() -> None:
    """8 MB over two nodes of four, near 400 and one link of 100 bytes per microsecond."""
    group = group_of(cluster(2, 4, shared_by=4), 8)
    assert tree_us(group, 8e6) == pytest.approx(8e4)  # half a tensor up and half down each way: once over the link
    assert ring_us(group, 8e6) == pytest.approx(14e4)
    assert levels_us(group, 8e6) == pytest.approx(2 * 0.75 * 8e6 / 400 + 8e6 / 100)
    three = group_of(cluster(3, 4, shared_by=4), 12)
    assert tree_us(three, 8e6) == pytest.approx(16e4)  # a node in the middle of one tree is a leaf of the other


def test_auto_is_the_ring_on_gloo_and_the_faster_one_on_nccl() -> None:
    gloo, nccl = cluster(2, 4, shared_by=4, cores=2.0), cluster(2, 4, shared_by=4)
    group = group_of(nccl, 8)
    assert all_reduce_us(gloo, group, 8e6) == ring_us(group, 8e6) > tree_us(group, 8e6)
    assert all_reduce_us(nccl, group, 8e6) == tree_us(group, 8e6)
    assert all_reduce_us(gloo, group, 8e6, "tree") == tree_us(group, 8e6)


def cut_us(group: Group, num_bytes: float) -> float:
    """Time of what has to leave a device, by all of its links, and a node, however it is done."""
    P, N = group.size, group.num_nodes
    device = group.near if N == 1 else group.far if P == N else group.near + group.far / group.node_size
    return max(2 * (P - 1) / P * num_bytes / device, 2 * (N - 1) / N * num_bytes / group.far)


@given(CLUSTERS, NUM_BYTES)
def test_no_way_is_faster_than_the_narrowest_cut(any_cluster: Cluster, num_bytes: float) -> None:
    group = group_of(any_cluster, any_cluster.num_ranks)
    found_us = [way(group, num_bytes) for way in WAYS.values()] + [all_reduce_us(any_cluster, group, num_bytes)]
    assert group.size == 1 or min(found_us) >= cut_us(group, num_bytes) * (1 - 1e-9)


def test_a_ring_that_forgets_the_links_between_nodes_is_faster_than_the_cut() -> None:
    """The control: what the test above must refuse."""
    group = group_of(cluster(2, 4, shared_by=4), 8)
    forgetful = 2 * 7 / 8 * 8e6 / group.near
    assert forgetful < cut_us(group, 8e6)


@given(CLUSTERS, NUM_BYTES, st.floats(1, 100), st.sampled_from(["near", "far"]))
def test_more_bandwidth_is_never_slower(any_cluster: Cluster, num_bytes: float, factor: float, which: str) -> None:
    links = {"near": any_cluster.near.bandwidth, "far": any_cluster.far.bandwidth}
    links[which] *= factor
    faster = cluster(
        any_cluster.num_nodes,
        any_cluster.node_size,
        near=links["near"],
        far=links["far"],
        shared_by=any_cluster.far.shared_by,
        cores=any_cluster.host.cores,
        latency_us=any_cluster.near.latency_us,
    )
    size = any_cluster.num_ranks
    for way in WAYS.values():
        assert way(group_of(faster, size), num_bytes) <= way(group_of(any_cluster, size), num_bytes) * (1 + 1e-9)


def test_a_group_of_one_costs_nothing() -> None:
    one = group_of(cluster(latency_us=9.0), 1)
    assert [way(one, 1e6) for way in WAYS.values()] == [0, 0, 0]
    assert (broadcasts_us(one, 1e6), gather_us(one, 1e6)) == (0, 0)
    assert all_reduce_load(cluster(), one, 1e6, 16) == Load()


def test_broadcasts_of_parts_wait_for_each_other() -> None:
    group = group_of(cluster(1, 4, near=400.0, latency_us=5.0), 4)
    assert broadcasts_us(group, 4000.0) == 4 * 3 * 5.0 + 10.0
    assert gather_us(group, 4000.0) == 3 * 5.0 + 0.75 * 10.0


@pytest.mark.parametrize(
    ("senders", "distance", "expected_us"),
    [
        (range(8), 8, 2.0 + 4000 / 25),  # four ranks of a node share its one link
        (range(8, 16), -8, 2.0 + 4000 / 25),
        (range(2), 2, 2.0 + 4000 / 400),  # inside the node
        (range(2, 4), 2, 2.0 + 4000 / 50),  # two of its ranks send to the next node
    ],
)
def test_messages_between_stages_share_the_links_that_they_cross(
    senders: range, distance: int, expected_us: float
) -> None:
    shared = cluster(shared_by=4, latency_us=2.0)
    assert send_us(shared, 4000.0, senders, distance) == pytest.approx(expected_us)


def test_a_host_pays_for_every_message_and_byte_of_a_ring() -> None:
    """8 ranks: 14 steps of 2 messages each, 7/8 of the tensor out twice."""
    host = Host(cores=2.0, collective_us=10.0, transfer_us=5.0, byte_us=0.5)
    gloo = Cluster(
        name="gloo",
        num_nodes=2,
        node_size=4,
        device=Device(memory_bytes=1e9),
        near=Link(),
        far=Link(bandwidth=100.0, shared_by=4),
        host=host,
    )
    load = all_reduce_load(gloo, group_of(gloo, 8), 800.0, 8)
    messages, bytes_ = Phase(8 * (5.0 + 14 * 2 * 10.0), 8.0, ((0, 1.0),)), Phase(8 * 1400 * 0.5, 8.0, ((0, 1.0),))
    assert load == Load((messages,), ((Phase(14.0),), (bytes_,)))
