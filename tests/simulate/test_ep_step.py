"""An expert-parallel step respects what no machine can beat, and is what arithmetic by hand says where that is easy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.price import candidates
from ds_moe_ep.schedule.two_level import copies_share
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Host
from ds_moe_ep.simulate.step import moe_pass
from ds_moe_ep.simulate.step.ep_step import EpJob, ep_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.footprint import dispatch_bytes, forward_flops, training_flops
from tests.simulate.jobs_for_tests import FREE, MODEL, cluster, setup, slow_link
from tests.simulate.slow_simulator import critical_path_us

SCHEDULES = st.sampled_from(candidates(Torus(4, 4)))
RATES = st.floats(0.1, 1e4)


def with_links(on: Cluster, near: float, far: float) -> Cluster:
    return dataclasses.replace(on, near=slow_link(near), far=slow_link(far, shared_by=4.0, latency_us=3.0))


def compute_us(job: Setup) -> float:
    """Time of the model's arithmetic at the peak; attention's backward pass computes its scores again."""
    flops = forward_flops if job.mode == "forward" else training_flops
    tokens = job.micro_batch_tokens * job.training.accumulation
    again = 0.5 * 2 * MODEL.sequence_length * MODEL.hidden_size * MODEL.num_layers * (job.mode == "training")
    return tokens * (flops(MODEL, job.moe) + again) / job.cluster.device.peak_fp16


@settings(deadline=None)
@given(knobs=SCHEDULES, mode=st.sampled_from(["forward", "training"]), accumulation=st.integers(1, 3))
def test_without_costs_of_communication_a_step_is_exactly_its_compute(
    knobs: dict[str, Any], mode: str, accumulation: int
) -> None:
    job = setup(cluster(), accumulation=accumulation, mode=mode, **knobs)
    step = ep_step(job)
    assert step.step_us == pytest.approx(compute_us(job), rel=1e-9)
    assert (step.traffic_us, step.exposed_us) == (0.0, 0.0)
    slower = setup(with_links(job.cluster, 1.0, 1.0), accumulation=accumulation, mode=mode, **knobs)
    assert ep_step(slower).step_us > 1.01 * compute_us(job), "links that cost nothing would hide the control"


@settings(deadline=None)
@given(knobs=SCHEDULES, near=RATES, far=RATES)
def test_no_step_beats_its_arithmetic_its_bytes_or_its_longest_chain(
    knobs: dict[str, Any], near: float, far: float
) -> None:
    job = setup(with_links(cluster(), near, far), mode="forward", **knobs)
    step = ep_step(job)
    assert step.step_us >= compute_us(job) * (1 - 1e-9)
    exchanges = 2 * MODEL.num_layers
    leaving = dispatch_bytes(job.micro_batch_tokens, MODEL, job.moe, "fp16")
    far_bytes, near_bytes = leaving * 12 / 15, leaving * 3 / 15
    assert step.step_us >= exchanges * far_bytes / (far / 4) * (1 - 1e-9)
    assert step.step_us >= exchanges * near_bytes / near * (1 - 1e-9)
    parts = EpJob(job)
    program = parts.micro_batch()
    assert step.step_us >= critical_path_us(program.tasks, parts.machine.capacities) * (1 - 1e-9)


@settings(deadline=None)
@given(knobs=SCHEDULES, near=RATES, far=RATES, faster=st.floats(1.0, 50.0), which=st.sampled_from(["near", "far"]))
def test_more_bandwidth_never_makes_a_step_slower(
    knobs: dict[str, Any], near: float, far: float, faster: float, which: str
) -> None:
    slow = ep_step(setup(with_links(cluster(), near, far), **knobs))
    better = {"near": near, "far": far, which: faster * (near if which == "near" else far)}
    fast = ep_step(setup(with_links(cluster(), better["near"], better["far"]), **knobs))
    assert fast.step_us <= slow.step_us * (1 + 1e-9)


@settings(deadline=None)
@given(knobs=SCHEDULES, near=RATES, far=RATES)
def test_parts_sum_to_the_step_and_shares_are_shares(knobs: dict[str, Any], near: float, far: float) -> None:
    step = ep_step(setup(with_links(cluster(), near, far), **knobs))
    assert sum(step.parts_us.values()) == pytest.approx(step.step_us)
    assert 0 < step.busy <= 1 + 1e-9 and 0 < step.mfu <= 1 + 1e-9
    assert 0 <= step.exposed_us <= step.traffic_us <= 2 * step.step_us


@pytest.mark.parametrize("knobs", candidates(Torus(4, 4)), ids=str)
def test_one_rank_stands_for_sixteen_with_equal_loads(knobs: dict[str, Any]) -> None:
    on = with_links(cluster(), 50.0, 40.0)
    one, all_of_them = (ep_step(setup(on, loads=loads, **knobs)) for loads in ((), (1.0,) * 16))
    assert all_of_them.step_us == pytest.approx(one.step_us, rel=1e-9)
    assert all_of_them.exposed_us == pytest.approx(one.exposed_us, rel=1e-6, abs=1e-3)
    skewed = ep_step(setup(on, loads=(2.5,) + (0.9,) * 15, **knobs))
    assert skewed.step_us > 1.05 * one.step_us


def test_a_full_rank_adds_its_own_rows_where_links_cost_nothing() -> None:
    on, loads = cluster(), (3.0, *(13 / 15,) * 15)
    even, skewed = ep_step(setup(on)), ep_step(setup(on, loads=loads))
    rows = even.setup.micro_batch_tokens
    experts_us = 3 * MODEL.num_layers * rows * 2 * MODEL.expert_params / 1e3
    assert skewed.step_us - even.step_us == pytest.approx(2 * experts_us)


def test_the_serial_schedule_exposes_every_exchange() -> None:
    job = setup(with_links(cluster(), 1e9, 40.0), schedule="serial")
    step = ep_step(job)
    each_us = job.micro_batch_tokens * 64 * 2 * 12 / 16 / 10.0 + 3.0  # far rows, a quarter of 40 bytes/us
    exchanges = 4 * MODEL.num_layers
    assert step.exposed_us == pytest.approx(exchanges * each_us)
    assert step.hidden == pytest.approx(0.0)


def test_recomputation_sends_rows_again() -> None:
    on = with_links(cluster(), 100.0, 40.0)
    stored, again = (setup(on, dataclasses.replace(MODEL, recompute=recompute)) for recompute in (False, True))
    assert ep_step(again).traffic_us > 1.4 * ep_step(stored).traffic_us


def test_micro_batches_follow_one_another_and_the_end_comes_once() -> None:
    on = with_links(cluster(), 100.0, 40.0)
    one, three = (ep_step(setup(on, accumulation=times)) for times in (1, 3))
    end_us = one.parts_us["gradients"]
    assert end_us > 0
    assert three.step_us == pytest.approx(3 * (one.step_us - end_us) + end_us)
    assert max(span.stop_us for span in one.spans) == pytest.approx(one.step_us)


def test_what_a_host_shares_by_sixteen_costs_sixteen_times() -> None:
    """One layer's own work on two cores for sixteen ranks: eight times as long as on a core of its own."""
    free = cluster(near=FREE, far=FREE)
    host = dataclasses.replace(free, host=Host(cores=2.0, forward_us=100.0))
    difference_us = ep_step(setup(host, mode="forward")).step_us - ep_step(setup(free, mode="forward")).step_us
    assert difference_us == pytest.approx(MODEL.num_layers * 8 * 100.0)
    on_cores = dataclasses.replace(host, computes_on="host", host=Host(cores=2.0))
    assert ep_step(setup(on_cores, mode="forward")).step_us == pytest.approx(
        8 * ep_step(setup(free, mode="forward")).step_us
    )


def test_a_device_with_few_rows_an_expert_is_slower() -> None:
    def step_us(half_rows: float, chunks: int) -> float:
        device = Device(memory_bytes=80e9, peak_fp16=1e3, half_rows=half_rows)
        return ep_step(setup(cluster(device=device), mode="forward", schedule="chunks", chunks=chunks)).step_us

    assert step_us(0.0, 8) == pytest.approx(step_us(0.0, 1))
    assert step_us(64.0, 8) > 1.2 * step_us(64.0, 1)


@pytest.mark.parametrize("far", [4.0, 40.0, 400.0])
@pytest.mark.parametrize(
    "loads",
    [(3.0, *(13 / 15,) * 15), (4.0, 2.0, *(10 / 14,) * 14), (13.0, *(3 / 15,) * 15)],
    ids=["one", "two", "most"],
)
def test_the_fullest_rank_stands_for_many_about_as_all_of_them_would(
    loads: tuple[float, ...], far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of when its peers send, which is worth a fifth where links alone count."""
    job = setup(with_links(cluster(), 1e4, far), loads=loads)
    each = ep_step(job)
    monkeypatch.setattr(moe_pass, "MAX_RANKS", 8)
    alone = ep_step(job)
    assert alone.step_us == pytest.approx(each.step_us, rel=0.2)
    even = ep_step(setup(with_links(cluster(), 1e4, far)))
    assert alone.step_us > 1.2 * even.step_us


@given(num_experts=st.sampled_from([16, 256, 1024]), memory=st.sampled_from([1.0, 1e2, 1e9]))
def test_a_gate_costs_its_products_in_fp32_or_its_bytes_whichever_take_longer(num_experts: int, memory: float) -> None:
    device = Device(memory_bytes=80e9, peak_fp16=1e3, peak_fp32=10.0, memory_bandwidth=memory)
    gates = [
        ep_step(setup(cluster(device=on), mode="forward", num_experts=num_experts))
        for on in (device, dataclasses.replace(device, peak_fp32=1e300))
    ]
    tokens = gates[0].setup.micro_batch_tokens
    products_us = tokens * 2 * MODEL.hidden_size * num_experts / 10.0
    bytes_us = MODEL.hidden_size * (2 * tokens + 4 * num_experts) / memory
    longer_us = MODEL.num_layers * (max(products_us, bytes_us) - bytes_us)
    assert gates[0].step_us - gates[1].step_us == pytest.approx(longer_us, abs=1e-6 * gates[0].step_us)


def test_utilization_counts_the_cores_where_the_host_computes() -> None:
    """Two cores for sixteen ranks, which do nothing but products at the peak of a core."""
    job = setup(dataclasses.replace(cluster(), computes_on="host", host=Host(cores=2.0)), mode="forward")
    assert ep_step(job).mfu == pytest.approx(1.0)
    many = dataclasses.replace(job.cluster, host=Host(cores=64.0))
    assert ep_step(dataclasses.replace(job, cluster=many)).mfu == pytest.approx(1.0), "a rank has one thread"


@pytest.mark.parametrize("loads", [(), (2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)], ids=["even", "uneven"])
@pytest.mark.parametrize("top_k", [2, 4])
def test_copies_shorten_one_of_four_far_exchanges_and_sums_all_of_them(top_k: int, loads: tuple[float, ...]) -> None:
    def traffic_us(two_level: str, **links: Any) -> float:
        on = cluster(num_nodes=2, **links)
        job = setup(on, top_k=top_k, two_level=two_level, schedule="serial", num_experts=16, loads=loads)
        return ep_step(job).traffic_us

    far, near, share = {"far": slow_link(10.0)}, {"near": slow_link(10.0)}, copies_share(16, top_k, 2)
    rows, copies, sums = (traffic_us(kind, **far) for kind in ("off", "copies", "sums"))
    assert sums < copies < rows  # where loads differ by more: copies share a node's links evenly
    if not loads:
        assert (copies / rows, sums / rows) == (pytest.approx(3 / 4 + share / 4), pytest.approx(share))
    rows, copies, sums = (traffic_us(kind, **near) for kind in ("off", "copies", "sums"))
    if not loads:  # of a node's four ranks three others get rows, and a relay makes those of as many tokens again
        assert (copies / rows, sums / rows) == (pytest.approx(5 / 4), pytest.approx(2.0))
    assert sums > copies > rows
