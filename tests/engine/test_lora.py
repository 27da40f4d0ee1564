"""LoRA adapters of the peft library on experts: trained as on one device, and as in DeepSpeed's own layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

import ds_moe_ep
from ds_moe_ep import MoE
from tests.engine.lora_models import Adapted, adapt, run_adapted
from tests.engine.small_model import (
    NUM_EXPERTS,
    Job,
    SmallModel,
    batches,
    distance,
    make_layer,
    make_model,
    merged,
    named_weights,
    reference_job,
    train_steps,
)
from tests.ranks import RankPool

OURS = [
    Job(ep_size=ep_size, stage=stage, door=door)
    for ep_size, stage, door in ((2, 0, "ds_moe_ep"), (4, 1, "deepspeed"), (2, 2, "ds_moe_ep"), (4, 2, "deepspeed"))
]
NATIVE = [Job(layer="native", ep_size=2, stage=stage) for stage in (0, 2)]


def test_adapters_on_experts_train_as_on_one_device_and_as_in_deepspeeds_layer(pool: RankPool) -> None:
    by_rank = pool.run(4, run_adapted, [*OURS, *NATIVE], timeout_s=200)
    losses, weights = reference_job(OURS[0], adapt)
    for index, job in enumerate([*OURS, *NATIVE]):
        runs: list[Adapted] = [results[index] for results in by_rank]
        trained = merged([run.weights for run in runs])
        assert distance(trained, weights) < 2e-5, job
        assert torch.allclose(torch.tensor(runs[0].losses), torch.tensor(losses), atol=1e-5), job
        moved = [name for name in trained if "lora_" in name]
        assert len(moved) == 2 * NUM_EXPERTS * 4  # layers, experts, two Linears with A and B each
        for run in runs:
            assert all(torch.equal(run.weights[name], value) for name, value in run.base_before.items()), job
            for name in ("merged", "unmerged", "merged for good"):
                assert torch.allclose(run.outputs[name], run.outputs["adapted"], atol=1e-5), (job, name)
        if job.layer == "ours":
            assert all(run.forms == (False, True) for run in runs)


def test_adapters_without_deepspeeds_marks_would_be_averaged_over_other_experts(pool: RankPool) -> None:
    """The control: DeepSpeed's layer does not mark adapters that came after it was made."""
    job = NATIVE[0]
    runs = [results[0] for results in pool.run(4, run_adapted, [job], False, timeout_s=100)]
    _, weights = reference_job(job, adapt)
    own = {name: weight for name, weight in runs[0].weights.items() if "lora_" in name}
    assert distance(own, {name: weights[name] for name in own}) > 1e-2


DENSE = ("enter.", "leave.", "wg.")  # what trains beside experts that do not
FROZEN = [
    Job(world_size=2, ep_size=2, stage=1, num_experts=4, door="deepspeed"),
    Job(world_size=2, ep_size=2, stage=2, num_experts=4),
    Job(world_size=2, ep_size=2, stage=1, num_experts=4, layer="native"),
]


def without_experts(model: nn.Module) -> nn.Module:
    """The model with frozen experts, as adapters of the attention leave them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in DENSE))
    return model


def train_dense(jobs: Sequence[Job]) -> list[tuple[dict[str, Tensor], dict[str, Tensor], str]]:
    """Weights before and behind a training of all but the experts, and what a group without a trained one is told."""
    found = []
    deepspeed.init_distributed("gloo")
    for job in jobs:
        start = ds_moe_ep.initialize if job.door == "ds_moe_ep" and job.layer == "ours" else deepspeed.initialize
        model = without_experts(make_model(job))
        before = named_weights(model, job)
        with pytest.raises(ds_moe_ep.ConfigError) as error:
            start(model=model, config=job.ds_config, model_parameters=list(model.parameters()))
        model = without_experts(make_model(job))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = start(model=model, config=job.ds_config, model_parameters=trained)[0]
        train_steps(engine, job, batches(job))
        found.append((before, named_weights(engine.module, job), str(error.value)))
    return found


def test_experts_that_nobody_trains_are_no_end_under_zero(pool: RankPool) -> None:
    """The control: the parameters beside them move."""
    by_rank = pool.run(2, train_dense, FROZEN, timeout_s=100)
    for index, job in enumerate(FROZEN):
        before, behind = (merged([results[index][side] for results in by_rank]) for side in (0, 1))
        assert distance(behind, reference_job(job, without_experts)[1]) < 2e-5, job
        assert distance(behind, before) > 1e-2, job
        assert all(torch.equal(behind[name], before[name]) for name in before if "deepspeed_experts" in name), job
        assert "has requires_grad=True" in by_rank[0][index][2]


def test_adapters_that_were_sorted_before_they_had_marks_are_refused_under_zero(pool: RankPool) -> None:
    for answer in pool.run(2, sorted_too_early, timeout_s=100):
        unmarked, marked = answer
        assert unmarked.startswith("ConfigError: optimizer: 8 parameters of experts") and "mark_experts()" in unmarked
        assert marked == "trains"


def sorted_too_early() -> list[str]:
    answers = []
    for calls_mark in (False, True):
        try:
            answers.append(start_with_early_groups(calls_mark))
        except ds_moe_ep.ConfigError as error:
            answers.append(f"ConfigError: {error}")
    return answers


def test_an_optimizer_that_nobody_sorted_is_refused_under_zero_with_the_way_out(pool: RankPool) -> None:
    for doors in pool.run(2, never_sorted, timeout_s=100):
        for without_zero, shared, wrapped in doors:
            assert without_zero == "trains", "the control: each parameter's own marks decide there"
            for told in (shared, wrapped):
                assert "optimizer=AdamW: its groups have experts among dense parameters" in told
                assert 'write an "optimizer" into the ds_config' in told


def never_sorted() -> list[list[str]]:
    """Answers of both doors without ZeRO, with it, and with fp32 gradients beside bf16."""
    wrapped = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return [
        [start_unsorted(start, stage, extra) for stage, extra in ((0, {}), (1, {}), (1, wrapped))]
        for start in (ds_moe_ep.initialize, deepspeed.initialize)
    ]


def start_unsorted(start: Any, stage: int, extra: dict[str, Any]) -> str:
    job = Job(world_size=2, ep_size=2, num_experts=2, stage=stage)
    deepspeed.init_distributed("gloo")
    model = SmallModel(lambda: make_layer(job))
    config = {name: value for name, value in job.ds_config.items() if name != "optimizer"} | extra
    try:
        start(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
    except ds_moe_ep.ConfigError as error:
        return str(error)
    return "trains"


def start_with_early_groups(calls_mark: bool) -> str:
    """ZeRO over groups that were sorted by hand behind get_peft_model, with one expert weight that trains too."""
    job = Job(world_size=2, ep_size=2, num_experts=2, stage=1)
    deepspeed.init_distributed("gloo")
    model = adapt(SmallModel(lambda: make_layer(job)))
    for name, parameter in model.named_parameters():
        if name.endswith("fc2.base_layer.bias"):
            parameter.requires_grad_(True)
    if calls_mark:
        assert sum(len(module.mark_experts()) for module in model.modules() if isinstance(module, MoE)) == 8
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = split_params_into_different_moe_groups_for_optimizer({"params": trained, "name": "all"})
    config = {name: value for name, value in job.ds_config.items() if name != "optimizer"}
    ds_moe_ep.initialize(model=model, config=config, optimizer=torch.optim.Adam(groups))
    return "trains"
