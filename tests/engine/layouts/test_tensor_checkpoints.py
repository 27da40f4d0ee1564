"""Checkpoints beside tensor parallelism: a resumed run goes on bit for bit, and what would not load is not saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.layouts.tensor_models import TENSOR_SIZE, TensorJob, TensorModel, mpu_of
from tests.engine.layouts.tensor_runs import give_weights, make_layer, parameter_groups
from tests.ranks import RankPool


def make_engine(job: TensorJob) -> Any:
    import deepspeed

    import ds_moe_ep

    ds_moe_ep.init_distributed()
    grid = mpu_of(TENSOR_SIZE)
    model = TensorModel(job, lambda _: make_layer(job), grid)
    give_weights(model, job)
    optimizer = torch.optim.Adam(parameter_groups(model), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=grid, config=job.ds_config({}))
    ds_moe_ep.attach_overlap(engine, {"schedule": "peers"} if job.kind == "hooked" else None)
    return engine


def step(engine: Any, x: Tensor) -> float:
    loss = engine(x[dist.get_rank() // TENSOR_SIZE])
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def resumed(folder: str, job: TensorJob) -> bool | str:
    """True where a step after loading gives the bits of a step without; or the error."""
    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    first, second = job.batches()
    engine = make_engine(job)
    step(engine, first)
    try:
        engine.save_checkpoint(folder, tag="one")
    except ds_moe_ep.EngineError as error:
        forget_groups()
        return str(error)
    loss, weights = step(engine, second), [p.detach().clone() for p in engine.module.parameters()]
    forget_groups()
    other = make_engine(job)
    other.load_checkpoint(folder, tag="one")
    is_same = step(other, second) == loss
    forget_groups()
    return is_same and all(map(torch.equal, other.module.parameters(), weights))


def each_resumed(folder: str, jobs: Sequence[TensorJob]) -> list[bool | str]:
    return [resumed(f"{folder}/{number}", job) for number, job in enumerate(jobs)]


JOBS = (
    TensorJob(top_k=2),
    TensorJob(ep_size=4, stage=1),
    TensorJob(ep_size=4, stage=2, kind="hooked", capacity_factor=2.0),
    TensorJob(ep_size=1, stage=1),
    TensorJob(ep_size=2, interleaved=True),
)


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(pool: RankPool, tmp_path: Path) -> None:
    for found in pool.run(4, each_resumed, str(tmp_path), JOBS, timeout_s=200):
        assert found[:3] == [True] * 3
        for text in found[3:]:
            assert isinstance(text, str) and "the checkpoint could not be loaded" in text
    assert not any((tmp_path / number).exists() for number in ("3", "4"))
