"""The flat buffer of ZeRO 1 and 2 holds the experts' matrices at equal distances, for grouped products."""

from __future__ import annotations

from ds_moe_ep.kernels.grouped import lie_together
from tests.engine.small_model import Job, batches, make_engine, train_steps
from tests.ranks import RankPool

JOBS = [Job(world_size=2, ep_size=2, stage=stage, bf16=True, steps=1) for stage in (0, 1, 2)]


def places_of(jobs: list[Job]) -> list[list[bool]]:
    """For each job, with its engine and after a step: True where every matrix lies beside its namesakes."""
    found = []
    for job in jobs:
        engine = make_engine(job)
        first = all_together(engine)
        train_steps(engine, job, batches(job))
        found.append([first, all_together(engine)])
    return found


def all_together(engine: object) -> bool:
    experts = [layer.deepspeed_moe.experts.deepspeed_experts for layer in engine.module.layers]  # type: ignore[attr-defined]
    return all(
        lie_together([dict(expert.named_parameters())[name] for expert in each]) is not None
        for each in experts
        for name in ("fc1.weight", "fc2.weight")
    )


def test_zero_lays_the_experts_of_a_rank_at_equal_distances(pool: RankPool) -> None:
    """The control is stage 0, whose parameters keep a memory of their own each."""
    assert pool.run(2, places_of, JOBS, timeout_s=240) == [[[job.stage > 0] * 2 for job in JOBS]] * 2
