"""Memory breakdown of real engines on gloo ranks, against sizes that follow from the number of parameters P."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.bench.meters.memory import peak_bytes
from ds_moe_ep.bench.meters.memory_breakdown import memory_breakdown, storages, tensors_in
from ds_moe_ep.engine import step_seams as seams
from ds_moe_ep.records.names import KINDS
from tests.ranks import RankPool

CPU = torch.device("cpu")
WIDTH, DEPTH = 256, 4
P = DEPTH * (WIDTH + 1) * WIDTH  # parameters of `Holder`
HELD_BYTES = 16 * 2**20
NOISE_BYTES = 2**20  # of a resident peak: pages of small blocks, and what gloo's threads touch
STEP_COUNTERS = 4 * 2 * DEPTH  # Adam keeps one fp32 number a parameter beside its moments


class Hold(torch.autograd.Function):
    """The identity, which keeps HELD_BYTES from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones(HELD_BYTES // 4))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        assert len(ctx.saved_tensors) == 1
        return dy


class Holder(nn.Module):
    """A few Linears with, where it is told to, an activation of known size."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.holds = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (Hold.apply(x) if self.holds else x).float().square().mean()


def make_engine(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.init_distributed("gloo")
    adam = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}
    common = {"train_micro_batch_size_per_gpu": 8, "optimizer": adam, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, config=common | config, model_parameters=list(model.parameters()))[0]


def stage(number: int, **config: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}} | config


def train_step(engine: Any) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(8, WIDTH, dtype=dtype)))
    engine.step()


def breakdowns_job(configs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Breakdowns of an engine of each config; all engines are alive when the first is measured."""
    from ds_moe_ep.bench.meters.memory import return_freed_memory

    return_freed_memory()
    engines = [make_engine(Holder(), config) for config in configs]
    for engine in engines:
        train_step(engine)
    return [memory_breakdown(engine, lambda engine=engine: train_step(engine), CPU) for engine in engines]


BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
# config, and bytes per parameter of weights, gradients and optimizer on one of two ranks
CASES: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "fp32": (stage(0), (4, 4, 8)),
    "fp32 ZeRO-1: half of the moments, and masters": (stage(1), (4, 4, 4 + 2)),
    "fp32 ZeRO-2: half of the gradients": (stage(2), (4, 2, 4 + 2)),
    "bf16 ZeRO-1": (stage(1, **BF16), (2, 2, 6)),
    "bf16 ZeRO-1, gradients summed in fp32": (stage(1, **FP32_SUMS), (2, 2 + 4, 6)),
}


def test_sizes_follow_from_the_parameters_with_every_engine_in_one_process(pool: RankPool) -> None:
    found = pool.run(2, breakdowns_job, [config for config, _ in CASES.values()], timeout_s=120)
    for by_engine in found:
        for (name, (_, expected)), measured in zip(CASES.items(), by_engine, strict=True):
            assert list(measured) == list(KINDS), name
            for part, bytes_each in zip(("weights", "gradients", "optimizer"), expected, strict=True):
                # ZeRO pads its partitions to a few numbers, and Adam counts its steps
                assert measured[part] == pytest.approx(bytes_each * P, abs=STEP_COUNTERS + 64), f"{name}: {part}"
            assert measured["buffers"] <= 12 * P + NOISE_BYTES, f"{name}: a bucket, and copies of the gradients"


def one_rank_job() -> dict[str, int]:
    return breakdowns_job([stage(0)])[0]


def test_without_zero_and_with_one_rank_adam_takes_16_bytes_a_parameter_exactly(pool: RankPool) -> None:
    (found,) = pool.run(1, one_rank_job)
    assert found["weights"] == found["gradients"] == 4 * P
    assert found["optimizer"] == 8 * P + STEP_COUNTERS


def activation_job() -> tuple[Any, ...]:
    from ds_moe_ep.bench.meters.memory import return_freed_memory

    return_freed_memory()
    # One layer: DeepSpeed flattens all gradients of a step, and those of DEPTH layers are as much as the noise.
    engine, other = (make_engine(Holder(depth=1), stage(0)) for _ in range(2))
    other.module.register_buffer("large", torch.ones(HELD_BYTES // 4))
    for one in (engine, other):
        train_step(one)

    def step() -> None:
        train_step(engine)

    def forward() -> None:
        with torch.no_grad():
            engine(torch.ones(1024 * 8, WIDTH))

    without = memory_breakdown(engine, step, CPU)
    engine.module.holds = True
    holding, peak = memory_breakdown(engine, step, CPU), peak_bytes(lambda: step, CPU, steps=1)
    engine.module.holds = False
    engine.module.register_buffer("kept", torch.ones(2**20 // 4))
    buffer = memory_breakdown(engine, step, CPU)
    return without, holding, peak, buffer, memory_breakdown(engine, forward, CPU)


def test_activations_are_what_a_step_holds_and_buffers_what_stays_beside_the_known_parts(pool: RankPool) -> None:
    ((without, holding, peak, buffer, forward),) = pool.run(1, activation_job)
    assert without["activations"] < NOISE_BYTES and without["buffers"] < NOISE_BYTES, "the other engine's is not ours"
    assert holding["activations"] == pytest.approx(HELD_BYTES, abs=NOISE_BYTES)
    assert {part: holding[part] for part in ("weights", "gradients", "optimizer")} == {
        part: without[part] for part in ("weights", "gradients", "optimizer")
    }
    assert peak == pytest.approx(HELD_BYTES, abs=NOISE_BYTES + 4 * P), "with or without the gradients"
    assert buffer["buffers"] == pytest.approx(without["buffers"] + 2**20, abs=NOISE_BYTES / 4)
    assert forward["gradients"] == 0
    one_output = 1024 * 8 * WIDTH * 4
    assert forward["activations"] >= 2 * one_output, "a layer's input and output at least, though no hook looked"


def moe_job() -> tuple[dict[str, int], int, int]:
    from tests.engine.small_model import Job, batches, train_steps
    from tests.engine.small_model import make_engine as make_moe_engine

    job = Job(world_size=2, ep_size=2, stage=1, bf16=True)
    engine = make_moe_engine(job)
    steps = batches(job)
    train_steps(engine, job, steps[:1])
    found = memory_breakdown(engine, lambda: train_steps(engine, job, steps[1:2]), CPU)
    experts = [p.numel() for p in engine.module.parameters() if not getattr(p, "allreduce", True)]
    return found, sum(p.numel() for p in engine.module.parameters()), sum(experts)


def test_experts_states_are_whole_where_no_other_rank_has_the_expert(pool: RankPool) -> None:
    for found, num_parameters, num_expert in pool.run(2, moe_job):
        assert 0 < num_expert < num_parameters
        assert found["weights"] == pytest.approx(2 * num_parameters, abs=64)
        states = 12 * ((num_parameters - num_expert) // 2 + num_expert)
        assert found["optimizer"] == pytest.approx(states, abs=256)
        assert found["gradients"] >= 2 * num_expert


def pipeline_job() -> dict[str, int]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo")
    loss = lambda y, target: ((y - target) ** 2).mean()  # noqa: E731
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
    model = PipelineModule(layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    engine = make_engine(model, stage(0, gradient_accumulation_steps=2))
    batch = (torch.ones(8, WIDTH), torch.zeros(8, WIDTH))
    engine.train_batch(iter([batch] * 2))
    return memory_breakdown(engine, lambda: engine.train_batch(iter([batch] * 2)), CPU)


def test_a_pipeline_stage_holds_its_half(pool: RankPool) -> None:
    for found in pool.run(2, pipeline_job):
        assert found["weights"] == found["gradients"] == 2 * P
        assert found["optimizer"] == 4 * P + STEP_COUNTERS // 2


def test_views_of_one_storage_count_once_and_tensors_are_found_at_any_depth() -> None:
    @dataclass
    class Box:
        inside: Any

    whole = torch.zeros(100)
    assert list(storages([whole[:10], whole[50:], whole]).values()) == [400]
    assert storages([torch.zeros(0), torch.empty(7, device="meta")]) == {}
    box = Box({"a": [(whole,)], torch.ones(3): {Box(None).inside}})
    box.inside["circle"] = box
    assert sorted(tensor.numel() for tensor in tensors_in(box)) == [3, 100]
    assert tensors_in([lambda: whole, torch, Tensor]) == [], "not what functions and modules hold"


def test_the_installed_deepspeed_has_the_names_that_are_counted_by() -> None:
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    runtime = Path(spec.origin).parent / "runtime"
    zero = (runtime / "zero" / "stage_1_and_2.py").read_text()
    sources = zero + (runtime / "bf16_optimizer.py").read_text()
    assert [name for name in (*seams.GRADIENTS, seams.BUCKETS) if f"self.{name}" not in sources] == []
    assert f"param.{seams.PARAMETER_GRADIENT}" in zero
    assert f"self.{seams.UNDER_WRAPPER} = init_optimizer" in zero
    engines = (runtime / "engine.py").read_text() + (runtime / "pipe" / "engine.py").read_text()
    assert [name for name in seams.BATCHES if f"self.{name}" not in engines] == []
