"""DeepSpeed's own MoE layer on a layer case: the second opinion beside the float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.moe.layer_cases import CaseData, D, F, LayerCase, LayerResult, OddExpert, case_data

GATE = "deepspeed_moe.gate.wg.weight"


class PlainGelu(nn.Module):
    """The GELU expert in torch's own pieces."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, F, bias=bias)
        self.fc2 = nn.Linear(F, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class PlainSwiGLU(nn.Module):
    """The SwiGLU expert in torch's own pieces."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, F, bias=bias)
        self.up = nn.Linear(D, F, bias=bias)
        self.down = nn.Linear(F, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def plain_expert(kind: str) -> nn.Module:
    """The template of a case's experts, without our package."""
    if kind == "module":
        return OddExpert()
    return (PlainGelu if kind.startswith("gelu") else PlainSwiGLU)(kind.endswith("bias"))


def native_arguments(case: LayerCase) -> dict[str, object]:
    """DeepSpeed's constructor arguments for the case's routing, without anything random."""
    config = case.config
    drops = config.capacity_factor is not None
    assert config.drop_policy == ("score" if config.top_k > 2 else "position") or not drops, "native has no choice"
    return {
        "num_experts": config.num_experts,
        "ep_size": config.ep_size,
        "k": config.top_k,
        "capacity_factor": config.capacity_factor if drops else 1.0,
        "min_capacity": config.min_capacity,
        "drop_tokens": drops,
        "use_rts": False,
        "top2_2nd_expert_sampling": False,
    }


def native_layer(case: LayerCase, **arguments: object) -> nn.Module:
    """DeepSpeed's layer with the case's weights and process groups. Collective."""
    from deepspeed.moe.layer import MoE

    layer = MoE(D, plain_expert(case.expert), **(native_arguments(case) | arguments))
    layer.set_deepspeed_parallelism()
    fill(layer, case, case_data(case))
    return layer.to(case.dtype)


def fill(layer: nn.Module, case: LayerCase, data: CaseData) -> None:
    """Gives gate and local experts of a layer in DeepSpeed's layout the case's weights.

    What a residual layer has beside them gets the shared expert's weights, and numbers from a fixed seed.
    """
    generator = torch.Generator().manual_seed(7)
    first = dist.get_rank() % case.config.ep_size * case.config.num_local_experts
    with torch.no_grad():
        layer.get_parameter(GATE).copy_(data.gate_ED)
        for local in range(case.config.num_local_experts):
            for name, weight in data.experts[first + local].items():
                key = f"deepspeed_moe.experts.deepspeed_experts.{local}.{name}"
                layer.get_parameter(key).copy_(weight)
        for name, parameter in layer.named_parameters():
            if name.startswith("mlp."):
                parameter.copy_(data.shared[name.removeprefix("mlp.")])
            elif name.startswith("coefficient."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def run_layer(layer: nn.Module, case: LayerCase) -> LayerResult:
    """Forward and backward of a layer in DeepSpeed's layout on this rank's shard."""
    data, rank = case_data(case), dist.get_rank()
    layer.train(case.training)
    x = data.inputs[rank].clone().requires_grad_()
    used = data.used_tokens[rank] if data.used_tokens is not None else None
    output, l_aux, counts = layer(x.view(2, -1, D), used)
    output = output.view_as(x)
    ((output * data.output_grads[rank]).sum() + l_aux).backward()
    first = rank % case.config.ep_size * case.config.num_local_experts
    grads: dict[int | str, dict[str, Tensor]] = {first + e: {} for e in range(case.config.num_local_experts)}
    for key, parameter in layer.named_parameters():
        if "deepspeed_experts." in key:
            local, name = key.split("deepspeed_experts.")[1].split(".", 1)
            grads[first + int(local)][name] = _grad(parameter)
        elif key != GATE:
            grads.setdefault("dense", {})[key] = _grad(parameter)
    gate = layer.get_parameter(GATE)
    return LayerResult(output.detach(), l_aux.detach(), counts.tolist(), _grad(x), _grad(gate), grads)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().clone()


def our_layer(case: LayerCase, **arguments: object) -> nn.Module:
    """Our layer made with DeepSpeed's own arguments, with the case's weights and process groups. Collective."""
    from ds_moe_ep import MoE

    layer = MoE(D, plain_expert(case.expert), **(native_arguments(case) | arguments))
    layer.set_deepspeed_parallelism()
    fill(layer, case, case_data(case))
    return layer.to(case.dtype)


@contextlib.contextmanager
def first_of_equals() -> Iterator[None]:
    """Lets torch.topk choose the first of equal integers.

    Without random selection DeepSpeed's top-1 gate drops rows by topk over a mask of ones, which leaves the choice
    among them to the library: another one for other sizes. By position is what it means.
    """
    topk = torch.topk

    def stable(x: Tensor, k: int, dim: int = -1, **options: bool) -> tuple[Tensor, Tensor]:
        if x.is_floating_point():
            return topk(x, k, dim=dim, **options)
        values, indices = x.sort(dim=dim, descending=True, stable=True)
        return values.narrow(dim, 0, int(k)), indices.narrow(dim, 0, int(k))

    torch.topk = stable
    try:
        yield
    finally:
        torch.topk = topk
