"""Every pair of settings beside tensor ranks, by a covering design: each job trains as one device.

In bf16 some gradients, of a gate or a residual's coefficient, are small sums of large parts, and so off by 0.06 of
their largest value (measured) though all choices are those of float64; DeepSpeed's own layer is as far off. The faults
that are planted must be off by five times the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest

from tests.engine.layouts.tensor_models import TensorJob
from tests.engine.layouts.tensor_runs import Trained, merged, reference, run_jobs
from tests.ranks import RankPool

PARTS = 3  # each within the time of a test on a busy machine
SETTINGS: dict[str, tuple[Any, ...]] = {
    "kind": ("ours", "hooked"),
    "ep_size": (4, 2, 1),
    "top_k": (1, 2, 4),
    "stage": (0, 1, 2),
    "capacity_factor": (None, 1.0),
    "recompute": (False, True),
    "cuts_tokens": (False, True),
    "accumulation": (1, 2),
    "residual": (False, True),
    "bf16": (False, True),
}
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def is_possible(settings: Mapping[str, Any]) -> bool:
    """Hooks leave layers alone whose experts are on every rank, and refuse a residual's tokens that come cut; equal
    scores of top-1 fall otherwise in DeepSpeed.
    """
    drops_alone = settings["top_k"] == 1 and settings["capacity_factor"] is not None
    is_refused = settings["residual"] and settings["cuts_tokens"]
    return settings["kind"] == "ours" or (settings["ep_size"] > 1 and not drops_alone and not is_refused)


def pairs_of(settings: Mapping[str, Any]) -> set[Pair]:
    return set(combinations(settings.items(), 2))


def covering() -> Iterator[dict[str, Any]]:
    """Settings, each of which covers the most pairs that those before it left."""
    possible = [dict(zip(SETTINGS, values, strict=True)) for values in product(*SETTINGS.values())]
    possible = [settings for settings in possible if is_possible(settings)]
    left = {pair for settings in possible for pair in pairs_of(settings)}
    while left:
        best = max(possible, key=lambda settings: len(pairs_of(settings) & left))
        left -= pairs_of(best)
        yield best


def job_of(settings: Mapping[str, Any]) -> TensorJob:
    tokens, knobs = (8, {"sequence_parallel": True}) if settings["cuts_tokens"] else (7, {})
    return TensorJob(tokens=tokens, knobs=knobs, clipping=3.0, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pair_of_settings_trains_as_one_device(pool: RankPool, part: int) -> None:
    jobs = [job_of(settings) for settings in covering()][part::PARTS]
    by_rank = pool.run(4, run_jobs, [(job, None) for job in jobs], timeout_s=280)
    for job, results in zip(jobs, zip(*by_rank, strict=True), strict=True):
        result = merged(results)
        assert isinstance(result, Trained), (job, result)
        assert result.distance(reference(job)) < job.bound, (job, result.distance(reference(job)))


@pytest.mark.slow
def test_faults_are_seen_in_bf16_too(pool: RankPool) -> None:
    right = TensorJob(top_k=2, capacity_factor=1.0, stage=1, bf16=True, tokens=8, clipping=3.0, accumulation=2)
    jobs = [replace(right, fault=fault) for fault in ("", "tokens counted twice", "a gradient counted twice")]
    by_rank = pool.run(4, run_jobs, [(job, None) for job in jobs], timeout_s=200)
    results = [merged(results) for results in zip(*by_rank, strict=True)]
    distances = [result.distance(reference(right)) for result in results if isinstance(result, Trained)]
    assert len(distances) == len(jobs), results
    assert distances[0] < right.bound and min(distances[1:]) > 5 * right.bound, distances
