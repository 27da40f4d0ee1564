"""Sequence parallelism by DeepSpeed's unit of groups: steps are those of one device, for own and for hooked layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.engine.layouts.tensor_models import BOUND, WORLD, D, TensorJob, TensorModel, sequence_mpu_of
from tests.engine.layouts.tensor_runs import (
    Trained,
    experts_of,
    give_weights,
    joined_routes,
    make_layer,
    parameter_groups,
    reference,
    routed,
)
from tests.moe.replica_cases import copies_in, let_rows_count_alone
from tests.ranks import RankPool

SEQUENCE_SIZE = 2


@dataclass(frozen=True, kw_only=True)
class SequenceJob(TensorJob):
    """4 ranks, of which each 2 hold a half of the same sequences, as ranks that are alone with their tokens."""

    bf16_bound = 0.04
    by_megatron: bool = False  # groups of Megatron-DeepSpeed's mpu, not of DeepSpeed's unit

    @property
    def num_copies(self) -> int:
        return WORLD


def run_job(job: SequenceJob) -> Trained:
    """The job on this rank; the loss of a rank is its part of the mean over a sequence."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as unit

    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups
    from ds_moe_ep.engine.layouts.sequence import ExpertGradients
    from ds_moe_ep.model.initialize import global_name

    ds_moe_ep.init_distributed()
    if unit._SEQUENCE_PARALLEL_GROUP is None:
        unit.initialize_sequence_parallel(SEQUENCE_SIZE)
    mpu = sequence_mpu_of(SEQUENCE_SIZE) if job.by_megatron else unit
    model = TensorModel(job, lambda _: make_layer(job))
    give_weights(model, job)
    off = patch.object(ExpertGradients, "is_needed", lambda: False) if job.fault else nullcontext()
    with off:
        optimizer = torch.optim.SGD(parameter_groups(model), lr=job.rate)
        config = job.ds_config({"sequence_parallel_size": SEQUENCE_SIZE})
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=config)
        attached: Any = nullcontext()
        if job.kind != "native":
            traffic = {"schedule": "peers"} | job.knobs
            attached = ds_moe_ep.attach_overlap(engine, traffic if job.kind == "hooked" else None)
        let_rows_count_alone(engine.module)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses, norms = [], []
    with attached, routed(engine, job, dist.get_rank()) as record:
        for x in job.batches():
            loss = engine(x[dist.get_rank()].to(job.dtype))
            engine.backward(loss / SEQUENCE_SIZE)
            engine.step()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(float(total) / WORLD)
            norms.append(float(engine.get_global_grad_norm()))
        hosted = copies_in(model)
    forget_groups()
    index = job.expert_index(dist.get_rank())
    moves = {
        global_name(name, index): (parameter.detach() - before[name]).float()
        for name, parameter in model.named_parameters()
    }
    routes = {} if record is None else experts_of(record)
    return Trained(losses, norms, moves, routes, num_hosted=hosted)


def run_jobs(jobs: Sequence[SequenceJob]) -> list[Trained]:
    return [run_job(job) for job in jobs]


def run_jobs_and_refusal(jobs: Sequence[SequenceJob]) -> tuple[list[Trained], str]:
    """The jobs, and the error of a layer whose balance loss is that of whole sequences."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as unit

    from ds_moe_ep import ConfigError, GeluMLP, MoE, MoEConfig

    found, error = run_jobs(jobs), ""
    layer = MoE(D, GeluMLP(D, 8), config=MoEConfig(num_experts=4, ep_size=2, balance_scope="sequence"))
    try:
        deepspeed.initialize(model=layer, mpu=unit, config=JOB.ds_config({"sequence_parallel_size": SEQUENCE_SIZE}))
    except ConfigError as refused:
        error = str(refused)
    return found, error


def merged(by_rank: Sequence[Trained]) -> Trained:
    whole: dict[str, Any] = {}
    for name, move in [pair for result in by_rank for pair in result.moves.items()]:
        assert torch.equal(whole.setdefault(name, move), move), f"ranks' {name} differ"
    return replace(by_rank[0], moves=whole, routes=joined_routes(by_rank))


JOB = SequenceJob(top_k=2, clipping=3.0, records=True, knobs={"n_group": 2, "topk_group": 1})
REPLAYED = SequenceJob(top_k=2, ep_size=4, clipping=3.0, replays=True)
FAULT = SequenceJob(fault="experts divided by the world")
NODES = {"node_size": 2}
MORE_JOBS = {
    "own, Megatron-DeepSpeed's mpu": SequenceJob(top_k=2, clipping=3.0, by_megatron=True, records=True),
    "own, ZeRO 1, Megatron-DeepSpeed's mpu": SequenceJob(
        ep_size=4, top_k=2, stage=1, clipping=3.0, by_megatron=True, replays=True
    ),
    "hooked, ZeRO 2, Megatron-DeepSpeed's mpu": SequenceJob(
        kind="hooked", top_k=2, stage=2, clipping=3.0, by_megatron=True
    ),
    "own, ZeRO 2, Megatron-DeepSpeed's mpu": SequenceJob(ep_size=4, top_k=2, stage=2, clipping=3.0, by_megatron=True),
    "own, ZeRO 1, bf16, Megatron-DeepSpeed's mpu": SequenceJob(
        ep_size=4, top_k=2, stage=1, bf16=True, clipping=3.0, by_megatron=True
    ),
    "hooked, Megatron-DeepSpeed's mpu": SequenceJob(kind="hooked", ep_size=4, top_k=2, clipping=3.0, by_megatron=True),
    "hooked, ZeRO 1, Megatron-DeepSpeed's mpu": SequenceJob(
        kind="hooked", ep_size=4, top_k=2, stage=1, clipping=3.0, by_megatron=True
    ),
    "hooked, ZeRO 2, bf16, Megatron-DeepSpeed's mpu": SequenceJob(
        kind="hooked", top_k=2, stage=2, bf16=True, clipping=3.0, by_megatron=True
    ),
    "own, ZeRO 1": SequenceJob(ep_size=4, top_k=2, stage=1, clipping=3.0),
    "hooked, bf16": SequenceJob(kind="hooked", ep_size=4, top_k=2, bf16=True, clipping=3.0),
    "hooked, ZeRO 1, bf16": SequenceJob(kind="hooked", ep_size=4, top_k=2, bf16=True, stage=1, clipping=3.0),
    "hooked, ZeRO 2": SequenceJob(kind="hooked", top_k=2, stage=2, clipping=3.0),
    "own, ZeRO 2": SequenceJob(ep_size=4, capacity_factor=1.0, stage=2, clipping=3.0),
    "own, bf16": SequenceJob(ep_size=4, top_k=2, bf16=True, clipping=3.0),
    "own, ZeRO 1, bf16": SequenceJob(top_k=4, bf16=True, stage=1, clipping=3.0),
    "own, ZeRO 2, bf16": SequenceJob(top_k=1, bf16=True, stage=2, clipping=3.0),
    "hooked, ZeRO 2, bf16": SequenceJob(kind="hooked", ep_size=4, top_k=2, bf16=True, stage=2, clipping=3.0),
    "hooked": SequenceJob(kind="hooked", top_k=2, clipping=3.0, records=True),
    "hooked, routes of a record": SequenceJob(kind="hooked", ep_size=4, top_k=2, stage=1, clipping=3.0, replays=True),
    "own, routes of a record, recomputed": SequenceJob(top_k=1, stage=2, recompute=True, clipping=3.0, replays=True),
    "own, copies of hot experts": SequenceJob(ep_size=4, top_k=2, clipping=3.0, knobs={"replicas": 1}),
    "hooked, ZeRO 1, copies of hot experts": SequenceJob(
        kind="hooked", ep_size=4, top_k=2, stage=1, clipping=3.0, knobs={"replicas": 1}
    ),
    "own, copies of tokens": SequenceJob(
        ep_size=4, top_k=2, stage=1, clipping=3.0, knobs=NODES | {"two_level": "copies"}
    ),
    "hooked, sums at nodes": SequenceJob(
        kind="hooked", ep_size=4, top_k=2, clipping=3.0, knobs=NODES | {"two_level": "sums"}
    ),
    "own, chunks": SequenceJob(ep_size=4, top_k=2, clipping=3.0, knobs={"schedule": "chunks"}),
    "DeepSpeed's, Megatron-DeepSpeed's mpu": SequenceJob(kind="native", top_k=2, stage=1, by_megatron=True),
    "hooked, ZeRO 1": SequenceJob(kind="hooked", ep_size=4, top_k=2, capacity_factor=1.0, stage=1, clipping=3.0),
}


def test_sequence_ranks_train_as_one_device_and_experts_divided_by_the_whole_world_do_not(pool: RankPool) -> None:
    by_rank = pool.run(WORLD, run_jobs_and_refusal, [JOB, REPLAYED, FAULT], timeout_s=120)
    right, replayed, wrong = map(merged, zip(*(trained for trained, _ in by_rank), strict=True))
    refusal = "moe_ep.balance_scope='sequence' with sequence parallel size=2: each rank routes a part of a sequence"
    assert all(error.startswith(refusal) for _, error in by_rank)
    assert right.distance(reference(JOB)) < BOUND and replayed.distance(reference(REPLAYED)) < BOUND
    assert replace(right, routes={}).distance(reference(replace(JOB, knobs={}))) > 100 * BOUND
    assert replayed.distance(reference(replace(REPLAYED, replays=False))) > 100 * BOUND
    assert wrong.distance(reference(FAULT)) > 100 * BOUND


@pytest.fixture(scope="module")
def found(pool: RankPool) -> dict[str, Trained]:
    by_rank = pool.run(WORLD, run_jobs, list(MORE_JOBS.values()), timeout_s=200)
    return dict(zip(MORE_JOBS, map(merged, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_JOBS)
def test_more_sequence_ranks_train_as_one_device(found: dict[str, Trained], name: str) -> None:
    job = MORE_JOBS[name]
    assert found[name].distance(reference(job)) < job.bound
    assert bool(found[name].num_hosted) == ("replicas" in job.knobs)
