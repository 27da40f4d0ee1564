"""Training through DeepSpeed's engine equals training in one process, and training with DeepSpeed's own layer.

The reference is float64 loops on the concatenated batch with torch's Adam. Adam's eps is 1e-2, larger than most
gradients here: a step is then nearly proportional to the gradient, so that a gradient of the wrong scale cannot hide,
and rounding is not blown up to whole steps. fp32 bounds: 5e-6 of a tensor's largest weight after 3 steps (after 4:
5e-7, for DeepSpeed's layer too), 1e-6 of the loss.

DeepSpeed sums expert gradients over the ranks that hold the expert and divides by the whole data-parallel world: the
gradient of the global batch's mean for every ep_size. That is the reference's; ep_size 2 and 4 are compared with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.small_model import (
    NUM_EXPERTS,
    Job,
    batches,
    distance,
    make_engine,
    merged,
    named_weights,
    reference_job,
    run_jobs,
    train_steps,
)
from tests.ranks import RankPool

WEIGHTS, LOSS = 5e-6, 1e-6
Outcome = tuple[list[float], dict[str, Tensor]]


def outcomes(pool: RankPool, jobs: Sequence[Job]) -> list[Outcome]:
    """Losses and the world's weights of each job."""
    by_rank = pool.run(jobs[0].world_size, run_jobs, jobs, timeout_s=280)
    return [(by_rank[0][i][0], merged([results[i][1] for results in by_rank])) for i in range(len(jobs))]


def loss_distance(found: Outcome, expected: Outcome) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found[0], expected[0], strict=True))


# ZeRO 0, 1, 2; EP = world and EP < world; accumulation; dropless and capacity.
IN_FP32 = [
    Job(stage=stage, ep_size=ep_size, accumulation=accumulation, top_k=top_k, capacity_factor=factor)
    for stage in (0, 1, 2)
    for ep_size, accumulation, top_k, factor in ((4, 1, 2, None), (2, 2, 1, None), (2, 1, 2, 1.0), (1, 2, 3, None))
]
IN_FP32[4], IN_FP32[8] = replace(IN_FP32[4], two_level="copies"), replace(IN_FP32[8], two_level="sums")
FEW_IN_FP32 = [IN_FP32[0], *IN_FP32[4:6], IN_FP32[7], *IN_FP32[8:12:2]]  # each stage, and every setting
IN_BF16 = [
    Job(stage=stage, bf16=True, top_k=NUM_EXPERTS, ep_size=ep_size, accumulation=accumulation)
    for stage in (0, 1, 2)
    for ep_size, accumulation in ((4, 1), (2, 2))
]
FEW_IN_BF16 = [IN_BF16[0], IN_BF16[3], IN_BF16[4]]
CLIPPED = [Job(stage=stage, clipping=0.05, ep_size=2) for stage in (1, 2)]
BIT_EQUAL = Job(stage=1, ep_size=2, steps=3, bit_equal=True)
ALIKE = [replace(BIT_EQUAL, door="deepspeed"), *(replace(BIT_EQUAL, schedule=name) for name in ("serial", "chunks"))]


def with_deepspeeds_layer(job: Job) -> Job:
    return replace(job, layer="native")


def unclipped(job: Job) -> Job:
    return replace(job, clipping=0.0)


def results_of(pool: RankPool, jobs: Sequence[Job]) -> dict[Job, Outcome]:
    return dict(zip(jobs, outcomes(pool, jobs), strict=True))


@functools.cache
def reference_of(alike: Job) -> Outcome:
    return reference_job(alike)


def reference(job: Job) -> Outcome:
    """The same for every stage of ZeRO, in float64."""
    return reference_of(replace(job, stage=0, bf16=False, two_level="off"))


@pytest.mark.parametrize("jobs", [FEW_IN_FP32, pytest.param(IN_FP32, marks=pytest.mark.slow)], ids=["few", "all"])
def test_training_in_fp32_equals_single_process_training_and_deepspeeds_layer(pool: RankPool, jobs: list[Job]) -> None:
    natives = [with_deepspeeds_layer(job) for job in IN_FP32[::5]]  # each stage, and all that its layer does
    results = results_of(pool, [*jobs, *natives])
    for job in jobs:
        ours, expected = results[job], reference(job)
        assert distance(ours[1], expected[1]) <= WEIGHTS, job
        assert loss_distance(ours, expected) <= LOSS, job
        if native := results.get(with_deepspeeds_layer(job)):
            assert distance(ours[1], native[1]) <= 2 * WEIGHTS, job
            assert loss_distance(ours, native) <= 2 * LOSS, job


@pytest.mark.parametrize("jobs", [FEW_IN_BF16, pytest.param(IN_BF16, marks=pytest.mark.slow)], ids=["few", "all"])
def test_training_in_bf16_is_as_close_to_float64_as_with_deepspeeds_layer(pool: RankPool, jobs: list[Job]) -> None:
    """All experts are chosen: a choice that rounding turns over would be another training.

    ZeRO 1 and 2 keep fp32 master weights: a few bf16 roundings (2^-9 each) remain. Without ZeRO the weights themselves
    are bf16, small steps are lost in them, and DeepSpeed's own layer is the only measure.
    """
    results = results_of(pool, [*jobs, *map(with_deepspeeds_layer, jobs)])
    for job in jobs:
        expected, native = reference(job), results[with_deepspeeds_layer(job)]
        off, theirs = distance(results[job][1], expected[1]), distance(native[1], expected[1])
        assert off <= 1.5 * theirs + 2**-9, job
        assert loss_distance(results[job], expected) <= 1.5 * loss_distance(native, expected) + 2**-9, job
        assert job.stage == 0 or off <= 0.03, job


def test_clipped_training_under_zero_equals_that_with_deepspeeds_layer(pool: RankPool) -> None:
    """Without ZeRO, DeepSpeed's own norm does not count all experts, and ours does (`test_clipping.py`)."""
    results = results_of(pool, [*CLIPPED, *map(with_deepspeeds_layer, CLIPPED), *map(unclipped, CLIPPED)])
    for job in CLIPPED:
        ours, native = results[job], results[with_deepspeeds_layer(job)]
        assert distance(ours[1], native[1]) <= 2 * WEIGHTS, job
        assert loss_distance(ours, native) <= 2 * LOSS, job
        assert distance(ours[1], results[unclipped(job)][1]) > 100 * WEIGHTS, "the limit must be felt"


def test_the_layer_trains_alike_under_plain_deepspeed_initialize_and_every_schedule(pool: RankPool) -> None:
    first, *others = outcomes(pool, [BIT_EQUAL, *ALIKE])
    for found in others:
        assert distance(found[1], first[1]) == 0.0
        assert found[0] == first[0]


def run_disturbed(job: Job, disturb: str) -> Outcome:
    """The job with one small thing wrong on the last rank."""
    engine, steps = make_engine(job), batches(job)
    if dist.get_rank() == job.world_size - 1:
        if disturb == "weight":
            with torch.no_grad():
                engine.module.layers[1].deepspeed_moe.experts.deepspeed_experts[0].fc1.weight[0, 0] += 0.1
        else:
            for x, _ in steps[0]:
                x[-1, 0, 0] += 0.1
    losses = train_steps(engine, job, steps)
    return losses, named_weights(engine.module, job)


def run_all_disturbed(job: Job) -> list[Outcome]:
    return [run_disturbed(job, disturb) for disturb in ("weight", "input")]


def test_one_wrong_number_on_one_rank_is_seen(pool: RankPool) -> None:
    job = Job(stage=0)
    for by_rank in zip(*pool.run(4, run_all_disturbed, job, timeout_s=60), strict=True):
        assert distance(merged([weights for _, weights in by_rank]), reference(job)[1]) > 10 * WEIGHTS


def test_groups_of_interleaved_ranks_train_as_well(pool: RankPool) -> None:
    """DeepSpeed's use_data_before_expert_parallelism: ranks 0 and 2, and 1 and 3, share experts."""
    jobs = [Job(stage=stage, ep_size=2, interleaved=True, steps=3) for stage in (0, 1)]
    expected = reference_job(jobs[0])
    for found in outcomes(pool, jobs):
        assert distance(found[1], expected[1]) <= WEIGHTS
        assert loss_distance(found, expected) <= LOSS


def test_expert_parallelism_over_1_4_and_16_ranks_trains_the_same_curve(pool: RankPool) -> None:
    """16 data-parallel ranks each time. The curves differ by rounding: 1e-6 of the loss, as in the other tests."""
    jobs = [Job(world_size=16, ep_size=ep_size, num_experts=16, stage=1, steps=2) for ep_size in (1, 4, 16)]
    results, expected = outcomes(pool, jobs), reference_job(jobs[0])
    for job, found in zip(jobs, results, strict=True):
        assert loss_distance(found, expected) <= LOSS, job.ep_size
        assert distance(found[1], expected[1]) <= WEIGHTS, job.ep_size
    assert expected[0][-1] < expected[0][0], "it learns"
