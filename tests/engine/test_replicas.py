"""Training with copies of hot experts is the training without them, through DeepSpeed's engine.

Bounds are those of `test_training.py` and, for layers that DeepSpeed and AutoEP made, of the tests of their hooks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_moe_ep.schedule.copies.forecast import LoadAverage
from ds_moe_ep.schedule.placement import Placement
from tests.engine.extensions.test_nonfinite import make_scaled_engine
from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob
from tests.engine.layouts.tensor_models import mpu_of
from tests.engine.small_model import (
    NUM_EXPERTS,
    Job,
    batches,
    distance,
    make_engine,
    merged,
    named_weights,
    reference_job,
    train_steps,
)
from tests.engine.test_training import LOSS, WEIGHTS, Outcome, loss_distance
from tests.moe.replica_cases import let_rows_count_alone
from tests.ranks import RankPool


def copies_in_use(layers: Any) -> int:
    """Copies that the layers have now."""
    slots = [layer.dispatcher.replicas for layer in layers if hasattr(layer, "dispatcher")]
    return sum(len(each.placement.copies) for each in slots if each is not None)


def train(job: Job, hooks: bool = False) -> tuple[Outcome, list[int]]:
    """Losses and last weights of a job on this rank, and the copies in use after each step."""
    from ds_moe_ep import attach_overlap

    engine, used, losses = make_engine(job), [], []
    knobs = {"schedule": job.schedule, "replicas": job.replicas}
    layers = attach_overlap(engine, knobs).layers.values() if hooks else engine.module.layers
    if job.top_k == NUM_EXPERTS:  # every expert gets every token: none is hot
        for layer in layers if job.replicas else ():
            pin(layer)
    let_rows_count_alone(engine.module)
    for step in batches(job):
        losses += train_steps(engine, job, [step])
        used.append(copies_in_use(layers))
    return (losses, named_weights(engine.module, job)), used


def pin(layer: Any) -> None:
    """Lets each rank have the first expert of the rank before it, whatever the load."""
    replicas = layer.dispatcher.replicas
    size, local = replicas.link.size, replicas.num_local
    placement = Placement(size, local, 1, tuple(((rank - 1) % size * local,) for rank in range(size)))
    replicas.choose = replicas.choose_anew = lambda rows_E, before: placement


class Restless(LoadAverage):
    """Loads that are others in each pass."""

    has_changed = property(lambda self: bool(self._last), lambda self, value: None)  # type: ignore[assignment]


def train_moving(jobs: Sequence[Job]) -> list[tuple[Outcome, int]]:
    """Losses and last weights of jobs whose copies move in each window and within it; how often they were sent."""
    found = []
    for job in jobs:
        engine = make_engine(job)
        for layer in engine.module.layers:
            pin(layer)
            replicas = layer.dispatcher.replicas
            first, local = replicas.choose([], replicas.placement), replicas.num_local
            back = Placement(
                first.ranks, local, 1, tuple(((rank + 1) % first.ranks * local,) for rank in range(first.ranks))
            )
            replicas.choose = lambda rows_E, before, ways=(first, back): ways[before == ways[0]]
            replicas.choose_anew = lambda rows_E, before: before
            replicas.loads = Restless(job.num_experts)
        losses = train_steps(engine, job, batches(job))
        found.append(((losses, named_weights(engine.module, job)), replicas._renewals))
    return found


def test_copies_that_move_within_windows_train_as_one_process_does(pool: RankPool) -> None:
    jobs = [
        Job(stage=2, ep_size=4, accumulation=3, steps=2, replicas=1),
        Job(stage=1, ep_size=4, accumulation=3, steps=1, recomputed=True, replicas=1),
    ]
    by_rank = pool.run(4, train_moving, jobs, timeout_s=120)
    for index, job in enumerate(jobs):
        found = by_rank[0][index][0][0], merged([results[index][0][1] for results in by_rank])
        assert by_rank[0][index][1] == 2 * job.steps + 1, "at the start of each window, and within it"
        expected = reference_job(job)
        assert distance(found[1], expected[1]) <= WEIGHTS
        assert loss_distance(found, expected) <= LOSS


def train_all(jobs: Sequence[tuple[Job, bool]]) -> list[tuple[Outcome, list[int]]]:
    return [train(job, hooks) for job, hooks in jobs]


def outcomes(pool: RankPool, jobs: Sequence[tuple[Job, bool]]) -> list[Outcome]:
    """Losses and the world's weights of each job; copies were in use where it has slots."""
    by_rank = pool.run(jobs[0][0].world_size, train_all, jobs, timeout_s=280)
    for index, (job, _) in enumerate(jobs):
        assert (max(by_rank[0][index][1]) > 0) == bool(job.replicas), job
    return [(by_rank[0][i][0][0], merged([results[i][0][1] for results in by_rank])) for i in range(len(jobs))]


# ZeRO 0, 1, 2; EP = world, EP < world and either order of groups; accumulation; capacity; k > 1; recomputation.
IN_FP32 = {
    "consecutive": [
        Job(stage=0, ep_size=4, accumulation=2, replicas=1),
        Job(stage=1, ep_size=4, accumulation=2, top_k=1, replicas=2),
        Job(stage=2, ep_size=4, accumulation=3, capacity_factor=0.75, recomputed=True, replicas=1),
    ],
    "interleaved": [Job(stage=2, ep_size=2, accumulation=2, top_k=3, interleaved=True, recomputed=True, replicas=1)],
}
MORE_IN_FP32 = {
    "plain engine": [Job(stage=0, ep_size=2, accumulation=3, top_k=1, replicas=1, door="deepspeed")],
    "capacity": [Job(stage=1, ep_size=2, accumulation=2, capacity_factor=1.0, interleaved=True, replicas=1)],
}


@pytest.mark.parametrize("name", [*IN_FP32, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_IN_FP32)])
def test_training_in_fp32_equals_single_process_training(pool: RankPool, name: str) -> None:
    """Each order of groups has a call of its own: DeepSpeed keeps one by its size."""
    jobs = (IN_FP32 | MORE_IN_FP32)[name]
    for job, found in zip(jobs, outcomes(pool, [(job, False) for job in jobs]), strict=True):
        expected = reference_job(job)
        assert distance(found[1], expected[1]) <= WEIGHTS, job
        assert loss_distance(found, expected) <= LOSS, job


CLIPPED_OR_BF16 = [
    Job(stage=2, clipping=0.05, ep_size=4, accumulation=2, replicas=1),
    Job(stage=1, bf16=True, top_k=NUM_EXPERTS, accumulation=2, replicas=1),
]
MORE_CLIPPED_OR_BF16 = [
    Job(stage=0, clipping=0.05, ep_size=2, replicas=1),
    Job(stage=2, bf16=True, top_k=NUM_EXPERTS, ep_size=2, replicas=1),
]


@pytest.mark.parametrize("jobs", [CLIPPED_OR_BF16, pytest.param(MORE_CLIPPED_OR_BF16, marks=pytest.mark.slow)])
def test_clipping_and_bf16_train_as_without_copies(pool: RankPool, jobs: list[Job]) -> None:
    """bf16: as close to float64 as without copies, as `test_training.py` has it beside DeepSpeed's own layer.

    All experts are chosen there, lest rounding turns a choice over.
    """
    found = outcomes(pool, [(each, False) for job in jobs for each in (job, replace(job, replicas=0))])
    for job, mine, plain in zip(jobs, found[::2], found[1::2], strict=True):
        expected = reference_job(job) if job.bf16 else plain
        factor, rounding = (1.5, 2**-9) if job.bf16 else (0.0, 0.0)
        allowed = factor * distance(plain[1], expected[1]) + rounding or 2 * WEIGHTS
        assert distance(mine[1], expected[1]) <= allowed, job
        assert loss_distance(mine, expected) <= (factor * loss_distance(plain, expected) + rounding or 2 * LOSS), job


def test_deepspeeds_own_layers_train_alike_with_copies_of_their_experts(pool: RankPool) -> None:
    jobs = [
        Job(layer="native", stage=1, ep_size=2, accumulation=2, replicas=1),
        Job(layer="native", stage=2, ep_size=4, capacity_factor=1.0, replicas=1),
    ]
    found = outcomes(pool, [each for job in jobs for each in ((job, True), (replace(job, replicas=0), False))])
    for job, mine, plain in zip(jobs, found[::2], found[1::2], strict=True):
        assert distance(mine[1], plain[1]) <= 1e-5, job
        assert mine[0] == pytest.approx(plain[0], rel=2e-6), job


def train_autoep(jobs: Sequence[AutoEPJob], knobs: dict[str, Any]) -> list[Any]:
    """Losses and last weights of each job with hooks and copies, and of each without; and the copies in use."""
    from ds_moe_ep import attach_overlap

    found: list[Any] = []
    for job in jobs:
        handles: list[Any] = []
        attach = functools.partial(_attach, handles, attach_overlap, knobs)
        mine = autoep_models.run_job(job, attach)
        found.append((mine, autoep_models.run_job(job), copies_in_use(handles[0].layers.values())))
    return found


def _attach(handles: list[Any], attach_overlap: Any, knobs: dict[str, Any], engine: Any) -> None:
    handles.append(attach_overlap(engine, knobs))


OF_AUTOEP = [
    AutoEPJob(stage=1, ep_size=4, accumulation=2),
    AutoEPJob(stage=2, ep_size=2, preset="qwen3_moe", checkpointing="non-reentrant"),
]
MORE_OF_AUTOEP = [AutoEPJob(stage=0, ep_size=4, checkpointing="reentrant", score_apply="pre")]


@pytest.mark.parametrize("jobs", [OF_AUTOEP, pytest.param(MORE_OF_AUTOEP, marks=pytest.mark.slow)])
def test_autoeps_layers_train_alike_with_copies_of_their_experts(pool: RankPool, jobs: list[AutoEPJob]) -> None:
    by_rank = pool.run(4, train_autoep, jobs, {"schedule": "peers", "replicas": 1}, timeout_s=280)
    for index, job in enumerate(jobs):
        assert by_rank[0][index][2] > 0, job
        (losses, _), (expected, _) = by_rank[0][index][:2]
        mine, plain = (merged([results[index][side][1] for results in by_rank]) for side in (0, 1))
        assert distance(mine, plain) <= 1e-5, job
        assert losses == pytest.approx(expected, rel=2e-6), job


def trained_then_evaluated(job: Job) -> tuple[bool, bool]:
    """Whether evaluation between steps changes nothing, and whether a checkpoint knows nothing of copies."""
    engine = with_rows_alone(job)
    first, *others = batches(job)
    train_steps(engine, job, [first])
    assert copies_in_use(engine.module.layers)
    x, target = first[0]
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        engine.eval()
        losses = [float(engine(x[rank], target[rank])) for _ in range(2)]
    engine.train()
    train_steps(engine, job, others)
    names = [name for name in engine.module.state_dict() if "replica" in name or "cop" in name]
    return losses[0] == losses[1], not names


def test_evaluation_uses_the_copies_and_state_dicts_do_not_have_them(pool: RankPool) -> None:
    assert pool.run(4, trained_then_evaluated, Job(replicas=1, stage=1, steps=3)) == [(True, True)] * 4


def events_of_a_window(job: Job) -> list[str]:
    """What the layers do about copies from one step to the next, in order."""
    from ds_moe_ep.moe.replicas import compare, copies, gradients, replicas

    log: list[str] = []

    def logged(owner: Any, name: str, layer_of: Any) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            log.append(f"{name} {layer_of(args)}")
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    engine = make_engine(job)
    for layer in engine.module.layers:
        pin(layer)
    before, window = batches(job)
    train_steps(engine, job, [before])
    logged(gradients.Loan, "take", lambda args: args[0]._layer)
    logged(gradients.Loan, "collect", lambda args: args[0]._layer)
    logged(replicas.Replicas, "begin", lambda args: args[2].call.layer)
    logged(copies.Copies, "start", lambda args: args[3].layer)
    logged(gradients, "Returning", lambda args: args[5].layer)
    logged(compare, "keys_of_all", lambda args: "at once")
    train_steps(engine, job, [window])
    return log


def test_weights_start_behind_the_step_and_sums_go_home_once_per_window_under_a_layers_backward_pass(
    pool: RankPool,
) -> None:
    one, two = "layers.0", "layers.1"
    first = [f"begin {one}", f"begin {two}", *(f"{do} {at}" for at in (two, one) for do in ("take", "collect"))]
    last = [f"begin {one}", f"begin {two}", f"take {two}", f"Returning {two}", f"take {one}", f"Returning {one}"]
    last += [f"collect {two}", f"collect {one}", "keys_of_all at once", f"start {one}", f"start {two}"]
    for log in pool.run(4, events_of_a_window, Job(replicas=1, accumulation=2, steps=2)):
        assert log == [*first, *last]


def with_rows_alone(job: Job) -> Any:
    engine = make_engine(job)
    let_rows_count_alone(engine.module)
    return engine


def resumed(folder: str, saves_with: int) -> tuple[list[Outcome], list[int]]:
    """Two steps, a checkpoint, and one more: in a fresh engine, and again in the first one, which is taken back to it.

    Copies are in use before the checkpoint or in the fresh engine, not in both; their numbers are told as well.
    """
    job = Job(stage=1, accumulation=2, replicas=saves_with)
    steps = batches(job)
    first = with_rows_alone(job)
    train_steps(first, job, steps[:2])
    used = [copies_in_use(first.module.layers)]
    first.save_checkpoint(folder)
    train_steps(first, job, steps[2:])
    first.load_checkpoint(folder)
    again = train_steps(first, job, steps[2:]), named_weights(first.module, job)
    job = replace(job, replicas=1 - saves_with, seed=9)
    second = with_rows_alone(job)
    second.load_checkpoint(folder)
    losses = train_steps(second, job, steps[2:])
    return [(losses, named_weights(second.module, job)), again], [*used, copies_in_use(second.module.layers)]


@pytest.mark.parametrize("saves_with", [1, 0])
def test_a_checkpoint_saved_with_copies_loads_without_and_the_other_way(
    pool: RankPool, saves_with: int, tmp_path: Path
) -> None:
    expected = reference_job(Job(stage=1, accumulation=2))
    by_rank = pool.run(4, resumed, str(tmp_path), saves_with, timeout_s=120)
    assert [number > 0 for number in by_rank[0][1]] == [bool(saves_with), not saves_with], "copies are in use"
    for index in range(2):
        assert distance(merged([found[index][1] for found, _ in by_rank]), expected[1]) <= WEIGHTS
        assert loss_distance((by_rank[0][0][index][0], {}), (expected[0][2:], {})) <= LOSS


def under_an_mpu(job: Job) -> list[tuple[Outcome, int]]:
    """The job without an mpu, and with Megatron's, whose data-parallel world is all ranks; copies in use at the end."""
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    found = []
    for arguments in ({}, {"mpu": mpu_of(1, "tensor_model_parallel")}):
        engine = make_engine(job, **arguments)
        let_rows_count_alone(engine.module)
        losses = train_steps(engine, job, batches(job))
        found.append(((losses, named_weights(engine.module, job)), copies_in_use(engine.module.layers)))
        forget_groups()
    return found


def test_megatrons_data_parallel_world_gives_the_same_bits_with_copies(pool: RankPool) -> None:
    for (plain, _), (mine, copies) in pool.run(4, under_an_mpu, Job(ep_size=2, accumulation=2, steps=2, replicas=1)):
        assert copies
        assert mine[0] == plain[0]
        assert all(torch.equal(weight, mine[1][name]) for name, weight in plain[1].items())


def overflowed(job: Job) -> tuple[list[tuple[bool, float, int, int]], dict[str, Any]]:
    """Three fp16 steps, the second with an infinite loss on one rank: what was done, and the last weights.

    Of each step: applied, loss scale, number of the window behind it, copies in use.
    """
    engine = make_scaled_engine(job, "fp16", math.inf, {1: "loss"})
    layers, rank, steps = engine.module.model.layers, torch.distributed.get_rank(), []
    for layer in layers if job.replicas else ():
        pin(layer)
    for engine.module.step, micro_batches in enumerate(batches(job)):
        for x, target in micro_batches:
            engine.backward(engine(x[rank].half(), target[rank].half()))
            engine.step()
        replicas = layers[0].dispatcher.replicas
        number = replicas.window.number if replicas else 0
        steps.append((engine.was_step_applied(), float(engine.optimizer.loss_scale), number, copies_in_use(layers)))
    return steps, named_weights(engine.module.model, job)


def overflowed_jobs(jobs: Sequence[Job]) -> list[tuple[list[tuple[bool, float, int, int]], dict[str, Any]]]:
    return [overflowed(job) for job in jobs]


def test_fp16_skips_a_step_that_overflows_and_goes_on_in_the_same_window_of_copies(pool: RankPool) -> None:
    """All experts are chosen, lest rounding turns a choice over. Bound: two roundings of a weight, 2^-11 each."""
    jobs = [
        Job(stage=2, ep_size=2, top_k=NUM_EXPERTS, accumulation=2, steps=3, replicas=replicas) for replicas in (1, 0)
    ]
    by_rank = pool.run(4, overflowed_jobs, jobs, timeout_s=120)
    for (steps, _), (plain, _) in by_rank:
        assert [step[:2] for step in steps] == [step[:2] for step in plain]
        assert [step[0] for step in steps] == [True, False, True]
        assert [step[2] for step in steps] == [1, 1, 2]
        assert len({step[3] for step in steps}) == 1 and steps[0][3] > 0
    mine, plain_weights = (merged([results[i][1] for results in by_rank]) for i in (0, 1))
    assert distance(mine, plain_weights) <= 2**-10
