"""`plan`: what fits, what is foretold with its bar, what bounds it, and what the command prints."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError, TopologyError
from ds_moe_ep.records.names import title_of
from ds_moe_ep.records.quantity import Quantity, number
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.fit import cuts_of_batch, fit_memory, with_micro_batch
from ds_moe_ep.simulate.job.job import read_job
from ds_moe_ep.simulate.plan.bounds import FAR, RESOURCES
from ds_moe_ep.simulate.plan.plan import Plan, compare, make_plan
from ds_moe_ep.simulate.step.predict import predict, simulate_step
from ds_moe_ep.simulate.step.quantities import breakdown, headline

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
EP16, TP8_PP2 = str(CONFIGS / "ep16.json"), str(CONFIGS / "tp8_pp2.json")
CLUSTER_PATH = str(CONFIGS / "clusters" / "h100_4x4.json")
BOTH = pytest.mark.parametrize("config", [EP16, TP8_PP2])


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster(CLUSTER_PATH)


@functools.cache
def plan_of(config: str, cluster: Cluster) -> Plan:
    """The plan of a file as it is, made once; clusters that differ in ranges alone count as one here."""
    return make_plan(config, cluster)


def with_device(cluster: Cluster, **changes: float) -> Cluster:
    return dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, **changes))


def config_of(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The file's ds_config with other values; None takes a key away."""
    values = json.loads(Path(path).read_text(encoding="utf-8")) | changes
    return {key: value for key, value in values.items() if value is not None}


# what fits


def test_a_device_holds_what_the_shapes_say(cluster: Cluster) -> None:
    """By hand: a rank has 4 layers of 4*8192**2 attention, 8192*16 gate, 4*8192 norms and one expert of 2*8192*32768,
    then 2*256*8192 embedding and head, and the last norm of 2*8192."""
    D, F = 8192, 32768
    parameters = 4 * (4 * D * D + 16 * D + 4 * D + 2 * D * F) + 2 * 256 * D + 2 * D
    dense = parameters - 4 * 2 * D * F
    fit = fit_memory(read_job(EP16, cluster).setup)
    assert fit.memory.weights == fit.memory.gradients == 2 * parameters
    assert fit.memory.optimizer == 12 * (dense // 16 + 4 * 2 * D * F)  # ZeRO shares dense states by 16, experts' by 1
    assert fit.memory.peak == fit.memory.persistent + fit.memory.activations + 2 * 500_000_000
    assert fit.spare_bytes == 80e9 - 4e9 - fit.memory.peak
    assert fit.spare_range == (80e9 - 6e9 - fit.memory.peak, 80e9 - 3e9 - fit.memory.peak)
    assert fit.fits


@BOTH
def test_what_does_not_fit_is_refused_with_what_is_missing_and_the_way_out(cluster: Cluster, config: str) -> None:
    peak_gb = fit_memory(read_job(config, cluster).setup).memory.peak / 1e9
    small = with_device(cluster, memory_bytes=55e9)
    with pytest.raises(ConfigError) as refusal:
        make_plan(config, small, micro_batch=16)
    needed_gb = fit_memory(read_job(config, small, micro_batch=16).setup).memory.peak / 1e9
    assert f"needs {needed_gb:.1f} GB" in str(refusal.value)
    assert f"{needed_gb - 51:.1f} GB too many" in str(refusal.value)
    assert "train_micro_batch_size_per_gpu=" in str(refusal.value)
    just_enough = with_device(cluster, memory_bytes=peak_gb * 1e9 + 4e9)
    assert make_plan(config, just_enough).fit.spare_bytes == pytest.approx(0, abs=1)


@BOTH
def test_one_sequence_more_than_the_largest_micro_batch_does_not_fit(cluster: Cluster, config: str) -> None:
    setup = read_job(config, cluster).setup
    largest = fit_memory(setup).largest

    def fits(micro_batch: int) -> bool:
        training = dataclasses.replace(setup.training, micro_batch=micro_batch)
        return fit_memory(dataclasses.replace(setup, training=training)).fits

    assert fits(largest)
    assert not fits(largest + 1)


@BOTH
def test_the_largest_micro_batch_of_a_plan_keeps_the_batch(cluster: Cluster, config: str) -> None:
    as_written, largest = read_job(config, cluster).setup, make_plan(config, cluster, micro_batch="largest")
    training = largest.job.setup.training
    assert training.batch == as_written.training.batch
    assert training.micro_batch == largest.fit.largest_of_batch
    larger = [cut for cut in cuts_of_batch(training) if cut.micro_batch > training.micro_batch]
    assert all(not fit_memory(dataclasses.replace(as_written, training=cut)).fits for cut in larger)


def test_a_micro_batch_that_does_not_cut_the_batch_is_refused_with_the_nearest(cluster: Cluster) -> None:
    training = read_job(EP16, cluster).setup.training
    assert with_micro_batch(training, 4).accumulation == 16
    with pytest.raises(ConfigError, match=r"micro_batch=7: .* 64 sequences .* 8 is the nearest"):
        with_micro_batch(training, 7)


def test_a_rank_with_more_rows_needs_more_memory(cluster: Cluster) -> None:
    even, skewed = (fit_memory(read_job(EP16, cluster, load=load).setup) for load in ("even", "zipf:0.5"))
    assert skewed.memory.activations > even.memory.activations
    assert skewed.largest < even.largest


# the job


@pytest.mark.parametrize(
    ("changes", "nodes", "error", "words"),
    [
        ({"moe_ep": {"ep_size": 16}}, 4, ConfigError, "moe_ep.model=null"),
        ({"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 2}, 4, ConfigError, "mpu of DeepSpeed's"),
        ({}, 3, TopologyError, "ep_size=16"),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 1}, 4, ConfigError, "train_batch_size=24"),
    ],
)
def test_a_job_that_cannot_run_on_the_cluster_is_refused(
    cluster: Cluster, changes: dict[str, Any], nodes: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refusal:
        make_plan(config_of(EP16, changes), cluster.with_nodes(nodes))
    assert words in str(refusal.value)


def test_a_load_says_that_it_changes_nothing_under_tensor_parallelism(cluster: Cluster) -> None:
    plan = make_plan(TP8_PP2, cluster, load="zipf:1.0")
    assert "changes nothing here" in plan.job.notes[0]
    assert plan.prediction.step.step_us == plan_of(TP8_PP2, cluster).prediction.step.step_us


@pytest.mark.parametrize(
    ("system", "title"),
    [("ep16", "EP16 overlapped"), ("tp8_pp2", "TP8/PP2"), ("ep64_serial", "EP64 serial"), ("tp4_pp1", "TP4/PP1")],
)
def test_systems_of_any_size_have_a_title(system: str, title: str) -> None:
    assert title_of(system) == title


# what is foretold


@BOTH
def test_a_bar_holds_the_step_of_both_ends_and_of_the_file(cluster: Cluster, config: str) -> None:
    prediction = plan_of(config, cluster).prediction
    slow, fast = (
        simulate_step(dataclasses.replace(prediction.step.setup, cluster=end)).step_us for end in cluster.ends()
    )
    assert fast < prediction.step.step_us < slow
    bar = prediction.estimate(lambda step: step.step_us)
    assert (bar.low, bar.high) == (fast, slow)
    assert prediction.tps.value == pytest.approx(1e6 * prediction.step.setup.batch_tokens / prediction.step.step_us)


def test_without_ranges_there_is_no_bar(cluster: Cluster) -> None:
    exact = make_plan(EP16, dataclasses.replace(cluster, ranges={})).prediction
    assert exact.tps.low == exact.tps.value == exact.tps.high
    assert exact.tps.text(digits=3) == number(exact.tps.value, digits=3)


@BOTH
def test_parts_sum_to_the_step_and_shares_are_shares(cluster: Cluster, config: str) -> None:
    prediction = plan_of(config, cluster).prediction
    named = {quantity.name: quantity for quantity in headline(prediction)}
    assert sum(part.value for part in breakdown(prediction)) == pytest.approx(named["step"].value)
    assert 0 < named["mfu"].low <= named["mfu"].high < named["busy"].high <= 100
    assert named["tpot"].value * named["tps"].value == pytest.approx(1e6)


def test_auto_takes_the_best_of_the_candidates_and_a_named_schedule_stays(cluster: Cluster) -> None:
    auto = plan_of(EP16, cluster)
    moe = auto.job.setup.moe
    assert {name: getattr(moe, name) for name in auto.choices[0].labels} == auto.choices[0].labels
    assert auto.at_ends == tuple(make_plan(EP16, end).choices[0].labels for end in cluster.ends())
    serial = make_plan(
        config_of(EP16, {"moe_ep": {**dataclasses.asdict(moe), "schedule": "serial", "model": "specification"}}),
        cluster,
    )
    assert serial.system == "ep16_serial"
    assert serial.serial is None
    assert auto.serial is not None
    assert auto.serial.step.step_us == serial.prediction.step.step_us > auto.prediction.step.step_us
    assert [choice.labels for choice in serial.choices] == [choice.labels for choice in auto.choices]


def test_a_forward_pass_is_a_third_of_training_or_less(cluster: Cluster) -> None:
    training, forward = (make_plan(EP16, cluster, mode=mode).prediction for mode in ("training", "forward"))
    assert forward.step.tps > 3 * training.step.tps  # recomputation and the optimizer come on top of 2 backward parts
    assert forward.step.setup.flops * 3 == training.step.setup.flops


# what bounds it


def test_the_verdict_flips_to_the_link_when_the_link_is_slow(cluster: Cluster) -> None:
    usual = plan_of(EP16, cluster)
    assert usual.bounds[0].title == "matrix products and attention"
    slow = make_plan(EP16, cluster.with_far(bandwidth=cluster.far.bandwidth / 50))
    assert slow.bounds[0].title == FAR
    assert slow.bounds[0]["saved_ratio"].value > 0.5


def test_what_is_saved_is_the_step_without_the_resource(cluster: Cluster) -> None:
    plan = plan_of(TP8_PP2, cluster)
    far = next(bound for bound in plan.bounds if bound.title == FAR)
    free = dataclasses.replace(cluster, far=dataclasses.replace(cluster.far, bandwidth=math.inf, latency_us=0.0))
    left_us = predict(read_job(TP8_PP2, free).setup).step.step_us
    assert far["step_ms"].value == pytest.approx(left_us / 1e3)
    saved = far["saved_ratio"]
    assert saved.value == pytest.approx(1 - left_us / plan.prediction.step.step_us)
    assert saved.low <= saved.value <= saved.high


def test_a_resource_that_takes_no_time_saves_nothing(cluster: Cluster) -> None:
    free = dataclasses.replace(
        cluster, ranges={}, far=dataclasses.replace(cluster.far, bandwidth=math.inf, latency_us=0.0)
    )
    saved = {bound.title: bound["saved_ratio"].value for bound in make_plan(EP16, free).bounds}
    assert saved[FAR] == 0
    assert set(saved) == set(RESOURCES)


def test_one_node_has_no_links_between_nodes(cluster: Cluster) -> None:
    one = dataclasses.replace(cluster, num_nodes=1, node_size=16)
    assert FAR not in {bound.title for bound in make_plan(EP16, one).bounds}


# what else fits


def test_what_is_offered_instead_fits_and_is_simulated_as_changed(cluster: Cluster) -> None:
    plan = plan_of(EP16, cluster)
    by_change = {other.title: other for other in plan.others}
    stored = by_change["moe_ep.model.recompute=false"]
    moe = {
        **json.loads(Path(EP16).read_text(encoding="utf-8"))["moe_ep"],
        "model": {"name": "specification", "recompute": False},
    }
    by_hand = make_plan(config_of(EP16, {"moe_ep": moe}), cluster)
    assert stored["throughput_tokens_per_s"].bar == by_hand.prediction.tps.bar
    assert stored["spare_bytes"].value == by_hand.fit.spare_bytes >= 0
    assert stored["tps_ratio"].value == pytest.approx(by_hand.prediction.tps.value / plan.prediction.tps.value)
    larger = by_change[f"train_micro_batch_size_per_gpu={plan.fit.largest_of_batch}"]
    with_larger = make_plan(EP16, cluster, micro_batch=plan.fit.largest_of_batch)
    assert with_larger.job.setup.training.batch == 1024
    assert larger["throughput_tokens_per_s"].bar == with_larger.prediction.tps.bar
    ratios = [other["tps_ratio"].value for other in plan.others]
    assert ratios == sorted(ratios, reverse=True)


def test_what_does_not_fit_is_not_offered(cluster: Cluster) -> None:
    plan = plan_of(EP16, cluster)
    exactly = with_device(cluster, memory_bytes=plan.fit.memory.peak + cluster.device.reserve_bytes)
    assert make_plan(EP16, exactly).others == ()


# the specification


def test_the_stated_throughput_needs_the_utilization_that_arithmetic_says(cluster: Cluster) -> None:
    """By hand: 450,000 tokens/s of 21.3 GFLOP are 9.6 PFLOP/s of the 15.8 that 16 devices have."""
    stated = plan_of(EP16, cluster).stated
    assert stated is not None
    assert stated.training == pytest.approx(450_000 * 21.3e9 / (16 * 989e12), rel=2e-3)
    assert round(100 * stated.training) == 61
    assert stated.training == pytest.approx(3 * stated.forward)
    base = plan_of(TP8_PP2, cluster).stated
    assert base is not None
    assert base.tps == 120_000


def test_another_model_or_another_number_of_devices_has_nothing_stated(cluster: Cluster) -> None:
    small = {"num_experts": 16, "ep_size": 16, "model": "small"}
    assert make_plan(config_of(EP16, {"moe_ep": small}), cluster).stated is None
    assert make_plan(EP16, cluster.with_nodes(8)).stated is None


# side by side


def test_the_ratio_is_of_tokens_a_second_at_the_same_ends(cluster: Cluster) -> None:
    ours, theirs = plan_of(EP16, cluster), plan_of(TP8_PP2, cluster)
    comparison = compare(ours, theirs)
    pairs = [
        (getattr(ours.prediction, end).tps, getattr(theirs.prediction, end).tps) for end in ("step", "slow", "fast")
    ]
    ratios = [mine / its for mine, its in pairs]
    assert comparison.ratio == Quantity.of(*ratios, unit="ratio")
    assert comparison.ratio.high - comparison.ratio.low < ours.prediction.tps.high / theirs.prediction.tps.low - 1
    itself = compare(ours, ours)
    assert itself.ratio.bar == [1, 1, 1]
    assert itself.same_batch is None
    assert itself.ours.title == "EP16 overlapped (ep16.json)"
    assert comparison.ours.title == "EP16 overlapped"


def test_of_two_batches_the_ratio_is_also_told_of_one(cluster: Cluster) -> None:
    """The baseline's bubble of 1/5 at 4 micro-batches shrinks when it takes the 128 of our batch."""
    comparison = compare(plan_of(EP16, cluster), plan_of(TP8_PP2, cluster))
    assert comparison.same_batch is not None
    assert comparison.same_batch.value < comparison.ratio.value
    accumulated = config_of(TP8_PP2, {"train_batch_size": 1024, "gradient_accumulation_steps": None})
    by_hand = compare(comparison.ours, make_plan(accumulated, cluster))
    assert by_hand.ratio == comparison.same_batch
    assert by_hand.same_batch is None


# the command


def test_the_command_prints_both_jobs_with_bars(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", EP16, "--cluster", CLUSTER_PATH, "--compare", TP8_PP2]
    assert main([*words, "--verbose"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "61 % of the peak",
        "to spare",
        "tokens per second",
        "bounded by",
        "nothing was measured",
        "With 1,024 in both",
        "All of its figures: the command audit.",
    ):
        assert expected in printed
    assert "the specification's figures" not in printed and "139 times the peak" not in printed


def test_the_command_prints_json_that_agrees_with_the_plan(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER_PATH, "--micro-batch", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plan = make_plan(EP16, cluster, micro_batch=2)
    assert printed["measures"]["tps_tokens_per_s"] == [
        plan.prediction.tps.value,
        plan.prediction.tps.low,
        plan.prediction.tps.high,
    ]
    assert printed["training"]["micro_batch"] == 2
    assert printed["fit"]["largest_micro_batch"] == plan.fit.largest
    assert "figures" not in printed, "of the reference job: those are the audit's"
    assert [bound["resource"] for bound in printed["bounds"]] == [bound.title for bound in plan.bounds]
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER_PATH, "--compare", TP8_PP2, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["tps_ratio"][0] == pytest.approx(
        both["plan"]["measures"]["tps_tokens_per_s"][0] / both["compared"]["measures"]["tps_tokens_per_s"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batch", "64"], "GB too many"),
        (["--micro-batch", "3"], "micro_batch=3"),
        (["--nodes", "0"], "--nodes=0: give a whole number of 1 or more"),
        (["--load", "uneven"], "load='uneven'"),
        (["--compare", "no_such.json"], "no_such.json"),
        (["--out", "no_such_folder/x.jsonl"], "there is no folder no_such_folder"),
    ],
)
def test_the_command_exits_with_2_and_a_reason(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER_PATH, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--trace"])
def test_a_folder_is_no_file_to_write(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER_PATH, option, "."]) == 2
    assert "give the name of a file" in capsys.readouterr().err
