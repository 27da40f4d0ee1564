"""The package's layers under every door: the section is in force and the bias follows the steps of any engine."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import MoEError
from tests.ranks import RankPool

E, D, T = 4, 8, 8
BIAS = {"balance": "bias", "bias_step": 0.01}


class Net(nn.Module):
    """MoE layers in a row and a Linear behind them, with a loss that a test may spoil."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.leave = nn.Linear(D, D)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        balance = x.new_zeros(())
        for layer in self.layers:
            y, l_aux, _ = layer(x)
            x, balance = x + y, balance + l_aux
        return (self.leave(x).square().mean() + balance) * self.factor


def own_layer(**knobs: Any) -> Any:
    from ds_moe_ep import GeluMLP, MoE

    return MoE(D, GeluMLP(D, 16), config=MoEConfig(num_experts=E, ep_size=2, **knobs))


def deepspeeds_layer() -> Any:
    from deepspeed.moe.layer import MoE

    from ds_moe_ep import GeluMLP

    return MoE(D, GeluMLP(D, 16), num_experts=E, ep_size=2, k=1, drop_tokens=False, use_rts=False)


def ds_config(stage: int = 0, gas: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": T,
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # without ZeRO, the extensions' norm is another one than DeepSpeed's
        "steps_per_print": 10**9,
        **more,
    }


def plain_engine(*layers: nn.Module, seed: int = 0, **config: Any) -> Any:
    import deepspeed

    return deepspeed.initialize(model=seeded(seed, Net(*layers)), config=ds_config(**config))[0]


def seeded(seed: int, model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def tokens(index: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(10 * index + dist.get_rank()))


def steps_of(engine: Any, number: int = 0) -> list[int]:
    steps: list[int] = engine.module.layers[number].balance.steps_E.tolist()
    return steps


def train(engine: Any, num_micro_batches: int, factors: dict[int, float] | None = None) -> list[list[int]]:
    """The bias after each micro-batch; `factors` spoils the losses of some on rank 1."""
    seen = []
    dtype = next(engine.module.parameters()).dtype
    for index in range(num_micro_batches):
        engine.module.factor = (factors or {}).get(index, 1.0) if dist.get_rank() == 1 else 1.0
        engine.backward(engine(tokens(index).to(dtype)))
        engine.step()
        seen.append(steps_of(engine))
    return seen


def expected_steps(layer: Any, micro_batches: list[list[int]]) -> list[list[int]]:
    """Algorithm 1 by hand for a gate that does not move: all ranks' choices of each step's micro-batches, counted."""
    weight, steps, seen = layer.deepspeed_moe.gate.wg.weight, torch.zeros(E), []
    for indices in micro_batches:
        load = torch.zeros(E)
        for index in indices:
            for rank in range(2):
                x = torch.randn(T, D, generator=torch.Generator().manual_seed(10 * index + rank))
                scores = (x @ weight.float().t()).softmax(1) + 0.01 * steps
                load += torch.bincount(scores.argmax(1), minlength=E)
        steps += torch.sign(load.mean() - load)
        seen.append(steps.int().tolist())
    return seen


def with_still_gate(**config: Any) -> Any:
    layer = own_layer(top_k=1, **BIAS)
    layer.deepspeed_moe.gate.wg.weight.requires_grad_(False)
    return plain_engine(layer, **config)


def said() -> list[str]:
    """Lines of DeepSpeed's and the package's loggers from now on."""
    lines: list[str] = []
    for name in ("DeepSpeed", "ds_moe_ep.moe.balance"):
        logging.getLogger(name).addFilter(lambda record: lines.append(record.getMessage()) is None)
    return lines


def refusal(action: Any) -> str:
    try:
        action()
    except MoEError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def bias_cases() -> dict[str, Any]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for stage in (0, 1, 2):
        engine = with_still_gate(stage=stage)
        found[f"stage {stage}"] = train(engine, 4), expected_steps(engine.module.layers[0], [[0], [1], [2], [3]])
    engine = with_still_gate(gas=2)
    seen, expected = train(engine, 4), expected_steps(engine.module.layers[0], [[0, 1], [2, 3]])
    found["accumulated"] = seen, [[0] * E, expected[0], expected[0], expected[1]]
    engine = with_still_gate(stage=1, bf16={"enabled": True})
    seen = train(engine, 2, {1: math.nan})
    load = engine.module.layers[0].balance.load_E.sum().item()
    seen += train(engine, 1)
    found["skipped"] = seen, seen[1] == seen[0], engine.skipped_steps, load
    one, other = plain_engine(own_layer(**BIAS)), plain_engine(own_layer(**BIAS), seed=1)
    train(one, 2)
    found["of two engines"] = steps_of(one), steps_of(other), train(other, 2)[-1]
    one.destroy()
    found["after the other is gone"] = steps_of(other), train(other, 1)[-1]
    found["pipeline"] = one_stage_pipeline()
    return found


def one_stage_pipeline() -> tuple[int, bool]:
    """Optimizer steps of a pipeline engine, and whether the bias moved."""
    import deepspeed

    layer = own_layer(**BIAS)
    net = deepspeed.PipelineModule([Output(layer)], num_stages=1, loss_fn=lambda output, target: output.square().mean())
    engine = deepspeed.initialize(model=net, config=ds_config(stage=1))[0]
    for index in range(2):
        engine.train_batch(iter([(tokens(index), tokens(index))]))
    return engine.global_steps, any(layer.balance.steps_E.tolist())


class Output(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.fixture(scope="module")
def biases(pool: RankPool) -> dict[str, Any]:
    first, second = pool.run(2, bias_cases, timeout_s=150)
    assert first == second, "every rank has the same bias"
    return first


@pytest.mark.parametrize("name", ["stage 0", "stage 1", "stage 2", "accumulated"])
def test_the_bias_follows_the_steps_of_a_plain_engine_as_computed_by_hand(name: str, biases: dict[str, Any]) -> None:
    seen, expected = biases[name]
    assert seen == expected and seen[-1] != [0] * E


def test_a_skipped_step_moves_no_bias_and_forgets_its_load(biases: dict[str, Any]) -> None:
    seen, is_unmoved, num_skipped, load = biases["skipped"]
    assert is_unmoved and (num_skipped, load) == (1, 0)
    assert seen[0] != [0] * E and seen[2] != seen[1]


def test_each_of_several_engines_moves_its_own_bias(biases: dict[str, Any]) -> None:
    one, untouched, other = biases["of two engines"]
    assert any(one) and not any(untouched) and any(other)
    before, after = biases["after the other is gone"]
    assert before == other and after != before


def test_the_bias_moves_in_a_pipeline_engine_of_one_stage(biases: dict[str, Any]) -> None:
    assert biases["pipeline"] == (2, True)


def section_cases() -> dict[str, Any]:
    import deepspeed

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    lines, found = said(), {}
    section = {"top_k": 2, "schedule": "chunks", "chunks": 3, "depth": 1, **BIAS, "meter_every": 1}
    engine = plain_engine(own_layer(), own_layer(), moe_ep=section)
    layer = engine.module.layers[1]
    found["knobs"] = [getattr(layer.config, name) for name in section], layer.dispatcher.name
    found["schedule"] = str(layer.dispatcher.connection.forward)
    train(engine, 2)
    found["said"] = [line for line in lines if "meter_every" in line]
    for name, more in {
        "misspelt knob": {"moe_ep": {"epsize": 7}},
        "misspelt section": {"moe-ep": {}},
        "another ep_size": {"moe_ep": {"ep_size": 1}},
        "on one rank": {"moe_ep": {"shedule": "serial"} if dist.get_rank() == 1 else {}},
    }.items():
        found[name] = refusal(lambda more=more: plain_engine(own_layer(), **more))
    layer = own_layer(**BIAS)
    ds_moe_ep.initialize(model=Net(layer), config=ds_config(moe_ep={"top_k": 2}))
    found["our door"] = layer.config.top_k
    return found


def test_a_section_is_in_force_under_plain_deepspeed_initialize(pool: RankPool) -> None:
    first, second = pool.run(2, section_cases, timeout_s=120)
    for found in (first, second):
        assert found["knobs"] == ([2, "chunks", 3, 1, "bias", 0.01, 1], "layers.1")
        assert found["schedule"] == "D0 D1 E0 C0 D2 E1 C1 E2 C2"
        assert "did you mean 'ep_size'" in found["misspelt knob"]
        assert "did you mean 'moe_ep'" in found["misspelt section"]
        assert "moe_ep (layers.0).ep_size=1: the layer was made with ep_size=2" in found["another ep_size"]
        assert "moe_ep.shedule='serial': unknown key; did you mean 'schedule'" in found["on one rank"], "on every rank"
        assert found["our door"] == 2
    (line,) = first["said"]
    assert "moe_ep.meter_every=1" in line and "attach_overlap(engine)" in line and not second["said"]


def loop_without_an_engine(is_stepped: bool) -> tuple[list[str], list[int]]:
    """Lines of three steps of a loop of the user's own, and the bias after them."""
    from ds_moe_ep import ExpertParallel, GeluMLP

    lines = said()
    layer = ExpertParallel(D, GeluMLP(D, 16), MoEConfig(num_experts=E, **BIAS))
    optimizer = torch.optim.Adam(layer.parameters())
    for _ in range(3):
        for _ in range(2):  # micro-batches
            layer(torch.randn(T, D))[0].square().mean().backward()
        optimizer.step()
        if is_stepped:
            layer.gate.balance.step(lambda load_E: load_E)
    return lines, layer.gate.balance.steps_E.tolist()


def test_a_loop_that_never_steps_the_bias_is_told_once_and_one_that_does_is_not() -> None:
    lines, steps = loop_without_an_engine(is_stepped=False)
    assert len(lines) == 1 and "layer.gate.balance.step(sum_over_ranks)" in lines[0] and not any(steps)
    lines, steps = loop_without_an_engine(is_stepped=True)
    assert not lines and any(steps)
