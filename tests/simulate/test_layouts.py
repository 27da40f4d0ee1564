"""`plan --search`: the layouts of a job that fit a cluster, best first, and what a stage's experts take in them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from ds_moe_ep.cli.main import main
from ds_moe_ep.config.knobs import Layout
from ds_moe_ep.config.section import load_ds_config
from ds_moe_ep.errors import ConfigError, TopologyError
from ds_moe_ep.records.names import title_of
from ds_moe_ep.report.known_names import is_known
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.job import read_job, system_of
from ds_moe_ep.simulate.layouts.by_traffic import (
    cluster_of_ratio,
    layout_records,
    ratio_values,
    search_by_traffic,
    shared_by_all,
    traffic_ratio,
)
from ds_moe_ep.simulate.layouts.read import read_searched_job
from ds_moe_ep.simulate.layouts.search import search_layouts, sizes_of
from ds_moe_ep.simulate.layouts.tables import print_by_traffic, print_search, search_values
from ds_moe_ep.simulate.step.ep_step import ep_step
from ds_moe_ep.simulate.step.predict import on, simulate_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.source import PredictionSource

CLUSTER = load_cluster("h100_4x4")


def setup_of(config: str) -> Setup:
    return read_job(config, CLUSTER).setup


def with_layout(setup: Setup, ep_size: int, **layout: int) -> Setup:
    """The job in another layout, with the same batch and micro-batch."""
    training = setup.training
    made = Layout(**layout)
    copies = training.world_size // made.size
    accumulation = training.batch // copies // training.micro_batch
    return replace(
        setup,
        moe=replace(setup.moe, ep_size=ep_size),
        training=replace(training, ep_size=ep_size, layout=made, accumulation=accumulation),
    )


def overlapped(setup: Setup) -> Setup:
    return replace(setup, moe=replace(setup.moe, schedule="peers"))


def test_one_stage_of_shared_experts_takes_as_long_as_expert_parallelism_alone() -> None:
    """By another way: two stages have the same rows and products for each rank, and the bubble of 128 micro-batches."""
    whole = overlapped(setup_of("ep16"))
    alone = ep_step(whole)
    two_stages = simulate_step(with_layout(whole, 8, pp_size=2))
    bubble = 1 / (two_stages.setup.training.accumulation + 1)
    assert (1 - bubble) * 0.95 < two_stages.tps / alone.tps < 1


def test_rows_of_a_stage_count_as_the_experts_traffic_and_its_parts_sum_to_the_step() -> None:
    step = simulate_step(overlapped(setup_of("pp2_ep8")))
    assert sum(step.parts_us.values()) == pytest.approx(step.step_us)
    assert step.hidden is not None and 0.9 < step.hidden < 1
    assert step.parts_us["experts_traffic"] == pytest.approx(step.exposed_us, rel=1e-6)
    serial = simulate_step(replace(step.setup, moe=replace(step.setup.moe, schedule="serial")))
    assert serial.hidden == 0 and serial.step_us > step.step_us


def test_names_of_layouts_leave_out_what_is_one() -> None:
    moe = replace(setup_of("ep16").moe, ep_size=4, schedule="peers")
    assert system_of(Layout(tp_size=2, pp_size=2), moe) == "tp2_pp2_ep4"
    assert title_of("pp2_ep8") == "PP2/EP8" and title_of("tp2_ep8_serial") == "TP2/EP8 serial"


def test_layouts_are_those_that_divide_ranks_layers_widths_and_experts() -> None:
    sizes = {(layout.tp_size, layout.pp_size, ep_size) for layout, ep_size in sizes_of(setup_of("ep16"))}
    assert {(1, 1, 16), (1, 2, 8), (8, 2, 1), (2, 2, 4), (1, 4, 4)} <= sizes
    assert not any(tp * pp > 16 or 16 // pp % ep or 4 % pp for tp, pp, ep in sizes)


def test_the_search_orders_what_fits_and_tells_the_bound_and_the_rest() -> None:
    cluster = replace(CLUSTER, num_nodes=2, node_size=2)
    found = search_layouts(read_job("ep4_cpu", cluster), most=2)
    speeds = [each.prediction.step.tps for each in found.found]
    assert len(speeds) == 2 and speeds == sorted(speeds, reverse=True)
    best = found.found[0]
    assert best.fit.fits and best.bound["saved_ratio"].value > 0
    assert best.training.batch == found.job.setup.training.batch
    told = [*(each.system for each in found.found), *found.slower]
    assert len(told) + len(found.too_large) + len(found.impossible) == len(list(sizes_of(found.job.setup)))
    assert all(each.reason for each in (*found.too_large, *found.impossible))
    values = search_values(found)
    assert values["layouts"][0]["over_best"] == 1 and json.dumps(values, allow_nan=False)
    printed = Console(record=True, width=200, file=io.StringIO())
    print_search(found, printed)
    assert f"best in {best.title}" in printed.export_text()
    assert "…" not in in_80_columns(lambda console: print_search(found, console))


def test_a_job_that_is_written_for_more_ranks_is_searched_in_the_sizes_that_fit_fewer() -> None:
    cluster = replace(CLUSTER, num_nodes=2, node_size=2)
    with pytest.raises(TopologyError, match="the world has only 4 ranks"):
        read_job("ep16_cpu", cluster)
    job, alike = read_searched_job("ep16_cpu", cluster), read_searched_job("ep4_cpu", cluster)
    assert job.path == "ep16_cpu" and job.setup.training.batch == 64 and job.setup.training.world_size == 4
    assert job.notes[0].startswith("moe_ep.ep_size=16 of the file does not fit here (the world has only 4 ranks)")
    assert (Layout(), 4) in sizes_of(job.setup) and "does not fit" not in str(alike.notes)
    given = load_ds_config("ep16_cpu")
    odd = read_searched_job({**given, "train_batch_size": 63}, cluster)  # which two copies of a model cannot cut
    assert odd.setup.training.layout.size == 4 and odd.setup.training.batch == 63
    with pytest.raises(ConfigError, match=r"moe_ep\.model=null"):
        read_searched_job({**given, "moe_ep": {**given["moe_ep"], "model": None}}, cluster)


def in_80_columns(show: Callable[[Console], None]) -> str:
    """All that is printed on a narrow terminal."""
    console = Console(record=True, width=80, file=io.StringIO())
    show(console)
    return console.export_text()


def small_cluster() -> Cluster:
    """Two nodes of two devices on which nothing but bytes and arithmetic takes time."""
    near, far = (replace(link, latency_us=0.0) for link in (CLUSTER.near, CLUSTER.far))
    device = replace(CLUSTER.device, launch_us=0.0, sync_us=0.0)
    return replace(CLUSTER, num_nodes=2, node_size=2, near=near, far=far, device=device, ranges={})


def test_links_of_a_ratio_have_that_of_traffic_to_compute_where_all_ranks_share_the_experts() -> None:
    job = read_job("ep4_cpu", small_cluster())
    found, shared = cluster_of_ratio(job, 1.0), shared_by_all(job)
    assert traffic_ratio(on(shared, found)) == pytest.approx(1.0, rel=1e-3)
    twice = found.with_far(bandwidth=2 * found.far.bandwidth)
    assert traffic_ratio(on(shared, twice)) == pytest.approx(0.5, rel=1e-3), "the control: another link has another"
    assert replace(found, far=CLUSTER.far) == replace(small_cluster(), far=CLUSTER.far), "all else stays"
    with pytest.raises(ConfigError, match=r"traffic=0.01: .*takes at least 0.077 of the compute"):
        cluster_of_ratio(job, 0.01)
    with pytest.raises(ConfigError, match="num_nodes=1 with traffic=1: there is no link"):
        cluster_of_ratio(read_job("ep4_cpu", replace(small_cluster(), num_nodes=1, node_size=4)), 1.0)


def test_experts_stay_inside_a_node_once_the_links_between_nodes_are_slow_enough() -> None:
    fast, slow = search_by_traffic(read_job("ep4_cpu", small_cluster()), [8.0, 0.3])
    assert (fast.ratio, slow.ratio) == (0.3, 8.0), "the smallest ratio first"
    winners = [at.search.found[0].system for at in (fast, slow)]
    assert winners == ["ep4", "pp2_ep2"], "the control: on links of one ratio both would be the same"
    assert all(at.is_told_apart for at in (fast, slow))
    values = ratio_values([fast, slow])
    assert [each["best"] for each in values] == winners and json.dumps(values, allow_nan=False)
    printed = Console(record=True, width=200, file=io.StringIO())
    print_by_traffic([fast, slow], printed)
    assert "by links between nodes: EP4 overlapped, then PP2/EP2" in printed.export_text()
    assert "…" not in in_80_columns(lambda console: print_by_traffic([fast, slow], console))
    source = PredictionSource(environment="simulated_small", command="plan", commit="abc", hardware="none")
    records = list(layout_records([fast, slow], source))
    assert all(is_known(each.name) and each.emulated for each in records)
    assert "layouts.simulated_small.traffic800.pp2_ep2.over_best" in {each.name for each in records}


def test_the_command_refuses_what_a_search_does_not_take() -> None:
    plan = ["plan", "--config", "ep16", "--cluster", "h100_4x4"]
    for option in (["--sweep", "ep=1,4"], ["--micro-batch", "2"], ["--compare", "tp8_pp2"]):
        assert main([*plan, "--search", *option]) != 0
    assert main([*plan, "--traffic", "0.3"]) != 0, "of a search alone"
