"""The norm that clips is that of one device: in every precision, at every ZeRO stage, however the experts lie.

The reference is float64 loops on the concatenated batch, torch's clip_grad_norm_ and SGD at a rate of 1, under which a
clipped step is as long as the limit. fp16 is refused on the CPU, and fused optimizers do not exist there: the tests
tell DeepSpeed that both are there, and its wrappers run all the same. bf16 and fp16 gradients round to 2^-8 and 2^-11.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.small_model import Job, LoopLayer, SmallModel, batches, distance, make_model, merged, named_weights
from tests.ranks import RankPool

LIMIT, RATE = 0.05, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM = {"fp32": 2e-6, "bf16": 1e-2, "fp16": 2e-3}  # relative error of a norm
WEIGHTS = {"fp32": 5e-6, "bf16": 3e-2, "fp16": 3e-2}  # of the largest weight of a tensor; low precision rounds weights


@dataclass(frozen=True)
class Case:
    """One training run with clipping."""

    job: Job
    precision: str = "fp32"
    optimizer: str = "plain"  # or "fused", "legacy": which wrapper DeepSpeed takes for low precision
    is_hooked: bool = False

    def __str__(self) -> str:
        job, hooks = self.job, " with hooks" if self.is_hooked else ""
        optimizer = f"{self.precision} {self.optimizer}, x{job.accumulation}"
        return f"{job.layer}{hooks}, {job.door}.initialize, ep_size {job.ep_size}, ZeRO {job.stage}, {optimizer}"


def job_of(**values: Any) -> Job:
    return Job(clipping=LIMIT, steps=2, **values)


CASES = [
    *(Case(job_of(ep_size=2, stage=stage, accumulation=accumulation)) for stage, accumulation in ((0, 2), (2, 2))),
    Case(job_of(ep_size=2, layer="native"), is_hooked=True),
    Case(job_of(ep_size=4, door="deepspeed")),
    Case(job_of(ep_size=2, stage=1), "bf16"),
    Case(job_of(ep_size=4), "fp16"),
    Case(job_of(ep_size=2), "bf16", "fused"),
    Case(job_of(ep_size=2), "fp16", "legacy"),
]
MORE_CASES = [
    Case(job_of(ep_size=4)),
    Case(job_of(ep_size=2, stage=1)),
    Case(job_of(ep_size=2, door="deepspeed"), "fp16"),
    Case(job_of(ep_size=2), "bf16"),
]
CONTROLS = [
    Case(job_of(ep_size=2, layer="native")),
    Case(job_of(ep_size=4, layer="native"), "bf16"),
]


class LegacySGD(torch.optim.SGD):
    """SGD as DeepSpeed's wrapper calls apex's fused optimizers: it unscales by itself."""

    @torch.no_grad()
    def step(self, grads: Any = None, output_params: Any = None, scale: float = 1.0, **_: Any) -> None:  # type: ignore[override]
        if grads is None:
            return  # DeepSpeed's first call, to have states made
        for group, (grad,), (output,) in zip(self.param_groups, grads, output_params, strict=True):
            group["params"][0].sub_(group["lr"] * grad.float() / scale)
            output.copy_(group["params"][0])


def train(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """The reported norm of each step, and the last weights, on this rank."""
    import ds_moe_ep

    engine = make_clipping_engine(case)
    handle = ds_moe_ep.attach_overlap(engine, {"schedule": "peers"}) if case.is_hooked else None
    rank, norms = dist.get_rank(), []
    for micro_batches in batches(case.job):
        for x, target in micro_batches:
            dtype = DTYPES[case.precision]
            engine.backward(engine(x[rank].to(dtype), target[rank].to(dtype)))
            engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    if handle is not None:
        handle.remove()
        assert "clip_fp32_gradients" not in vars(engine), "the engine clips as DeepSpeed again"
    return norms, named_weights(engine.module, case.job)


def make_clipping_engine(case: Case) -> Any:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import engine as engine_module

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    get_accelerator().is_fp16_supported = lambda: True
    optimizer = {"type": "SGD", "params": {"lr": RATE}, "legacy_fusion": case.optimizer == "legacy"}
    config = case.job.ds_config | {"optimizer": optimizer, "zero_allow_untested_optimizer": True}
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8}
    model = make_model(case.job)
    door = ds_moe_ep.initialize if case.job.layer == "ours" and case.job.door == "ds_moe_ep" else deepspeed.initialize
    arguments: dict[str, Any] = {"model_parameters": list(model.parameters())}
    if case.optimizer == "legacy":
        arguments = {"optimizer": LegacySGD(model.parameters(), lr=RATE)}
    fused = engine_module.FusedAdam
    engine_module.FusedAdam = fused if case.optimizer == "plain" else torch.optim.SGD
    try:
        return door(model=model, config=config, **arguments)[0]
    finally:
        engine_module.FusedAdam = fused


def train_all(cases: Sequence[Case]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [train(case) for case in cases]


@functools.cache
def reference(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    """The same in one process and float64, each step as long as the limit allows."""
    from ds_moe_ep.model.initialize import global_name, init_weights

    model = SmallModel(lambda: LoopLayer(job))
    init_weights(model, job.seed)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    norms = []
    for micro_batches in batches(job):
        x, target = (torch.cat([pair[i] for pair in micro_batches]).flatten(0, 1).double() for i in range(2))
        optimizer.zero_grad()
        model(x, target).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        optimizer.step()
    return norms, {global_name(name): p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("cases", [[*CASES, *CONTROLS], pytest.param(MORE_CASES, marks=pytest.mark.slow)])
def test_the_norm_that_clips_is_one_devices_and_is_reported_alike_on_every_rank(
    pool: RankPool, cases: list[Case]
) -> None:
    by_rank = pool.run(4, train_all, cases, timeout_s=200)
    for index, case in enumerate(cases):
        expected_norms, expected = reference(replace(case.job, stage=0, layer="ours", door="ds_moe_ep"))
        norms = [results[index][0] for results in by_rank]
        moved = distance(merged([results[index][1] for results in by_rank]), expected)
        print(f"{case}: {norms[0]} for {expected_norms}, weights off by {moved:.1e}")
        is_right = norms[0] == pytest.approx(expected_norms, rel=NORM[case.precision])
        if case in CONTROLS:
            assert not is_right and moved > WEIGHTS[case.precision], f"{case}: the negative control is right"
            continue
        assert all(theirs == norms[0] for theirs in norms), f"{case}: the ranks report {norms}"
        assert min(expected_norms) > 4 * LIMIT, "every step is clipped"
        assert is_right, f"{case}: {norms[0]} for {expected_norms}"
        assert moved < WEIGHTS[case.precision], f"{case}: weights are off by {moved}"


def norms_of_odd_gradients() -> tuple[list[float], int]:
    """Norms of a dense, a sparse and no gradient, and the collectives that they took."""
    from torch.distributed import all_reduce

    from ds_moe_ep.engine.extensions import clipping

    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return all_reduce(*args, **kwargs)

    rows = torch.tensor([1, 1, 3])
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        for is_sparse in (False, True):
            table = torch.nn.Embedding(4, 2, sparse=is_sparse)
            (table(rows) * torch.tensor([3.0, 4.0])).sum().backward()
            found.append(float(clipping.whole_norm(table.parameters(), "cpu")))
        found.append(float(clipping.whole_norm(torch.nn.Linear(2, 2).parameters(), "cpu")))
    return found, len(calls)


def test_a_norm_takes_one_collective_whatever_the_gradients_are(pool: RankPool) -> None:
    for found, num_calls in pool.run(2, norms_of_odd_gradients):
        assert found == pytest.approx([125**0.5, 125**0.5, 0.0])  # rows of (6, 8) and (3, 4)
        assert num_calls == 3
