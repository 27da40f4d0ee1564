"""The layer's gradients equal central differences in float64, on two ranks.

torch.autograd.gradcheck cannot be used: ranks must call the layer equally often, and a rank's output depends on the
other's input. So all ranks step together, each along a random direction of its own in its tensor of one name, and
compare the change of the world's loss with the gradients along them. The step of 1e-6 leaves a truncation error near
1e-12 and a rounding error near 1e-10 of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.moe.layer import ExpertParallel
from tests.moe.layer_cases import CaseData, D, F, LayerCase, case_data
from tests.moe.layer_runs import Links, build_layer, config, torus_for
from tests.ranks import RankPool

STEP = 1e-6
TOLERANCE = 1e-6

ALL = [
    LayerCase(
        name=f"gradcheck {kind} {knobs}",
        config=config(num_experts=4, ep_size=2, z_loss_weight=0.1, **knobs),
        rows=(7, 7) if "capacity_factor" in knobs else (7, 4),
        expert=kind,
        shared=kind == "gelu",
        dtype=torch.float64,
    )
    for kind in ("gelu", "gelu_bias", "swiglu_bias", "module")
    for knobs in (
        {"top_k": 1},
        {"top_k": 2, "schedule": "peers", "row_cuts": 2},
        {"top_k": 3, "score": "sigmoid", "schedule": "chunks", "chunks": 3},
        {"top_k": 2, "capacity_factor": 0.75, "transport": "collective"},
    )
]
# Every kind with two of the settings, every setting with two kinds.
FEW = [ALL[4 * i + j] for i in range(4) for j in range(4) if (i + i // 2 + j) % 2 == 0]


def world_loss(layer: ExpertParallel, data: CaseData, x_TD: Tensor) -> Tensor:
    """This rank's part of the loss: the world's is the sum over ranks."""
    output, l_aux, _ = layer(x_TD)
    return (output * data.output_grads[dist.get_rank()]).sum() + l_aux


def summed(value: Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total)


def slope(layer: ExpertParallel, data: CaseData, x_TD: Tensor, tensor: Tensor, direction: Tensor) -> float:
    """The central difference of the world's loss along each rank's `direction` of its `tensor`. Collective."""
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            tensor += sign * STEP * direction
            losses.append(summed(world_loss(layer, data, x_TD)))
            tensor -= sign * STEP * direction
    return (losses[0] - losses[1]) / (2 * STEP)


def check(case: LayerCase, links: Links, spoil: bool) -> dict[str, float]:
    """For each name of a tensor, how far the ranks' gradients are from the differences, relative to their norm."""
    data, rank = case_data(case), dist.get_rank()
    layer = build_layer(case, data)
    layer.connect(links.of(case), torus_for(case))
    x_TD = data.inputs[rank].clone().requires_grad_()
    world_loss(layer, data, x_TD).backward()
    gate_grad = layer.gate.wg.weight.grad
    assert gate_grad is not None
    dist.all_reduce(gate_grad)  # the gate is one tensor of the world: all ranks move it together
    off = {}
    names = {"x": x_TD, **dict(layer.named_parameters())}
    for name, tensor in names.items():
        is_shared = name == "gate.wg.weight"
        generator = torch.Generator().manual_seed(1 if is_shared else 1 + rank)
        direction = torch.randn(max(case.rows) * D * F, generator=generator, dtype=torch.float64)
        direction = direction[: tensor.numel()].view_as(tensor)
        numeric = slope(layer, data, x_TD, tensor, direction)
        assert tensor.grad is not None, name
        grad = tensor.grad * (1.01 if spoil else 1)
        parts = torch.stack(((grad * direction).sum(), grad.square().sum()))
        if not is_shared:
            dist.all_reduce(parts)
        along, square = parts.tolist()
        off[name] = abs(along - numeric) / (1e-3 + square**0.5)
    return off


def check_all(cases: Sequence[LayerCase], spoil: bool = False) -> list[tuple[str, str, float]]:
    links = Links()
    return [
        (case.name, name, error)
        for case in cases
        for name, error in check(case, links, spoil).items()
        if error > TOLERANCE
    ]


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_gradients_equal_central_differences_in_float64(pool: RankPool, cases: list[LayerCase]) -> None:
    assert pool.run(2, check_all, cases, timeout_s=240) == [[], []]


def test_a_gradient_that_is_off_by_a_hundredth_is_seen(pool: RankPool) -> None:
    for off in pool.run(2, check_all, FEW[::2], True, timeout_s=240):
        assert {case for case, _, _ in off} == {case.name for case in FEW[::2]}
        assert {"x", "gate.wg.weight"} <= {name for _, name, _ in off}


@pytest.mark.parametrize("kind", ["gelu", "module"])
def test_torchs_own_gradcheck_holds_on_one_rank(kind: str) -> None:
    torch.manual_seed(0)
    case = LayerCase(name="alone", config=config(num_experts=3, top_k=2), rows=(4,), expert=kind, dtype=torch.float64)
    layer = build_layer(case, case_data(case))
    x_TD = case_data(case).inputs[0].requires_grad_()
    parameters = [p for p in layer.parameters() if p.numel() <= 48] + [x_TD]
    assert torch.autograd.gradcheck(lambda *_: layer(x_TD)[:2], parameters, nondet_tol=0.0)
