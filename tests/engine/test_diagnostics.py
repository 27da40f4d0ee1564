"""DeepSpeed's diagnostics see the layers: its breakdown of times, its flops profiler, and what programs read."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.face import LayerFace
from ds_moe_ep.moe.experts import GeluMLP
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.small_model import Job, batches, make_model
from tests.moe.layer_cases import D, F
from tests.ranks import RankPool

SIDES = (("ours", False), ("native", True))
ACCUMULATION = 2


def started(layer: str, **section: Any) -> tuple[Any, Job]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    job = Job(layer=layer, world_size=2, ep_size=2, num_experts=4, accumulation=ACCUMULATION)
    model = make_model(job)
    config = {"wall_clock_breakdown": False, **job.ds_config, **section}
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0], job


def step(engine: Any, job: Job, index: int) -> None:
    for x, target in batches(job)[index]:
        engine.backward(engine(x[dist.get_rank()], target[dist.get_rank()]))
        engine.step()


def breakdown(layer: str, is_hooked: bool, **section: Any) -> list[dict[str, float]]:
    """Times that the engine prints of each step: (fwd_moe, 1st_a2a, 2nd_a2a, top_k, fwd)."""
    engine, job = started(layer, **section)
    printed: list[dict[str, float]] = []

    def note(fwd_time: float) -> None:
        layers, gates = engine.moe_layers, engine.gate_modules
        assert len(layers) == len(gates) == 2
        moe, first, second = (sum(getattr(m, f"time_{n}") for m in layers) for n in ("moe", "falltoall", "salltoall"))
        top_k = sum(gate.gate_time for gate in gates)
        printed.append({"fwd": fwd_time, "moe": moe, "first": first, "second": second, "top_k": top_k})

    engine.print_forward_breakdown = note
    with hooked(engine, schedule="peers") if is_hooked else contextlib.nullcontext():
        for index in range(3):
            step(engine, job, index)
    if not section:  # nobody printed; nothing may have been recorded either
        assert not printed
        note(0.0)
    return printed


def breakdowns() -> list[tuple[bool, list[dict[str, float]], list[dict[str, float]]]]:
    on = {"wall_clock_breakdown": True}
    return [(is_hooked, breakdown(layer, is_hooked, **on), breakdown(layer, is_hooked)) for layer, is_hooked in SIDES]


def test_the_breakdown_tells_the_times_of_one_step_and_nothing_is_recorded_without_it(pool: RankPool) -> None:
    for found in pool.run(2, breakdowns, timeout_s=120):
        for is_hooked, printed, off in found:
            assert len(printed) == 3
            for times in printed:
                assert 0 < times["moe"] < times["fwd"], "a step's own passes, not those since the start"
                assert 0 < times["first"] + times["second"] < times["moe"]
                assert times["top_k"] > 0
                assert is_hooked or times["top_k"] < times["moe"]
            assert not any(off[0].values())


def flops(layer: str, is_hooked: bool) -> tuple[dict[str, int], list[int]]:
    """The profiler's flops by module on rank 0, and the rows that each of its experts got in that pass."""
    engine, job = started(layer)
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    with hooked(engine, schedule="peers") if is_hooked else contextlib.nullcontext():
        x, target = (each[dist.get_rank()] for each in batches(job)[0][0])
        with torch.no_grad():
            engine.module(x, target)
        counts_E = [m.exp_counts.clone() for m in engine.moe_layers]
        for counts in counts_E:
            dist.all_reduce(counts)
        profiler = FlopsProfiler(engine.module)
        profiler.start_profile()
        with torch.no_grad():
            engine.module(x, target)
        found = {name: module.__flops__ for name, module in engine.module.named_modules()}
        profiler.end_profile()
        with torch.no_grad():
            engine.module(x, target)
    first = dist.get_rank() * 2
    return found, [int(n) for counts in counts_E for n in counts[first : first + 2]]


def all_flops() -> list[tuple[dict[str, int], list[int]]]:
    return [flops(layer, is_hooked) for layer, is_hooked in SIDES]


def test_the_flops_profiler_counts_what_each_expert_computes(pool: RankPool) -> None:
    """A product with F times D weights is 2*F*D flops per row; the two layers' experts stand one after the other."""
    for found in pool.run(2, all_flops, timeout_s=120):
        for by_name, rows in found:
            per_layer = [f"layers.{i}.deepspeed_moe.experts.deepspeed_experts.{e}" for i in (0, 1) for e in (0, 1)]
            for name, num_rows in zip(per_layer, rows, strict=True):
                assert by_name[f"{name}.fc1"] == by_name[f"{name}.fc2"] == 2 * num_rows * D * F
            assert sum(rows) > 0


def layer_of(**knobs: Any) -> Any:
    return LayerFace(D, GeluMLP(D, F), MoEConfig(num_experts=4, **knobs))


def test_programs_read_the_true_knobs_of_a_gate() -> None:
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    layer = layer_of(top_k=1, capacity_factor=1.5, eval_capacity_factor=2.0, drop_policy="random", noise="jitter")
    gate = layer.gate
    assert isinstance(layer, MOELayer) and isinstance(gate, TopKGate) and isinstance(layer, nn.Module)
    assert (gate.k, gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity) == (1, 1.5, 2.0, 4)
    assert (gate.drop_tokens, gate.use_rts, gate.top2_2nd_expert_sampling) == (True, True, False)
    assert (gate.noisy_gate_policy, gate.ep_group, layer.ep_group, gate.gate_time) == ("Jitter", None, None, 0.0)
    assert (layer.ep_size, layer.num_local_experts, layer.ep_group_name, layer.use_tutel) == (1, 4, "ep_size_1", False)
    x = torch.randn(8, D)
    _, l_aux, counts = layer(x)
    assert layer.l_aux is l_aux and layer.exp_counts is counts
    assert list(layer.state_dict()) == ["gate.wg.weight", *(f"experts.{n}" for n in layer.experts.state_dict())]


def test_a_knob_without_a_meaning_is_an_error_that_says_why_and_none_can_be_set_here() -> None:
    gate = layer_of(top_k=2).gate
    assert not gate.drop_tokens
    assert not hasattr(gate, "capacity_factor")
    with pytest.raises(AttributeError, match="no token is dropped"):
        gate.capacity_factor  # noqa: B018
    with pytest.raises(AttributeError, match=r"MoE\.configure"):
        gate.k = 1
    with pytest.raises(AttributeError, match="nothing_like_it"):
        gate.nothing_like_it  # noqa: B018
