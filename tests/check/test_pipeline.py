"""check-config of a layout: what it tells, what it refuses with which way out, and its notes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.check.config import Budget, check_config
from ds_moe_ep.check.pipeline import PipelineCheck
from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError, TopologyError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
LAYOUT = {"tp_size": 8, "pp_size": 2}


def small(**changes: Any) -> dict[str, Any]:
    """The small model in TP8/PP2 on 16 ranks, in micro-batches of 8 sequences."""
    return {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "moe_ep": {"layout": LAYOUT, "model": "small"},
        **changes,
    }


def big(**changes: Any) -> dict[str, Any]:
    """The specification's model in TP8/PP2, in fp16 under ZeRO-1: 16 sequences per micro-batch are too many."""
    return small(train_batch_size=64, train_micro_batch_size_per_gpu=16, fp16={"enabled": True}) | {
        "moe_ep": {"layout": LAYOUT, "model": "specification"},
        **changes,
    }


def details_of(ds_config: dict[str, Any] | Path, world_size: int | None = None) -> PipelineCheck:
    details = check_config(ds_config, world_size).details
    assert isinstance(details, PipelineCheck)
    return details


def test_tp8_pp2_fits_80_gb_and_keeps_the_issues_four_micro_batches() -> None:
    check = check_config(CONFIGS / "tp8_pp2.json", 16)
    details = details_of(CONFIGS / "tp8_pp2.json")
    assert (check.training.micro_batch, check.training.accumulation, check.training.num_copies) == (8, 4, 1)
    assert details.memory.peak <= Budget().free_bytes
    # By hand: 20.25 tensors of 80,000 tokens are 26.5 GB; 16 bytes each of 2.217 G parameters; 1 GB of bucket.
    assert details.memory.activations == pytest.approx(20.25 * 80_000 * 8192 * 2, rel=2e-3)
    assert details.memory.peak == pytest.approx(63.0e9, rel=1e-3)


def test_the_micro_batch_of_tp8_pp2_is_the_largest_that_fits_and_cuts_messages_equally() -> None:
    largest = details_of(CONFIGS / "tp8_pp2.json").largest_micro_batch
    micro_batch = json.loads((CONFIGS / "tp8_pp2.json").read_text())["train_micro_batch_size_per_gpu"]
    assert micro_batch == largest // 8 * 8


def test_the_world_is_one_copy_or_as_many_as_the_batch_implies() -> None:
    assert check_config(small()).training.world_size == 16
    two = check_config(small(train_batch_size=64, gradient_accumulation_steps=4)).training
    assert (two.world_size, two.num_copies, two.batch) == (32, 2, 64)
    assert check_config(small(), 64).training.accumulation == 1  # 4 copies share the batch


@pytest.mark.parametrize(
    ("changes", "world_size", "error", "message"),
    [
        ({}, 24, TopologyError, r"moe_ep.layout=8x2: the world of 24 ranks is no multiple of 16; start 16 processes"),
        ({}, 8, TopologyError, r"moe_ep.layout=8x2: the world of 8 ranks"),
        ({}, 0, TopologyError, r"moe_ep.layout=8x2: the world of 0 ranks"),
        ({"train_batch_size": 36}, 16, ConfigError, r"train_batch_size=36: must be .* \* copies = 8 \* 4 \* 1 = 32"),
        ({"zero_optimization": {"stage": 2}}, 16, ConfigError, r"stage=2 with moe_ep.layout=8x2: .*use stage 1"),
        ({"zero_optimization": {"stage": 3}}, 16, ConfigError, r"stage=3 with moe_ep.layout=8x2: .*use stage 1"),
        ({"managed_gradient_accumulation": False}, 16, ConfigError, r"managed_gradient_accumulation=false with"),
        ({"moe_ep": {"layout": {"tp_size": 3}, "model": "small"}}, 3, ConfigError, r"layout.tp_size=3 does not divide"),
        ({"moe_ep": {"layout": {"pp_size": 3}, "model": "small"}}, 3, ConfigError, r"layout.pp_size=3 does not divide"),
        (
            {"moe_ep": {"layout": {"tpsize": 2}, "model": "small"}},
            2,
            ConfigError,
            r"tpsize=2: .*did you mean 'tp_size'",
        ),
    ],
)
def test_a_layout_that_cannot_work_is_refused_by_path(
    changes: dict[str, Any], world_size: int, error: type[Exception], message: str
) -> None:
    check_config(small(), 16)  # the control
    with pytest.raises(error, match=message):
        check_config(small(**changes), world_size)


def with_model(layout: dict[str, int], **knobs: Any) -> dict[str, Any]:
    return {"layout": layout, "model": {"name": "specification", **knobs}}


@pytest.mark.parametrize(
    ("ds_config", "world_size", "gpu_gb", "fix"),
    [
        (big(), 16, 80, "train_micro_batch_size_per_gpu=8 with gradient_accumulation_steps=8 fits"),
        (big(moe_ep=with_model(LAYOUT, recompute=False)), 16, 40, "set moe_ep.model.recompute to true"),
        (big(zero_optimization={}), 32, 40, "set zero_optimization.stage to 1"),
        (big(), 16, 36, "raise moe_ep.layout.pp_size from 2"),
        (big(moe_ep=with_model({"tp_size": 4, "pp_size": 4})), 16, 36, "raise moe_ep.layout.tp_size from 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(
    ds_config: dict[str, Any], world_size: int, gpu_gb: float, fix: str
) -> None:
    with pytest.raises(ConfigError, match=rf"gpu_gb={gpu_gb}: a GPU needs .*{fix}"):
        check_config(ds_config, world_size, Budget(gpu_gb=gpu_gb))


def test_the_way_out_that_is_offered_fits() -> None:
    check_config(big(train_micro_batch_size_per_gpu=8), 16)


@pytest.mark.parametrize(
    ("changes", "world_size", "note"),
    [
        ({}, 16, "one copy of the model"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, 32, "overlap_comm=true: DeepSpeed's pipeline"),
        (
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 16},
            32,
            "gradient_accumulation_steps=1 for 2 stages: a stage waits 50 % of a step",
        ),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 12}, 32, "use a multiple of 8"),
    ],
)
def test_what_is_legal_but_worth_knowing_is_a_note(changes: dict[str, Any], world_size: int, note: str) -> None:
    assert any(note in line for line in check_config(small(**changes), world_size).notes)
    assert not any(note in line for line in check_config(small(), 32).notes)  # the control


def test_the_specifications_four_micro_batches_of_256_are_told_to_be_impossible_with_their_bytes() -> None:
    notes = check_config(CONFIGS / "tp8_pp2.json").notes
    # By hand: 20.25 tensors of 2,560,000 tokens are 849 GB, the router 0.5; 35.5 and 1 GB stand beside them.
    expected = (
        "the specification's batch of 1,024 sequences in 4 micro-batches (256 sequences each) cannot fit: it would "
        "take 886 GB on a GPU, 850 of them activations; in micro-batches of 8 it takes 128 of them, with a bubble of "
        "0.8 %"
    )
    assert expected in notes
    assert not any("1,024" in line for line in check_config(CONFIGS / "tp8_pp2_cpu.json").notes)


def test_knobs_of_traffic_between_experts_are_not_noted_where_there_is_none() -> None:
    notes = check_config(small(moe_ep={"layout": LAYOUT, "model": "small", "schedule": "serial"}), 32).notes
    assert not any("every transfer blocks" in line or "expert groups" in line for line in notes)


def test_a_layout_without_a_model_checks_the_job_alone() -> None:
    check = check_config(small(moe_ep={"layout": LAYOUT}), 16)
    assert (check.details, check.training.num_copies) == (None, 1)


def test_the_tables_tell_the_stage_its_bytes_and_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", str(CONFIGS / "tp8_pp2.json"), "--verbose"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "16 = 1 copy x 2 stages x 8 tensor ranks",
        "16 per layer, 1/8 of each on a rank of the layer's stage",
        "1F1B of 4 micro-batches, bubble 20.0 %",
        "32 sequences = 8 x 4 micro-batches x 1 copy",
        "one rank of stage 0",
        "4.43 GB",
        "11 sequences",
        "110.10 GB",
        "163.84 MB",
        "TP8/PP2",
    ):
        assert expected in printed
    assert "dispatch" not in printed


def test_json_agrees_with_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "tp8_pp2_cpu.json")
    assert main(["check-config", path, "--world-size", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(check_config(path, 16).to_dict()))
    assert (printed["training"]["layout"], printed["training"]["batch"]) == (LAYOUT, 64)
    assert printed["details"]["stage"]["memory"]["peak"] > printed["details"]["stage"]["memory"]["persistent"]
    assert printed["details"]["work"]["bubble"] == 0.2


def test_expert_parallelism_is_told_as_before_without_a_layout() -> None:
    for moe_ep in ({"ep_size": 4, "model": "small"}, {"ep_size": 4, "model": "small", "layout": {}}):
        told = check_config(
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "moe_ep": moe_ep}, 8
        ).to_dict()
        assert "layout" not in told["training"]
        assert told["details"].keys() >= {"rank_parameters", "dispatch_bytes", "load_that_fits"}
