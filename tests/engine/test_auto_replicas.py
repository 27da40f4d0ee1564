"""As many slots for copies as pay, through DeepSpeed's engine: the training is the one in float64.

Bounds are those of `test_training.py`; the control forgets the gradients of one home's copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from ds_moe_ep.schedule.placement import MAX_AUTO_SLOTS, CopyCosts, Placement
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.small_model import (
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
from tests.moe.replica_cases import forgetting_copies, let_rows_count_alone, slots_of
from tests.ranks import RankPool

BY_ROWS = Job(stage=1, accumulation=2, steps=2, replicas="auto")
MEASURED = Job(stage=2, accumulation=2, steps=2, replicas="auto", schedule="auto")
HOOKED = Job(stage=2, ep_size=4, accumulation=2, steps=2, layer="native", replicas="auto")
CHANGING = Job(stage=0, accumulation=2, steps=3, replicas="auto")


class Ran(NamedTuple):
    """A job's outcome, and of each step and layer the slots in use and the copies; the last costs."""

    outcome: Outcome
    used: list[list[tuple[int, int]]]
    costs: list[CopyCosts | None]


def ran(job: Job) -> Ran:
    engine = make_engine(job)
    if job.layer == "native":
        with hooked(engine, schedule=job.schedule, replicas=job.replicas):
            return stepped(engine, job)
    return stepped(engine, job)


def stepped(engine: Any, job: Job) -> Ran:
    layers = list(slots_of(engine.module))
    if job.schedule != "auto":
        let_rows_count_alone(engine.module)
    if job == CHANGING:
        for replicas in layers:
            replicas.choose, replicas.choose_anew = in_turn, lambda rows_E, before: before
    losses, used = [], []
    for step in batches(job):
        losses += train_steps(engine, job, [step])
        used.append([(each.placement.slots, len(each.placement.copies)) for each in layers])
    return Ran((losses, named_weights(engine.module, job)), used, [each.costs for each in layers])


def in_turn(rows_E: Sequence[float], before: Placement) -> Placement:
    """One slot per rank, then two, then none."""
    slots = {0: 1, 1: 2, 2: 0}[before.slots]
    ranks, local = before.ranks, before.local_experts
    guests = tuple(tuple((rank - 1 - i) % ranks * local for i in range(slots)) for rank in range(ranks))
    return Placement(ranks, local, slots, guests)


def all_of(jobs: Sequence[Job]) -> list[Ran]:
    found = [ran(job) for job in jobs]
    with forgetting_copies(is_here=dist.get_rank() == 0):
        return [*found, ran(BY_ROWS)]


def test_auto_slots_train_through_an_engine_as_one_process_does(pool: RankPool) -> None:
    jobs = [BY_ROWS, MEASURED, HOOKED, CHANGING]
    by_rank = pool.run(4, all_of, jobs, timeout_s=200)
    for index, job in enumerate(jobs):
        its = [results[index] for results in by_rank]
        assert all(each[1:] == its[0][1:] for each in its), "all ranks place alike, by the same costs"
        found, expected = (its[0].outcome[0], merged([each.outcome[1] for each in its])), reference_job(job)
        assert distance(found[1], expected[1]) <= WEIGHTS, job
        assert loss_distance(found, expected) <= LOSS, job
    by_rows, measured, hooks, changing = by_rank[0][: len(jobs)]
    assert {slots for used in by_rows.used for slots, _ in used} == {1, 2}, "one layer takes two slots, one takes one"
    assert all(slots <= MAX_AUTO_SLOTS and copies for used in hooks.used for slots, copies in used)
    assert all(costs is not None and costs.row_us not in (0.0, 1.0) for costs in measured.costs), "not by sizes"
    assert [used[0][0] for used in changing.used] == [2, 0, 1], "of the window that begins behind each step"
    spoilt, expected = by_rank[0][-1].outcome[1], reference_job(BY_ROWS)[1]
    assert distance(spoilt, {name: expected[name] for name in spoilt}) > 10 * WEIGHTS, "the control"
