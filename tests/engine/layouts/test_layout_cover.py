"""Every pair of layer kind, tensor, sequence and expert ranks, stages, ZeRO, precision, recomputation, k and traffic.

By one covering design over all of them, on 8 ranks, each job as one device. Left out by name is what DeepSpeed itself
does not run, and what the package refuses or has no use for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from tests.engine.layouts.layout_runs import (
    LAYOUT_RANKS,
    TRAFFIC,
    LayoutJob,
    as_the_ranks_tell,
    merged,
    run_job,
    run_jobs,
)
from tests.engine.layouts.tensor_runs import Trained, planted, reference
from tests.ranks import RankPool

PARTS = 6  # each within the time of a test on a busy machine
FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": ("ours", "hooked"),
    "tp_size": (1, 2),
    "pp_size": (1, 2),
    "sp_size": (1, 2),
    "ep_size": (1, 2, 4),
    "stage": (0, 1, 2),
    "precision": ("fp32", "bf16", "fp16"),
    "recompute": (False, True),
    "top_k": (1, 2, 4),
    "traffic": tuple(TRAFFIC),
}
Settings = dict[str, Any]
LEFT_OUT: dict[str, Settings] = {
    "sequence ranks beside tensor ranks: no mpu of DeepSpeed's has both": {"tp_size": 2, "sp_size": 2},
    "sequence ranks in stages: no mpu of DeepSpeed's has both": {"pp_size": 2, "sp_size": 2},
    "ZeRO-2 in stages: DeepSpeed's pipeline engine refuses it": {"pp_size": 2, "stage": 2},
    "fp16 in stages without ZeRO: DeepSpeed does not scale the loss": {"pp_size": 2, "stage": 0, "precision": "fp16"},
    "hooks in stages: refused": {"kind": "hooked", "pp_size": 2},
    "hooks on experts that every rank has: there is no traffic": {"kind": "hooked", "ep_size": 1},
    **{
        f"{traffic} of {name}={value}: refused": {name: value, "traffic": traffic}
        for traffic in ("copies per node", "sums at nodes")
        for name, value in (("top_k", 1), ("ep_size", 1))
    },
}


def reason_against(settings: Mapping[str, Any]) -> str:
    """Why the settings are left out, or an empty string."""
    return next((reason for reason, odd in LEFT_OUT.items() if odd.items() <= settings.items()), "")


def covering() -> Iterator[Settings]:
    """Settings, each of which covers the most pairs that those before it left."""
    every = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    possible = {index: pairs_of(settings) for index, settings in enumerate(every) if not reason_against(settings)}
    left = set().union(*possible.values())
    while left:
        best = max(possible, key=lambda index: len(possible[index] & left))
        left -= possible[best]
        yield every[best]


def pairs_of(settings: Settings) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(settings.items(), 2))


def job_of(settings: Settings) -> LayoutJob:
    in_stages = settings["pp_size"] > 1
    of_stages = {"accumulation": 2, "clipping": 0.0, "tokens": 8}  # tensor ranks cut the messages between stages
    return LayoutJob(**({"clipping": 3.0} | (of_stages if in_stages else {}) | settings))


def test_the_design_covers_every_pair_but_those_that_are_left_out_by_name() -> None:
    designed = list(covering())
    covered = set().union(*map(pairs_of, designed))
    every = {
        ((first, value), (second, other))
        for (first, values), (second, others) in combinations(FACTORS.items(), 2)
        for value in values
        for other in others
    }
    left_out = {tuple(odd.items()) for odd in LEFT_OUT.values() if len(odd) == 2}
    assert every - covered == left_out
    assert len(designed) <= 32 and not any(map(reason_against, designed))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_layouts_trains_as_one_device(pool: RankPool, part: int) -> None:
    jobs = [job_of(settings) for settings in covering()][part::PARTS]
    by_rank = pool.run(LAYOUT_RANKS, run_jobs, jobs, timeout_s=400)
    for job, results in zip(jobs, zip(*by_rank, strict=True), strict=True):
        result, forgetful = merged(job, results), replace(job, forgets_half=True)
        distance = result.distance(as_the_ranks_tell(job, reference(job)))
        assert distance < job.bound, (job, distance)
        assert bool(result.num_hosted) == (job.traffic == "copies of experts" and job.ep_size > 1), job
        assert result.distance(as_the_ranks_tell(job, reference(forgetful))) > 5 * job.bound, job


LAYOUTS: tuple[Settings, ...] = ({"tp_size": 2}, {"pp_size": 2}, {"tp_size": 2, "pp_size": 2})
OF_DEEPSPEED = [
    LayoutJob(kind="native", ep_size=2, top_k=2, stage=1, tokens=8, accumulation=2, clipping=0.0, **layout)
    for layout in LAYOUTS
]


def run_natives(jobs: list[LayoutJob]) -> list[Trained]:
    """Engines of DeepSpeed's own layers, whose gather gloo can do."""
    with planted(""):
        return [run_job(job) for job in jobs]


@pytest.mark.slow
def test_deepspeeds_own_layer_takes_the_same_steps_in_each_layout(pool: RankPool) -> None:
    """But for its norms, which leave out the experts of other tensor ranks: nothing is clipped."""
    by_rank = pool.run(LAYOUT_RANKS, run_natives, OF_DEEPSPEED, timeout_s=300)
    for job, results in zip(OF_DEEPSPEED, zip(*by_rank, strict=True), strict=True):
        result, forgetful = merged(job, results), replace(job, forgets_half=True)
        assert result.distance(as_the_ranks_tell(job, reference(job))) < job.bound, job
        assert result.distance(as_the_ranks_tell(job, reference(forgetful))) > 5 * job.bound, job
