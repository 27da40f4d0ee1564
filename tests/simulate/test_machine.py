"""Ranks that are simulated one by one have no more of a link than the one rank that stands for all."""

from __future__ import annotations

import dataclasses

import pytest

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.simulate.cluster.cluster import Cluster, Link
from ds_moe_ep.simulate.cluster.machine import machine_for_group
from ds_moe_ep.simulate.step.ep_step import EpJob, ep_step
from ds_moe_ep.simulate.step.setup import Setup
from tests.simulate.jobs_for_tests import cluster, setup, slow_link


def job(on: Cluster, ep_size: int) -> Setup:
    """The experts of groups of `ep_size` ranks, with copies on the ranks that are left."""
    made, moe = setup(on), MoEConfig(num_experts=ep_size, ep_size=ep_size, schedule="serial")
    return dataclasses.replace(made, moe=moe, training=dataclasses.replace(made.training, ep_size=ep_size))


@pytest.mark.parametrize("ep_size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("shared_by", [1.0, 2.0, 3.0, 4.0])
def test_equal_loads_take_what_even_routing_takes_wherever_groups_lie(ep_size: int, shared_by: float) -> None:
    near, far = slow_link(100.0, shared_by), slow_link(10.0, shared_by)
    even = job(cluster(3, 4, near=near, far=far), ep_size)
    each = dataclasses.replace(even, loads=(1.0,) * ep_size)
    found_us, expected_us = (ep_step(made).exposed_us for made in (each, even))
    if shared_by == 3.0 and ep_size in (4, 12):  # one of four ranks has a third of a link to itself, as all have here
        assert found_us <= expected_us * (1 + 1e-9)
    assert found_us == pytest.approx(expected_us)


def test_a_group_that_lies_across_nodes_counts_where_others_do_not() -> None:
    """Ranks 0-2 share a node of four, ranks 3-5 lie on two: they send over the slow link, and all wait for them."""
    on = cluster(3, 4, near=slow_link(100.0), far=slow_link(10.0, shared_by=4.0))
    assert EpJob(job(on, 3)).torus == Torus(3, 1)
    assert EpJob(job(on, 2)).torus == Torus(1, 2)
    assert EpJob(job(on, 12)).torus == Torus(3, 4)
    across_us, inside_us = (ep_step(job(on, ep_size)).exposed_us for ep_size in (3, 2))
    assert across_us > 10 * inside_us


def test_ranks_of_a_group_bring_their_share_of_a_link() -> None:
    on = cluster(3, 4, near=Link(bandwidth=8.0, shared_by=2.0), far=Link(bandwidth=12.0, shared_by=4.0))
    whole = machine_for_group(on, Torus(3, 4))
    assert {whole.capacities[ways.far_out] for ways in whole.ways} == {12.0}
    assert {whole.capacities[ways.near_in] for ways in whole.ways} == {8.0}
    assert len({ways.near_out for ways in whole.ways}) == 6
    alone = machine_for_group(on, Torus(6, 1))
    assert {(alone.capacities[ways.far_in], alone.capacities[ways.near_out]) for ways in alone.ways} == {(3.0, 4.0)}
