"""Cases of one MoE layer: their data, what a rank computes for them, and how far that is from the reference.

A case's weights, inputs and output gradients depend on its name alone, so ranks and parent draw the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from tests.reference import Expert, gelu_expert, moe_reference, swiglu_expert

D, F = 16, 32  # width of a token, inner width of an expert
Weights = dict[str, Tensor]


class OddExpert(nn.Module):
    """An expert that is none of ours: a norm, an own parameter, a nonlinearity that is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.lift = nn.Linear(D, F)
        self.scale = nn.Parameter(torch.ones(D))
        self.lower = nn.Linear(F, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lower(torch.cos(self.lift(self.norm(x))))


EXPERT_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "gelu": {"fc1.weight": (F, D), "fc2.weight": (D, F)},
    "gelu_bias": {"fc1.weight": (F, D), "fc1.bias": (F,), "fc2.weight": (D, F), "fc2.bias": (D,)},
    "swiglu": {"gate.weight": (F, D), "up.weight": (F, D), "down.weight": (D, F)},
    "swiglu_bias": {
        "gate.weight": (F, D), "gate.bias": (F,), "up.weight": (F, D), "up.bias": (F,), "down.weight": (D, F),
        "down.bias": (D,),
    },
    "swiglu_odd": {"gate.weight": (23, D), "up.weight": (23, D), "down.weight": (D, 23)},
    "module": {
        "norm.weight": (D,), "norm.bias": (D,), "lift.weight": (F, D), "lift.bias": (F,), "scale": (D,),
        "lower.weight": (D, F),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer in one world. `rows[r]` is rank r's number of tokens; expert-parallel groups are consecutive ranks."""

    name: str
    config: MoEConfig
    rows: tuple[int, ...]
    expert: str = "gelu"
    dtype: torch.dtype = torch.float32
    shared: bool = False  # an expert of the same kind that every token visits
    masked: bool = False  # a used_token mask that leaves out about a third
    training: bool = True
    gate_scale: float = 0.3  # spread of the gate's weights; logits spread 4 times as much
    skew: float = 0.0  # added to one expert's logits through a constant input column: it draws the rows
    bound: float = 1e-6

    @property
    def world_size(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> list[list[int]]:
        size = self.config.ep_size
        return [list(range(i, i + size)) for i in range(0, self.world_size, size)]

    def with_config(self, **knobs: Any) -> LayerCase:
        """The same data under other knobs."""
        return replace(self, config=replace(self.config, **knobs))


@dataclass(frozen=True)
class CaseData:
    """Inputs of a case, for the whole world."""

    gate_ED: Tensor
    experts: list[Weights]
    shared: Weights
    inputs: list[Tensor]
    output_grads: list[Tensor]
    used_tokens: list[Tensor] | None
    bias_steps_E: Tensor  # of the expert bias, where balance is "bias"


@dataclass
class LayerResult:
    """Results of one rank, or of the reference for one rank."""

    output: Tensor
    l_aux: Tensor
    exp_counts: list[int]
    input_grad: Tensor
    gate_grad: Tensor
    expert_grads: dict[int | str, Weights] = field(default_factory=dict)  # by global index, or "shared"


def case_data(case: LayerCase) -> CaseData:
    """The case's tensors in its dtype (the gate too), drawn from its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype)

    gate = draw(case.config.num_experts, D, scale=case.gate_scale)
    if case.skew:
        gate[:, 0] = 0
        gate[-1, 0] = case.skew
    *experts, shared = [
        {name: draw(*shape, scale=shape[-1] ** -0.5) for name, shape in EXPERT_SHAPES[case.expert].items()}
        for _ in range(case.config.num_experts + 1)
    ]
    inputs = [draw(rows, D) for rows in case.rows]
    if case.skew:
        for x in inputs:
            x[:, 0] = 1
    grads = [draw(rows, D, scale=0.1) for rows in case.rows]
    used = [(torch.rand(rows, generator=generator) < 0.7) for rows in case.rows] if case.masked else None
    bias_steps = torch.randint(-200, 200, (case.config.num_experts,), generator=generator)
    return CaseData(gate, experts, shared, inputs, grads, used, bias_steps)


def make_expert(kind: str) -> nn.Module:
    """The template of a case's experts."""
    if kind == "module":
        return OddExpert()
    from ds_moe_ep.moe.experts import GeluMLP, SwiGLU

    cls = GeluMLP if kind.startswith("gelu") else SwiGLU
    return cls(D, inner_width(kind), bias=kind.endswith("bias"))


def inner_width(kind: str) -> int:
    return next(iter(EXPERT_SHAPES[kind].values()))[0]


def expert_function(kind: str, weights: Weights) -> Expert:
    """The same expert for the reference."""
    if kind == "module":
        module = OddExpert().to(weights["scale"].dtype)
        return lambda rows: torch.func.functional_call(module, weights, (rows,))
    return gelu_expert(weights) if kind.startswith("gelu") else swiglu_expert(weights)


def reference_results(
    case: LayerCase,
    dtype: torch.dtype = torch.float64,
    make: Callable[[str, Weights], Expert] = expert_function,
) -> list[LayerResult]:
    """Results that every rank should see. Gradients of gate and experts stand summed in the first one.

    The gate computes in float64 always; experts, which `make` makes, and rows in `dtype`.
    """
    data = case_data(case)
    gate = data.gate_ED.double().requires_grad_()
    weights: dict[int | str, Weights] = dict(enumerate(_leaves(w, dtype) for w in data.experts))
    functions = [make(case.expert, w) for w in weights.values()]
    inputs = [x.to(dtype).requires_grad_() for x in data.inputs]
    bias = data.bias_steps_E * case.config.bias_step if case.config.balance == "bias" else None
    shards = moe_reference(case.config, gate, functions, inputs, data.used_tokens, bias, case.training)
    outputs = [shard.output_TD for shard in shards]
    if case.shared:
        weights["shared"] = _leaves(data.shared, dtype)
        outputs = [y + make(case.expert, weights["shared"])(x) for y, x in zip(outputs, inputs, strict=True)]
    for output, shard, grad in zip(outputs, shards, data.output_grads, strict=True):
        ((output * grad.to(dtype)).sum().double() + shard.l_aux).backward(retain_graph=True)
    results = [
        LayerResult(output.detach(), shard.l_aux.detach(), shard.exp_counts_E, _grad(x), torch.zeros_like(gate))
        for output, shard, x in zip(outputs, shards, inputs, strict=True)
    ]
    results[0].gate_grad = _grad(gate)
    results[0].expert_grads = {e: {name: _grad(w) for name, w in leaves.items()} for e, leaves in weights.items()}
    return results


def _leaves(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: w.to(dtype).requires_grad_() for name, w in weights.items()}


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def summed(results: Sequence[LayerResult]) -> dict[str, Tensor]:
    """Named tensors of the whole world: parameters' gradients are summed over the ranks."""
    named = {f"y[{rank}]": r.output for rank, r in enumerate(results)}
    named |= {f"dx[{rank}]": r.input_grad for rank, r in enumerate(results)}
    named |= {f"l_aux[{rank}]": r.l_aux for rank, r in enumerate(results)}
    named["d gate"] = torch.stack([r.gate_grad.double() for r in results]).sum(0)
    for result in results:
        for expert, weights in result.expert_grads.items():
            for name, grad in weights.items():
                key = f"d expert {expert} {name}"
                named[key] = named[key] + grad.double() if key in named else grad.double()
    return named


def errors(results: Sequence[LayerResult], expected: Sequence[LayerResult]) -> dict[str, float]:
    """For each tensor its largest difference over the largest expected value of its kind.

    The largest value, not each element's own: an element that cancels to nearly zero carries the rounding of its
    large terms. Weight gradients are measured against the largest of their name over all experts.
    """
    found, wanted = summed(results), summed(expected)
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())
    scale: dict[str, float] = {}
    for name, tensor in wanted.items():
        scale[_kind(name)] = max(scale.get(_kind(name), 0.0), _largest(tensor))
    worst = {}
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, f"{name}: {found[name].shape} is not {tensor.shape}"
        difference = _largest(found[name].double() - tensor.double())
        worst[name] = difference / scale[_kind(name)] if difference else 0.0
        worst[name] = worst[name] if worst[name] == worst[name] else float("inf")
    return worst


def _kind(name: str) -> str:
    return name.split()[-1] if name.startswith("d expert") else name.split("[")[0]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
