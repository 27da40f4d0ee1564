"""Tensor parallelism of the dense part: losses, gradients, norms and clipped steps are those of one device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.layouts.tensor_models import BOUND, TensorJob
from tests.engine.layouts.tensor_runs import AUTOTP, PLAN, Trained, merged, reference, run_jobs
from tests.ranks import RankPool

CLIPPED: dict[str, Any] = {"clipping": 3.0}
GROUPS = {"n_group": 2, "topk_group": 1}
COPIES = {"node_size": 2, "two_level": "copies"}  # of tokens, one per node
SUMS = {"node_size": 2, "two_level": "sums"}
CUT: dict[str, Any] = {"tokens": 8, "cuts_tokens": True}
JOBS: dict[str, TensorJob] = {
    "a capacity, groups of experts, one expert group of all ranks": TensorJob(
        ep_size=4, top_k=2, capacity_factor=1.0, stage=1, records=True, knobs=GROUPS | COPIES, **CLIPPED
    ),
    "routes of a record, a shared expert": TensorJob(top_k=2, replays=True, shared=True, **CLIPPED),
    "DeepSpeed's layers, hooked, a capacity": TensorJob(
        kind="hooked", ep_size=4, capacity_factor=2.0, stage=2, residual=True, prefix="slice_parallel", **CLIPPED
    ),
    "bf16": TensorJob(top_k=2, stage=1, bf16=True, **CLIPPED),
}
MORE_JOBS: dict[str, TensorJob] = {
    "own layers, an expert group in each tensor group": TensorJob(prefix="model_parallel", **CLIPPED),
    "every expert on every rank": TensorJob(ep_size=1, top_k=4, stage=2, **CLIPPED),
    "tokens that come cut": TensorJob(
        ep_size=4, top_k=2, capacity_factor=1.0, stage=1, tokens=8, cuts_tokens=True, residual=True, shared=True,
        knobs={"sequence_parallel": True}, **CLIPPED,
    ),
    "tokens that come cut, ZeRO 2": TensorJob(
        top_k=2, stage=2, knobs={"sequence_parallel": True}, **CUT, **CLIPPED
    ),
    "hooked, tokens that come cut, ZeRO 2": TensorJob(
        kind="hooked", top_k=2, stage=2, knobs={"sequence_parallel": True}, **CUT, **CLIPPED
    ),
    "bf16, without ZeRO": TensorJob(ep_size=4, top_k=2, bf16=True, **CLIPPED),
    "bf16, ZeRO 2": TensorJob(ep_size=4, top_k=2, stage=2, bf16=True, **CLIPPED),
    "hooked, bf16, ZeRO 2": TensorJob(kind="hooked", ep_size=4, top_k=2, stage=2, bf16=True, **CLIPPED),
    "hooked, bf16, without ZeRO": TensorJob(kind="hooked", ep_size=4, top_k=2, bf16=True, **CLIPPED),
    "fewer tokens than ranks, accumulated": TensorJob(tokens=1, accumulation=2, stage=1, shared=True, **CLIPPED),
    "a residual, groups of ranks that are apart, recomputed": TensorJob(
        residual=True, interleaved=True, top_k=2, recompute=True, knobs={"balance_scope": "group"}, **CLIPPED
    ),
    "copies of hot experts": TensorJob(top_k=2, stage=1, knobs={"replicas": 1}, **CLIPPED),
    "hooked, copies of hot experts": TensorJob(kind="hooked", ep_size=4, stage=0, knobs={"replicas": 1}, **CLIPPED),
    "hooked, copies of tokens, tokens that come cut": TensorJob(
        kind="hooked", ep_size=4, top_k=2, knobs={"sequence_parallel": True, **COPIES}, **CUT, **CLIPPED
    ),
    "sums at nodes": TensorJob(ep_size=4, top_k=4, stage=2, knobs=SUMS, **CLIPPED),
    "hooked, sums at nodes": TensorJob(kind="hooked", ep_size=4, top_k=2, stage=1, knobs=SUMS, **CLIPPED),
    "sums at nodes, tokens that come cut": TensorJob(
        ep_size=4, top_k=2, recompute=True, knobs={"sequence_parallel": True, **SUMS}, **CUT, **CLIPPED
    ),
    "chunks": TensorJob(ep_size=4, top_k=2, knobs={"schedule": "chunks", "chunks": 3}, **CLIPPED),
    "row cuts, a shared expert": TensorJob(
        ep_size=4, top_k=2, shared=True, knobs={"node_size": 2, "row_cuts": 2, "depth": 3}, **CLIPPED
    ),
    "hooked, chunks": TensorJob(kind="hooked", ep_size=4, top_k=2, knobs={"schedule": "chunks"}, **CLIPPED),
    "copies of hot experts, tokens that come cut": TensorJob(
        ep_size=4, top_k=2, knobs={"sequence_parallel": True, "replicas": 1}, **CUT, **CLIPPED
    ),
    "DeepSpeed's layers, hooked": TensorJob(kind="hooked", top_k=2, stage=1, tokens=8, **CLIPPED),
    "hooked, tokens that come cut": TensorJob(
        kind="hooked", ep_size=4, top_k=2, tokens=8, cuts_tokens=True, knobs={"sequence_parallel": True}, **CLIPPED
    ),
    "groups of experts, tokens that come cut": TensorJob(
        top_k=2, records=True, knobs={"sequence_parallel": True, **GROUPS}, **CUT, **CLIPPED
    ),
    "routes of a record, tokens that come cut, a capacity, recomputed, accumulated": TensorJob(
        ep_size=4, top_k=2, capacity_factor=1.0, accumulation=2, recompute=True, replays=True,
        knobs={"sequence_parallel": True}, **CUT, **CLIPPED,
    ),
    "hooked, recorded": TensorJob(kind="hooked", ep_size=4, stage=2, recompute=True, records=True, **CLIPPED),
    "hooked, routes of a record": TensorJob(kind="hooked", top_k=2, stage=1, replays=True, **CLIPPED),
    "hooked, routes of a record, tokens that come cut": TensorJob(
        kind="hooked", top_k=1, replays=True, knobs={"sequence_parallel": True}, **CUT, **CLIPPED
    ),
}  # fmt: skip
OTHER_ROUTES: dict[str, TensorJob] = {  # of one device that does not know of groups, or of a record
    **{name: replace(job, knobs=COPIES) for name, job in JOBS.items() if "groups of" in name},
    **{name: replace(job, replays=False) for name, job in JOBS.items() if job.replays},
}
MORE_OTHER_ROUTES: dict[str, TensorJob] = {
    **{name: replace(job, knobs={}) for name, job in MORE_JOBS.items() if "groups of" in name},
    **{name: replace(job, replays=False) for name, job in MORE_JOBS.items() if job.replays},
}
NATIVE = TensorJob(kind="native", top_k=2, stage=1, tokens=8)
FAULTS: dict[str, TensorJob] = {
    "tokens counted twice": TensorJob(fault="tokens counted twice"),
}
MORE_FAULTS: dict[str, TensorJob] = {
    "a gradient counted twice": TensorJob(fault="a gradient counted twice"),
    "experts without a mark": TensorJob(fault="experts without a mark", stage=1, **CLIPPED),
    "gradients that are not gathered": TensorJob(fault="gradients that are not gathered"),
    "results that are not gathered": TensorJob(fault="results that are not gathered"),
    "results of a piece that are lost": TensorJob(fault="results of a piece that are lost", ep_size=4),
    "gradients of a piece that are lost": TensorJob(fault="gradients of a piece that are lost", ep_size=4),
    "a group of the wrong ranks": TensorJob(fault="a group of the wrong ranks"),
    "other records": TensorJob(replays=True, fault="other records"),
}
PARTED = "the ranks of a tensor-parallel group have different tokens"
NAMED = {  # the ranks see by themselves that they part
    "gradients that are not gathered": PARTED,
    "results that are not gathered": PARTED,
    "a group of the wrong ranks": PARTED,
    "other records": "record: ranks 1, 3 would send tokens elsewhere than the first rank of the tensor-parallel group",
}
OF_AUTOTP: dict[str, tuple[TensorJob, dict[str, Any] | None]] = {
    "the section": (TensorJob(**CLIPPED), AUTOTP),
    "the section, ZeRO 1, two choices": (TensorJob(ep_size=4, top_k=2, stage=1, **CLIPPED), AUTOTP),
    "the section, ZeRO 2": (TensorJob(stage=2, through_own_door=True, **CLIPPED), AUTOTP),
    "the section, hooked": (TensorJob(kind="hooked", top_k=2, stage=1, **CLIPPED), AUTOTP),
    "the section, hooked, without ZeRO": (TensorJob(kind="hooked", ep_size=4, top_k=2, **CLIPPED), AUTOTP),
    "the section, hooked, ZeRO 2": (TensorJob(kind="hooked", top_k=2, stage=2, **CLIPPED), AUTOTP),
    "the section, bf16": (TensorJob(ep_size=4, top_k=2, stage=1, bf16=True, **CLIPPED), AUTOTP),
    "tp_model_init, ZeRO 2": (TensorJob(top_k=2, stage=2, through_own_door=True, **CLIPPED), PLAN),
    "tp_model_init": (TensorJob(**CLIPPED), PLAN),
    "tp_model_init, ZeRO 1": (TensorJob(ep_size=4, top_k=2, stage=1, through_own_door=True, **CLIPPED), PLAN),
}
Found = dict[str, Trained | str]


@pytest.fixture(scope="module")
def found(pool: RankPool) -> Found:
    return _run(pool, [*JOBS, *FAULTS], [(job, None) for job in (*JOBS.values(), *FAULTS.values())])


@pytest.fixture(scope="module")
def found_slowly(pool: RankPool) -> Found:
    plain: list[tuple[TensorJob, dict[str, Any] | None]]
    plain = [(job, None) for job in (*MORE_JOBS.values(), *MORE_FAULTS.values(), NATIVE)]
    return _run(pool, [*MORE_JOBS, *MORE_FAULTS, "native", *OF_AUTOTP], [*plain, *OF_AUTOTP.values()])


def _run(pool: RankPool, names: list[str], jobs: list[tuple[TensorJob, dict[str, Any] | None]]) -> Found:
    by_rank = pool.run(4, run_jobs, jobs, timeout_s=300)
    return dict(zip(names, map(merged, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_tensor_ranks_train_as_one_device(found: Found, name: str) -> None:
    check(found[name], JOBS[name])


def test_a_shared_expert_computes_while_results_are_gathered(found: Found) -> None:
    result = found["routes of a record, a shared expert"]
    assert isinstance(result, Trained) and result.marks == ("begins", "computes", "ends") * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_JOBS)
def test_more_jobs_of_tensor_ranks_train_as_one_device(found_slowly: Found, name: str) -> None:
    check(found_slowly[name], MORE_JOBS[name])


@pytest.mark.parametrize("name", OTHER_ROUTES)
def test_other_routes_are_seen(found: Found, name: str) -> None:
    check_seen(found[name], OTHER_ROUTES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_OTHER_ROUTES)
def test_other_routes_of_more_jobs_are_seen(found_slowly: Found, name: str) -> None:
    check_seen(found_slowly[name], MORE_OTHER_ROUTES[name])


def check_seen(result: Trained | str, other: TensorJob) -> None:
    """By the routes where they were recorded, and by the steps alone."""
    assert isinstance(result, Trained), result
    expected = reference(other)
    assert not result.routes or result.distance(expected) == math.inf
    assert replace(result, routes={}).distance(expected) > 100 * BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_AUTOTP)
def test_a_dense_part_that_autotp_cuts_trains_as_one_device(found_slowly: Found, name: str) -> None:
    check(found_slowly[name], OF_AUTOTP[name][0])


@pytest.mark.slow
def test_deepspeeds_own_layer_takes_the_same_steps_by_another_norm(found_slowly: Found) -> None:
    """Its norm leaves out the experts of all tensor ranks but the first."""
    result, expected = found_slowly["native"], reference(NATIVE)
    assert isinstance(result, Trained), result
    assert result.distance(expected) > 100 * BOUND and result.norms[0] < 0.99 * expected.norms[0]
    assert replace(result, norms=[]).distance(replace(expected, norms=[])) < BOUND


def check(result: Trained | str, job: TensorJob) -> None:
    assert isinstance(result, Trained), result
    assert result.distance(reference(job)) < job.bound
    assert bool(result.num_hosted) == ("replicas" in job.knobs)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(found: Found, name: str) -> None:
    check_fault(name, found[name], FAULTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_FAULTS)
def test_more_planted_faults_are_seen(found_slowly: Found, name: str) -> None:
    check_fault(name, found_slowly[name], MORE_FAULTS[name])


def check_fault(name: str, result: Trained | str, job: TensorJob) -> None:
    if name in NAMED:
        assert isinstance(result, str) and NAMED[name] in result
        return
    assert isinstance(result, Trained), result
    assert result.distance(reference(job)) > 100 * BOUND
