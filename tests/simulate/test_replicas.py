"""Replicas in simulated jobs: what they bring to skewed loads, what their transfers cost, what their slots weigh."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.check.config import check_config
from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.schedule.way_home import rounds_home
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.job import read_job
from ds_moe_ep.simulate.job.replicas import with_load
from ds_moe_ep.simulate.step.ep_step import EpJob, ep_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.sweep.sweep import setup_at

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
EP16 = str(CONFIGS / "ep16.json")
CLUSTER_PATH = str(CONFIGS / "clusters" / "h100_4x4.json")
EXPERT = 2 * 8192 * 32768  # by hand: two matrices
SLOT_BYTES = 4 * (2 + 4) * EXPERT  # 4 layers, fp16 weights and fp32 sums
ONE_BYTES = SLOT_BYTES + (2 + 3 * 4) * EXPERT  # and in a backward pass a gradient, and three sums on their way home


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster(CLUSTER_PATH)


def job(cluster: Cluster, load: str, replicas: Any, accumulation: int = 64) -> Setup:
    """One layer of the reference job under the serial schedule, which needs no choice."""
    setup = read_job(EP16, cluster, replicas=replicas).setup
    setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, num_layers=1))
    training = dataclasses.replace(setup.training, accumulation=accumulation)
    moe = dataclasses.replace(setup.moe, schedule="serial")
    return with_load(dataclasses.replace(setup, moe=moe, training=training), load)


@pytest.mark.parametrize(("load", "without"), [("zipf:1.0", 0.45), ("zipf:0.5", 0.7)])
def test_one_slot_brings_skewed_loads_back_to_nine_tenths_of_even(cluster: Cluster, load: str, without: float) -> None:
    even, skewed, copied = (ep_step(job(cluster, *at)).tps for at in (("even", 0), (load, 0), (load, 1)))
    assert skewed < without * even
    assert copied > 0.9 * even


def test_even_loads_get_no_copies_and_cost_nothing(cluster: Cluster) -> None:
    for replicas in (1, "auto"):
        setup = job(cluster, "even", replicas)
        assert setup.placement is None and setup.loads == ()


def test_transfers_are_paid_once_per_step_whatever_the_window(cluster: Cluster) -> None:
    setups = [job(cluster, "zipf:1.0", 1, accumulation) for accumulation in (16, 64)]
    (short, long) = (EpJob(dataclasses.replace(s, placement=setups[1].placement)) for s in setups)
    micro_us = long.micro_batch().run(long.machine.capacities).makespan_us
    assert short.copies_us(micro_us) == pytest.approx(long.copies_us(micro_us))
    steps = [ep_step(job.setup) for job in (short, long)]
    ends = [step.parts_us["gradients"] for step in steps]
    assert ends[0] == pytest.approx(ends[1])
    assert steps[1].step_us - ends[1] == pytest.approx(4 * (steps[0].step_us - ends[0]))


def test_transfers_that_nothing_hides_take_what_the_busiest_link_needs(cluster: Cluster) -> None:
    """By hand, where computing takes no time and near links are free: the home with most far copies sets the pace."""
    setup = job(cluster, "zipf:1.0", 1)
    device = dataclasses.replace(cluster.device, peak_fp16=math.inf, peak_fp32=math.inf, memory_bandwidth=math.inf)
    near = dataclasses.replace(cluster.near, bandwidth=math.inf, latency_us=0.0, message_us=0.0)
    far = dataclasses.replace(cluster.far, bandwidth=1.0, efficiency=1.0, latency_us=0.0, message_us=0.0, shared_by=1.0)
    slow = EpJob(dataclasses.replace(setup, cluster=dataclasses.replace(cluster, device=device, near=near, far=far)))
    micro_us = slow.micro_batch().run(slow.machine.capacities).makespan_us
    assert setup.placement is not None and slow.copies is not None
    far_copies = [0] * 16
    for expert, rank, _ in setup.placement.copies:
        far_copies[expert] += expert // 4 != rank // 4
    rounds = rounds_home({(expert, rank): 1 for expert, rank, _ in setup.placement.copies}, home=lambda expert: expert)
    far_rounds = sum(any(move.source // 4 != move.target // 4 for move in moves) for moves in rounds)
    least_us = (2 * max(far_copies) + 4 * far_rounds) * EXPERT  # one byte per microsecond, one layer
    assert far_rounds < max(far_copies), "a home takes in fewer sums than it sent copies"
    assert least_us - micro_us <= slow.copies_us(micro_us) <= least_us + micro_us
    assert micro_us < least_us / 5
    none = dataclasses.replace(setup, placement=None)
    assert EpJob(none).copies is None and EpJob(none).copies_us(micro_us) == 0.0


def test_forward_passes_alone_send_nothing(cluster: Cluster) -> None:
    forward = dataclasses.replace(job(cluster, "zipf:1.0", 1), mode="forward")
    assert EpJob(forward).copies is None and forward.placement is not None


def test_slots_weigh_their_weights_and_their_gradient_sums() -> None:
    values = json.loads(Path(EP16).read_text(encoding="utf-8"))
    with_slot = values | {"moe_ep": values["moe_ep"] | {"replicas": 1}}
    without, one = (check_config(config).to_dict()["details"]["memory"] for config in (values, with_slot))
    assert one["replicas"] == ONE_BYTES and without["replicas"] == 0
    assert one["peak"] - without["peak"] == ONE_BYTES
    too_many = values | {"moe_ep": values["moe_ep"] | {"replicas": 4}}
    with pytest.raises(ConfigError, match=r"109.0 GB \(.* replicas 62.3.*lower moe_ep.replicas from 4"):
        check_config(too_many)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"replicas": 1, "ep_size": 1}, "replicas=1 with ep_size=1: every expert is on every rank"),
        ({"replicas": "auto", "ep_size": 2}, "replicas='auto' takes 0 to 4 slots per rank: memory counts one"),
    ],
)
def test_slots_that_nothing_fills_are_noted(section: dict[str, Any], words: str) -> None:
    ds_config = {"train_batch_size": 2, "optimizer": {"type": "Adam"}, "moe_ep": {"model": "small", **section}}
    assert any(note.startswith(words) for note in check_config(ds_config, 2).notes)
    ds_config["moe_ep"]["replicas"] = 0
    assert not any("replicas" in note for note in check_config(ds_config, 2).notes)


def test_a_sweep_places_copies_at_each_size(cluster: Cluster) -> None:
    setup = job(cluster, "even", 1)
    point = setup_at(setup, "constant_per_rank", 8, 1, "zipf:1.0")
    assert point is not None and point.placement is not None and point.placement.ranks == 8
    assert (
        max(point.loads)
        < 1.2
        < max(with_load(dataclasses.replace(point, moe=dataclasses.replace(point.moe, replicas=0)), "zipf:1.0").loads)
    )


def test_plan_says_what_replicas_bring(cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "small.json"
    section = {
        "num_experts": 4,
        "ep_size": 4,
        "schedule": "serial",
        "model": {"num_layers": 1, "sequence_length": 2000},
    }
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 16}
    config.write_text(
        json.dumps({**batch, "fp16": {"enabled": True}, "optimizer": {"type": "Adam"}, "moe_ep": section})
    )
    words = ["plan", "--config", str(config), "--cluster", CLUSTER_PATH, "--nodes", "1", "--load", "zipf:1.0"]
    assert main([*words, "--replicas", "1", "--json"]) == 0
    gain = json.loads(capsys.readouterr().out)["replicas"]
    assert gain["slots"] == 1 and gain["fullest"] < 1.1 and gain["fullest_without"] == pytest.approx(1.92, abs=0.01)
    assert gain["tps_ratio_to_even"][0] > 0.9 and gain["tps_ratio_to_none"][0] > 1.3
    assert main([*words, "--replicas", "1"]) == 0
    assert "times as fast as without them" in capsys.readouterr().out
    assert main([*words, "--replicas", "1", "--compare", str(config)]) == 0
    (told,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" replicas"))
    assert told[-1] == "\u2013", "the other job has none"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replicas"] is None
    assert main([*words, "--replicas", "many"]) == 2
    assert "--replicas=many: give a number of slots, or auto" in capsys.readouterr().err
