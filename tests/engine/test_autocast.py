"""The layer inside of torch.autocast: equal to plain loops over the same modules, and to DeepSpeed's own layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.schedule.placement import Placement
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.native_layers import PlainGelu, PlainSwiGLU
from tests.moe.layer_cases import D, OddExpert
from tests.ranks import RankPool

TOKENS = 24
ROUNDING = 2**-7  # two roundings to bf16, of the largest value
NUM_EXPERTS = 4


class EndsWide(nn.Module):
    """An expert whose last step autocast leaves in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class EndsNarrow(OddExpert):
    """An expert of unknown mathematics that ends in a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(torch.cos(self.lift(x * self.scale)))


EXPERTS: dict[str, type[nn.Module]] = {
    "gelu": lambda: PlainGelu(bias=True),
    "swiglu": lambda: PlainSwiGLU(bias=False),
    "ends narrow": EndsNarrow,
    "ends wide": EndsWide,
}


@dataclass(frozen=True)
class Case:
    """One layer under autocast."""

    expert: str
    top_k: int = 2
    schedule: str = "peers"
    capacity_factor: float | None = None
    shared: bool = False
    residual: bool = False
    recompute: bool = False
    input_dtype: torch.dtype = torch.float32
    autocast: torch.dtype = torch.bfloat16
    replicas: int = 0

    @property
    def config(self) -> MoEConfig:
        knobs: dict[str, Any] = {"chunks": 3} if self.schedule == "chunks" else {}
        factor = self.capacity_factor
        capacity = {"capacity_factor": factor, "eval_capacity_factor": factor, "drop_policy": "position"}
        return MoEConfig(
            num_experts=NUM_EXPERTS, ep_size=2, top_k=self.top_k, schedule=self.schedule, **knobs,
            replicas=self.replicas, **(capacity if factor else {}),
        )  # fmt: skip


CASES = [
    *(Case(expert, schedule=schedule) for expert in EXPERTS for schedule in ("serial", "peers", "chunks")),
    *(Case(expert, top_k=1, input_dtype=torch.bfloat16, recompute=True) for expert in EXPERTS),
    *(Case(expert, shared=True, residual=True) for expert in ("gelu", "ends narrow")),
    Case("swiglu", capacity_factor=4.0, recompute=True),
    Case("gelu", autocast=torch.float16, top_k=1),
    Case("gelu", replicas=1),
    Case("swiglu", schedule="chunks", shared=True, recompute=True, replicas=1),
]


def our_layer(case: Case, connected: bool = True, bit_equal: bool = False) -> nn.Module:
    """The layer with weights that depend on each expert's global index alone. Collective."""
    from ds_moe_ep import MoE

    torch.manual_seed(0)
    shared = EXPERTS[case.expert]() if case.shared else None
    config = dataclasses.replace(case.config, bit_equal=bit_equal)
    layer = MoE(D, EXPERTS[case.expert](), config=config, use_residual=case.residual, shared=shared)
    if connected:
        layer.set_deepspeed_parallelism()
        have_copies(layer)
    fill(layer, dist.get_rank() * NUM_EXPERTS // 2)
    return layer


def have_copies(layer: nn.Module) -> None:
    """Lets each rank's slot, where there are some, have the other's first expert."""
    if (replicas := layer.deepspeed_moe.dispatcher.replicas) is not None:
        replicas.choose = replicas.choose_anew = lambda rows_E, before: Placement(2, 2, 1, ((2,), (0,)))


def fill(layer: nn.Module, first: int) -> None:
    """The gate's weights, far enough apart for a gate in bf16 to choose alike, and those of experts from `first` on."""
    moe = layer.deepspeed_moe
    with torch.no_grad():
        moe.gate.wg.weight.copy_(torch.randn(NUM_EXPERTS, D, generator=torch.Generator().manual_seed(5)) / 2)
    for index, expert in enumerate(moe.experts.deepspeed_experts, first):
        redraw(expert, index)


def redraw(expert: nn.Module, index: int) -> None:
    generator = torch.Generator().manual_seed(100 + index)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * D**-0.5)


def inputs(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(TOKENS, D, generator=generator).to(case.input_dtype) for _ in range(2)]


def run(case: Case, layer: nn.Module, autocast: bool = True) -> dict[str, Tensor]:
    """Output and gradients of this rank's tokens."""
    layer.zero_grad()
    x = inputs(case)[dist.get_rank()].clone().requires_grad_()
    with torch.autocast("cpu", dtype=case.autocast, enabled=autocast):
        answer = checkpoint(layer, x, use_reentrant=False) if case.recompute else layer(x)
    answer[0].float().square().sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": answer[0].detach(), "x": x.grad, **grads}


def looped(case: Case, layer: nn.Module, autocast: bool = True) -> dict[str, Tensor]:
    """The same of a loop over plain modules, on this rank's tokens; expert gradients are summed over both ranks'."""
    experts = []
    for index in range(NUM_EXPERTS):
        experts.append(EXPERTS[case.expert]())
        redraw(experts[-1], index)
    layer.zero_grad()
    outputs, xs = [], [x.clone().requires_grad_() for x in inputs(case)]
    for x in xs:
        routing = layer.deepspeed_moe.gate(x)
        with torch.autocast("cpu", dtype=case.autocast, enabled=autocast):
            all_TED = torch.stack([expert(x) for expert in experts], 1)
            picked = all_TED.gather(1, routing.expert_ids_TK.unsqueeze(-1).expand(-1, -1, D))
            y = (picked.float() * routing.weights_TK.unsqueeze(-1)).sum(1).to(all_TED.dtype)
            if layer.deepspeed_moe.shared is not None:
                y = y + layer.deepspeed_moe.shared(x)
            if layer.use_residual:
                share = layer.coefficient(x).softmax(-1)
                y = y * share[:, :1] + layer.mlp(x) * share[:, 1:]
        outputs.append(y)
        y.float().square().sum().backward()
    rank, first = dist.get_rank(), dist.get_rank() * NUM_EXPERTS // 2
    grads = {
        f"deepspeed_moe.experts.deepspeed_experts.{local}.{name}": p.grad
        for local in range(NUM_EXPERTS // 2)
        for name, p in experts[first + local].named_parameters()
    }
    return {"output": outputs[rank].detach(), "x": xs[rank].grad, **grads}


def distances(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of what both have, over the largest value; infinite where types differ."""
    return {
        name: float((mine[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6))
        if mine[name].dtype == value.dtype
        else float("inf")
        for name, value in theirs.items()
        if name in mine and value is not None
    }


def against_loops() -> list[tuple[str, dict[str, float], float]]:
    """Each case's distances from the loop under autocast, and its output's from the loop without: the control."""
    found = []
    for case in CASES:
        layer = our_layer(case)
        mine = run(case, layer)
        apart = looped(case, layer, autocast=False)["output"] if case.input_dtype == torch.float32 else None
        control = 1.0 if apart is None else float((mine["output"].float() - apart).abs().max())
        found.append((str(case), distances(mine, looped(case, layer)), control))
    return found


def test_layers_under_autocast_equal_loops_over_their_experts(pool: RankPool) -> None:
    for found in pool.run(2, against_loops, timeout_s=120):
        for case, distance, control in found:
            assert len(distance) >= 4, case
            assert max(distance.values()) <= 2 * ROUNDING, (case, distance)
            assert control > 1e-4, f"{case}: not computed in the autocast type"


def native_layer(case: Case, connected: bool = True) -> nn.Module:
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    layer = MoE(
        D, EXPERTS[case.expert](), num_experts=NUM_EXPERTS, ep_size=2, k=case.top_k, drop_tokens=False, use_rts=False,
        top2_2nd_expert_sampling=False, use_residual=case.residual,
    )  # fmt: skip
    if connected:
        layer.set_deepspeed_parallelism()
    fill(layer, dist.get_rank() * NUM_EXPERTS // 2)
    return layer


def against_native() -> list[tuple[str, dict[str, float]]]:
    """Distances of the package's layer, and of the hooked one, from DeepSpeed's."""
    found = []
    for expert in EXPERTS:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(expert, residual=dtype == torch.float32, input_dtype=dtype)
            native = native_layer(case)
            theirs = run(case, native)
            theirs = {name: value.clone() for name, value in theirs.items()}
            found.append((f"own {case}", distances(run(case, our_layer(case)), theirs)))
            with hooked(native, schedule="peers"):
                found.append((f"hooked {case}", distances(run(case, native), theirs)))
    return found


def test_layers_under_autocast_equal_deepspeeds_own_in_values_and_types(pool: RankPool) -> None:
    """Its gate computes logits in the autocast type: its weights differ by roundings of these."""
    for found in pool.run(2, against_native, timeout_s=120):
        for case, distance in found:
            assert {"output", "x", "deepspeed_moe.gate.wg.weight"} <= set(distance), case
            assert max(distance.values()) <= 8 * ROUNDING, (case, distance)


def schedules() -> list[str]:
    """Cases in which a schedule gives other bits under autocast than the serial one."""
    wrong = []
    for expert in ("gelu", "swiglu"):
        serial = run(Case(expert, schedule="serial"), our_layer(Case(expert, schedule="serial"), bit_equal=True))
        for schedule in ("peers", "chunks"):
            case = Case(expert, schedule=schedule)
            found = run(case, our_layer(case, bit_equal=True))
            wrong += [f"{case}: {name}" for name, value in serial.items() if not torch.equal(found[name], value)]
    return wrong


def test_every_schedule_gives_the_same_bits_under_autocast(pool: RankPool) -> None:
    assert pool.run(2, schedules) == [[]] * 2


class Model(nn.Module):
    def __init__(self, case: Case, make: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter, self.moe = nn.Linear(D, D), make(case, connected=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.moe(self.enter(x))[0].float() - x).square().mean()


def trained(stage: int, dtype: str, make: Any, hook: bool = False, replicas: int = 0) -> list[float]:
    """Losses of steps with DeepSpeed's torch_autocast section."""
    import contextlib

    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": TOKENS,
        "optimizer": {"type": "Adam", "params": {"lr": 0.02, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "torch_autocast": {"enabled": True, "dtype": dtype},
    }
    model = Model(Case("gelu", replicas=replicas), make)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    if replicas:
        have_copies(model.moe)
    losses = []
    with hooked(engine, schedule="peers") if hook else contextlib.nullcontext():
        for _ in range(4):
            loss = engine(inputs(Case("gelu"))[dist.get_rank()])
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    assert not replicas or model.moe.deepspeed_moe.dispatcher.replicas.placement.copies
    return losses


def sections() -> list[tuple[list[float], ...]]:
    return [
        (
            trained(stage, "bfloat16", native_layer),
            trained(stage, "bfloat16", our_layer),
            trained(stage, "bfloat16", native_layer, hook=True),
            trained(stage, "bfloat16", our_layer, replicas=1),
        )
        for stage in (0, 1, 2)
    ]


def test_deepspeeds_torch_autocast_section_trains_as_its_own_layer_does(pool: RankPool) -> None:
    for found in pool.run(2, sections, timeout_s=120):
        for native, *ours in found:
            assert native[-1] < 0.9 * native[0], "it learns"
            for mine in ours:
                assert max(abs(a - b) for a, b in zip(mine, native, strict=True)) <= ROUNDING * native[0]


def refusals() -> Iterator[str]:
    layer = our_layer(Case("gelu"))
    for x, scope in (
        (torch.randn(4, D, dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)),
        (torch.randn(4, D, dtype=torch.float64), torch.autocast("cpu")),
        (torch.ones(4, D, dtype=torch.int64), torch.autocast("cpu")),
    ):
        from ds_moe_ep.errors import ConfigError

        try:
            with scope:
                layer(x)
        except ConfigError as error:
            yield str(error)


def test_types_that_nobody_casts_are_refused(pool: RankPool) -> None:
    for errors in pool.run(2, all_refusals):
        assert [error.split(":")[0] for error in errors] == [
            f"input.dtype={dtype}" for dtype in (torch.bfloat16, torch.float64, torch.int64)
        ]


def all_refusals() -> list[str]:
    return list(refusals())


def test_experts_are_recognised_in_this_file() -> None:
    """The cases cover both ways through the experts."""
    from ds_moe_ep.moe.match_expert import match_expert

    kinds = {name: match_expert(make()) is not None for name, make in EXPERTS.items()}
    assert kinds == {"gelu": True, "swiglu": True, "ends narrow": False, "ends wide": False}
    assert match_expert(GeluMLP(D, D)) and match_expert(SwiGLU(D, D))
