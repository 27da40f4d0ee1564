"""Verdicts on a ds_config, for machines that the tests do not run on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.doctor.facts import Facts, Gpu
from ds_moe_ep.doctor.job import judge_job
from ds_moe_ep.doctor.verdicts import Verdict, worst
from tests.doctor.machines import CPU, GPUS, named, on_host
from tests.policy.sources import ROOT

CONFIG: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "moe_ep": {"num_experts": 16, "ep_size": 4, "node_size": 4, "model": "small"},
}


def judged(
    folder: Path, facts: Facts, changes: dict[str, Any] | None = None, world: int | None = 4, here: int | None = None
) -> list[Verdict]:
    path = folder / "ds.json"
    path.write_text(json.dumps({**CONFIG, **(changes or {})}), encoding="utf-8")
    return judge_job(str(path), facts, world, here)[0]


@pytest.mark.parametrize("facts", [CPU, GPUS])
def test_a_configuration_that_fits_the_machine_is_well(tmp_path: Path, facts: Facts) -> None:
    assert worst(judged(tmp_path, facts)) in ("ok", "note")


@pytest.mark.parametrize(
    ("changes", "world", "found", "fix"),
    [
        ({"moe_ep": {"epsize": 4}}, 4, "moe_ep.epsize=4: unknown key", "did you mean 'ep_size'?"),
        ({}, 6, "moe_ep.ep_size=4 does not divide the world of 6", "choose an ep_size that divides them"),
        ({"zero_optimization": {"stage": 3}}, 4, "zero_optimization.stage=3", ""),
    ],
)
def test_a_configuration_that_cannot_work_is_a_problem_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], world: int, found: str, fix: str
) -> None:
    (verdict,) = judged(tmp_path, CPU, changes, world)
    assert verdict.status == "problem"
    assert found in verdict.found
    assert fix in verdict.fix


@pytest.mark.parametrize(
    ("facts", "changes", "world", "here", "name", "status", "found"),
    [
        (CPU, {"fp16": {"enabled": True}}, 4, None, "precision", "problem", "refuses"),
        (GPUS, {"fp16": {"enabled": True}}, 4, None, "precision", "ok", "fp16"),
        (GPUS, {}, 16, None, "ranks", "ok", "4 of 16 ranks on this machine, 4 GPUs; 4 such machines"),
        (GPUS, {}, 8, 8, "ranks", "problem", "which has 4 GPUs"),
        (GPUS, {"moe_ep": {**CONFIG["moe_ep"], "node_size": 8}}, 16, None, "ranks", "problem", "which has 4 GPUs"),
        (on_host(CPU, cores=2), {}, 4, None, "ranks", "note", "ranks take turns"),
        (on_host(CPU, free_bytes=1 << 24), {}, 4, None, "model's memory", "problem", "are free"),
    ],
)
def test_ranks_precision_and_memory_are_held_against_the_machine(
    tmp_path: Path,
    facts: Facts,
    changes: dict[str, Any],
    world: int,
    here: int | None,
    name: str,
    status: str,
    found: str,
) -> None:
    verdict = named(judged(tmp_path, facts, changes, world, here), name)
    assert verdict.status == status
    assert found in verdict.found


def test_the_specifications_run_fits_four_nodes_of_four_gpus_and_not_smaller_ones() -> None:
    path = str(ROOT / "ds_configs" / "ep16.json")
    verdicts, job = judge_job(path, GPUS, None, None)
    assert worst(verdicts) in ("ok", "note")
    assert job is not None
    assert (job.world_size, job.ranks_here, job.num_nodes, job.depth) == (16, 4, 4, 1)
    small = replace(GPUS, torch=replace(GPUS.torch, devices=(Gpu("A10", 24_000_000_000, (8, 6)),) * 4))
    verdicts, job = judge_job(path, small, None, None)
    assert job is None
    assert named(verdicts, "ds_config").found.startswith("gpu_gb=24: a GPU needs")


def test_the_baselines_configuration_is_judged_too() -> None:
    verdicts, job = judge_job(str(ROOT / "ds_configs" / "tp8_pp2_cpu.json"), CPU, None, None)
    assert worst(verdicts) in ("ok", "note")
    assert job is not None
    assert job.world_size == job.ep_size == 16
