"""The simulator and the tuner agree on the best schedule: both run the same events on the same candidates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule import price
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.choose import as_auto, choose_schedule, layer_us, with_knobs
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.moe_pass import WorkShare
from ds_moe_ep.simulate.step.setup import Setup
from tests.policy.sources import ROOT
from tests.simulate.jobs_for_tests import cluster, setup, slow_link

H100 = load_cluster(ROOT / "ds_configs" / "clusters" / "h100_4x4.json")


def tuner_costs(job: Setup) -> price.Costs:
    """Costs as the tuner would measure them: exchanges alone on the wire, and all rows at once through experts."""
    parts, on = EpJob(job), job.cluster
    sent, torus = parts.rows.sent * parts.layer.row_bytes, parts.torus
    times, rows = parts.layer.times, WorkShare(parts.rows.sent, 1)
    return price.Costs(
        near_us=sent * (torus.node_size - 1) / torus.size / on.near.rate,
        far_us=sent * (torus.num_nodes - 1) / torus.num_nodes / (on.far.rate / on.far.shared_by),
        latency_us=max(on.near.latency_us, on.far.latency_us),
        forward_us=times.forward(rows),
        input_grad_us=times.input_grads(rows),
        weight_grad_us=times.weight_grads(rows),
    )


def links(far: float) -> Cluster:
    return cluster(near=slow_link(1e9), far=slow_link(far, shared_by=4.0))


@pytest.mark.parametrize("knobs_of_job", [{}, {"top_k": 4, "two_level": "auto"}], ids=["one level", "two levels"])
@pytest.mark.parametrize("far", [2.0, 10.0, 40.0, 200.0, 1e4])
def test_tuner_and_simulator_price_every_candidate_alike(far: float, knobs_of_job: dict[str, Any]) -> None:
    job = setup(links(far), **knobs_of_job)
    simulated = {str(knobs): us for us, knobs in choose_schedule(job)}
    for us, knobs in price.ranked(job.moe, Torus(4, 4), tuner_costs(job)):
        assert us == pytest.approx(simulated[str(knobs)], rel=1e-6), knobs


def test_auto_takes_copies_on_a_slow_far_link_and_never_for_one_expert_per_token() -> None:
    def chosen(**knobs: Any) -> MoEConfig:
        return as_auto(setup(links(2.0), schedule="auto", **knobs)).moe

    assert chosen(top_k=4, two_level="auto").two_level == "copies"
    assert chosen(top_k=4).two_level == "off"
    assert chosen(top_k=1, two_level="auto").two_level == "auto"  # as it was given: nothing is copied


@pytest.mark.parametrize("far", [2.0, 10.0, 40.0, 200.0])
def test_tuner_and_simulator_agree_on_the_best(far: float) -> None:
    job = setup(links(far))
    best = choose_schedule(job)[0][1]
    prices = {str(knobs): us for us, knobs in price.ranked(job.moe, Torus(4, 4), tuner_costs(job))}
    assert prices[str(best)] <= min(prices.values()) * 1.001


def test_on_the_specifications_cluster_both_take_groups_of_peers() -> None:
    from tests.simulate.jobs_for_tests import MODEL

    model = dataclasses.replace(MODEL, hidden_size=8192, num_heads=16, expert_width=32768, sequence_length=10000)
    job = setup(H100, model)
    best = choose_schedule(job)[0][1]
    priced = price.ranked(job.moe, Torus(4, 4), tuner_costs(job))
    assert best["schedule"] == "peers" == priced[0][1]["schedule"]


def test_auto_takes_the_best_and_a_named_schedule_stays() -> None:
    job = setup(links(10.0), schedule="auto")
    chosen = as_auto(job)
    assert chosen.moe.schedule != "auto"
    assert layer_us(chosen) == min(layer_us(with_knobs(job, knobs)) for _, knobs in choose_schedule(job))
    assert as_auto(setup(links(10.0), schedule="serial")).moe.schedule == "serial"


def test_of_equal_candidates_the_one_with_fewest_pieces_comes_first() -> None:
    assert choose_schedule(setup(cluster()))[0][1] == {"schedule": "serial"}
