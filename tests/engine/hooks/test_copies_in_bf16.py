"""Layers that DeepSpeed and AutoEP made train in bf16 with copies of their experts as they do without.

As close to float64, or for AutoEP's to the same training in fp32, as without hooks and copies: 1.5 times their distance
and one rounding of bf16, as in `test_training.py`. All experts are chosen, lest rounding turns a choice over, and each
rank has the first expert of the rank before it. The control: the gradients of copies of one home are forgotten there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob
from tests.engine.hooks.hooked_layers import hooked
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
from tests.engine.test_replicas import copies_in_use, pin
from tests.engine.test_training import Outcome, loss_distance
from tests.moe.replica_cases import forgetting_copies
from tests.ranks import RankPool

KNOBS: dict[str, Any] = {"schedule": "peers", "replicas": 1}
ROUNDING = 2**-9
NATIVE = Job(layer="native", stage=1, bf16=True, top_k=NUM_EXPERTS, ep_size=4, accumulation=2)
MORE_NATIVE = Job(layer="native", stage=2, bf16=True, top_k=NUM_EXPERTS, ep_size=2, clipping=0.5)
AUTOEP = AutoEPJob(stage=2, bf16=True, top_k=8, ep_size=4, accumulation=2, num_layers=1)
MORE_AUTOEP = AutoEPJob(stage=1, bf16=True, top_k=8, ep_size=2, preset="qwen3_moe", checkpointing="non-reentrant")
Train = Callable[[Any, Any], Outcome]


def train_native(engine: Any, job: Job) -> Outcome:
    return train_steps(engine, job, batches(job)), named_weights(engine.module, job)


def train_autoep(engine: Any, job: AutoEPJob) -> Outcome:
    return autoep_models.train_steps(engine, job), autoep_models.named_weights(engine, job)


def with_copies(engine: Any, job: Any, train: Train) -> tuple[Outcome, int]:
    """What the job comes to with hooks and pinned copies, and how many there are."""
    names = engine.module.state_dict().keys()
    with hooked(engine, **KNOBS) as handle:
        for layer in handle.layers.values():
            pin(layer)
        found = train(engine, job), copies_in_use(handle.layers.values())
        assert engine.module.state_dict().keys() == names, "checkpoints know of no copies"
        return found


def forgetful(engine: Any, job: Any, train: Train) -> Outcome:
    """The same where the home of the first experts takes in nothing of their copies."""
    with forgetting_copies(is_here=dist.get_rank() == 0):
        return with_copies(engine, job, train)[0]


def runs_of(jobs: list[Any]) -> list[dict[str, Any]]:
    """Of each job on this rank: plain, with copies, with forgotten gradients; of AutoEP's, plain in fp32 too."""
    found = []
    for job in jobs:
        is_native = isinstance(job, Job)
        make: Any = make_engine if is_native else autoep_models.make_engine
        train: Any = train_native if is_native else train_autoep
        mine, copies = with_copies(make(job), job, train)
        its = {"copies": copies, "mine": mine, "plain": train(make(job), job)}
        its["forgetful"] = forgetful(make(job), job, train)
        if not is_native:
            its["fp32"] = train(make(replace(job, bf16=False)), job)
        found.append(its)
    return found


@pytest.mark.parametrize(
    "jobs", [[NATIVE, AUTOEP], pytest.param([MORE_NATIVE, MORE_AUTOEP], marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_hooked_layers_in_bf16_with_copies_are_as_close_to_the_reference_as_plain_ones(
    pool: RankPool, jobs: list[Any]
) -> None:
    by_rank = pool.run(4, runs_of, jobs, timeout_s=200)
    for index, job in enumerate(jobs):
        its = [results[index] for results in by_rank]
        assert all(each["copies"] > 0 for each in its), job
        sides = {
            name: (its[0][name][0], merged([each[name][1] for each in its]))
            for name in its[0]
            if name not in ("copies", "forgetful")
        }
        expected = sides["fp32"] if "fp32" in sides else reference_job(job)
        allowed = 1.5 * loss_distance(sides["plain"], expected) + ROUNDING
        assert loss_distance(sides["mine"], expected) <= allowed, job
        for is_expert in (True, False):
            mine, plain, right = (chosen(each, is_expert) for each in (sides["mine"], sides["plain"], expected))
            allowed = 1.5 * distance(plain, right) + ROUNDING
            assert distance(mine, right) <= allowed, job
            if is_expert:
                spoilt = chosen(its[0]["forgetful"], True)
                assert distance(spoilt, {name: right[name] for name in spoilt}) > 1.5 * allowed, "the control"


def chosen(outcome: Outcome, is_expert: bool) -> dict[str, Tensor]:
    """The weights of experts, or all others."""
    return {name: weight for name, weight in outcome[1].items() if ("expert" in name) == is_expert}
