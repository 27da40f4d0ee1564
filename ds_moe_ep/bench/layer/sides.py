"""What is compared: layers with the same weights and tokens, one forward and backward each, and the limit.

`check_same` proves before anything is timed that two layers computed the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_moe_ep.bench.harness.method import Side
from ds_moe_ep.bench.rivals.cases import LayerCase, expert_ids, expert_weights, gate_weight, output_gradient, tokens
from ds_moe_ep.errors import EngineError

AUX_LOSS_WEIGHT = 0.01  # what a training loss multiplies l_aux with
SAME_TOLERANCE = 1e-5  # of the largest element: fp32 sums of 1,024 terms in another order differ by 1e-6


@dataclass(frozen=True)
class SideOutcome:
    """All that one forward and backward leaves on a rank."""

    exp_counts_E: Tensor
    tensors: dict[str, Tensor]  # y, l_aux, dx, dwg, d<expert>.<parameter>


@dataclass(frozen=True)
class LayerSide:
    """One layer with its tokens; `step` is the work that is timed."""

    layer: nn.Module
    x_TD: Tensor
    dy_TD: Tensor

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y_TD, l_aux, exp_counts_E) of one forward and backward; gradients are left on the leaves."""
        y_TD, l_aux, exp_counts_E = self.layer(self.x_TD)
        torch.autograd.backward((y_TD, l_aux), (self.dy_TD, torch.full_like(l_aux, AUX_LOSS_WEIGHT)))
        if self.x_TD.is_cuda:
            torch.cuda.synchronize()
        return y_TD, l_aux, exp_counts_E

    def clear(self) -> None:
        """Drops every gradient, as an optimizer's zero_grad does."""
        self.x_TD.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def side(self) -> Side:
        return Side(run=self.step, prepare=self.clear)

    def outcome(self) -> SideOutcome:
        """One step's results, on the host."""
        self.clear()
        y_TD, l_aux, exp_counts_E = self.step()
        found = {"y": y_TD, "l_aux": l_aux, "dx": self.x_TD.grad, "dwg": _gate(self.layer).weight.grad}
        for index, expert in enumerate(_experts(self.layer)):
            for position, parameter in enumerate(expert.parameters()):
                found[f"d{index}.{position}"] = parameter.grad
        tensors = {name: _on_host(tensor) for name, tensor in found.items()}
        self.clear()
        return SideOutcome(exp_counts_E.detach().cpu().clone(), tensors)


def _on_host(tensor: Tensor | None) -> Tensor:
    return torch.zeros(()) if tensor is None else tensor.detach().cpu().clone()


def layer_side(layer: nn.Module, case: LayerCase, rank: int, ep_size: int, device: torch.device) -> LayerSide:
    """`layer` on `device`, with the case's weights and the rank's tokens."""
    layer.to(device)
    experts = list(_experts(layer))
    first = (rank % ep_size) * len(experts)
    with torch.no_grad():
        _gate(layer).weight.copy_(gate_weight(case))
        for index, expert in enumerate(experts):
            values = expert_weights(case, first + index).tensors()
            for parameter, value in zip(expert.parameters(), values, strict=True):
                parameter.copy_(value)
    x_TD = tokens(case, rank).to(device).requires_grad_()
    return LayerSide(layer, x_TD, output_gradient(case, rank).to(device))


def _gate(layer: nn.Module) -> nn.Linear:
    return layer.get_submodule("deepspeed_moe.gate.wg")  # type: ignore[return-value]


def _experts(layer: nn.Module) -> nn.ModuleList:
    return layer.get_submodule("deepspeed_moe.experts.deepspeed_experts")  # type: ignore[return-value]


def check_same(name: str, found: SideOutcome, expected: SideOutcome, tolerance: float = SAME_TOLERANCE) -> float:
    """The largest difference, relative to the largest element of each tensor.

    Raises EngineError where counts differ or a tensor differs by more than `tolerance`: sides that compute
    different things must not be raced.
    """
    if not torch.equal(found.exp_counts_E.long(), expected.exp_counts_E.long()):
        raise EngineError(
            f"bench.{name}.exp_counts={found.exp_counts_E.tolist()}: the other side has "
            f"{expected.exp_counts_E.tolist()}; both must route alike before they are timed"
        )
    worst = 0.0
    for key, reference in expected.tensors.items():
        value = found.tensors[key]
        if value.shape != reference.shape:
            shapes = f"{tuple(value.shape)} against {tuple(reference.shape)}"
            raise EngineError(f"bench.{name}.{key}: shapes {shapes}; a gradient is missing or misplaced")
        scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((value - reference).abs().max() / scale)
        if not difference <= tolerance:
            raise EngineError(
                f"bench.{name}.{key}: differs by {difference:.1e} of the largest element, more than "
                f"{tolerance:.0e}; sides that compute different things must not be raced"
            )
        worst = max(worst, difference)
    return worst


def matmul_side(case: LayerCase, rank: int, ep_size: int, device: torch.device) -> Side:
    """The six matrix products of each local expert on the rows it really gets: a limit no layer can beat.

    No bias, activation, copy or traffic; the outputs are allocated once.
    """
    local = case.num_experts // ep_size
    ids_N = torch.cat([expert_ids(case, peer).flatten() for peer in range(ep_size)])
    rows_E = torch.bincount(ids_N, minlength=case.num_experts).tolist()
    first = (rank % ep_size) * local
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    for expert in range(first, first + local):
        rows = rows_E[expert]
        weights = expert_weights(case, expert)
        w1_FD, w2_DF = weights.w1_FD.to(device), weights.w2_DF.to(device)
        x_RD = torch.randn(rows, case.hidden_size, device=device)
        h_RF = torch.randn(rows, case.width, device=device)
        out_RD, out_RF = torch.empty_like(x_RD), torch.empty_like(h_RF)
        dw1_FD, dw2_DF = torch.empty_like(w1_FD), torch.empty_like(w2_DF)
        products += [(x_RD, w1_FD.t(), out_RF), (h_RF, w2_DF.t(), out_RD)]  # forward
        products += [(x_RD, w2_DF, out_RF), (h_RF, w1_FD, out_RD)]  # dh, dx
        products += [(x_RD.t(), h_RF, dw2_DF), (h_RF.t(), x_RD, dw1_FD)]  # dw2, dw1

    def run() -> None:
        for left, right, out in products:
            torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Side(run=run)
