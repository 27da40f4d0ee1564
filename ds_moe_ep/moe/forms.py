"""The mathematics of experts, forward and backward, on stacked rows.

A pass holds the stacked intermediate rows of all local experts. It computes any run of rows of one expert, forward or
backward, in any order; weight gradients come once, from all rows of an expert, so that they do not depend on how the
rows arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe_ep.kernels.linear import linear_grad_rows, linear_rows

Weights = dict[str, Tensor | None]


class ExpertPass(Protocol):
    """One pass through the local experts. `rows` is a slice of the stacked rows, all of one expert."""

    saved: list[Tensor]  # what the backward pass reads; the autograd function stores it in between

    def compute(self, expert: int, rows: slice, x_RD: Tensor, y_RD: Tensor) -> None:
        """Writes the expert's outputs."""

    def input_grads(self, expert: int, rows: slice, dy_RD: Tensor, dx_RD: Tensor) -> None:
        """Writes the gradient of the expert's inputs."""

    def weight_grads(self, expert: int, rows: slice, x_RD: Tensor, dy_RD: Tensor) -> list[Tensor | None]:
        """The gradients of one expert's parameters, in their order; `rows` are all its rows."""


class GeluPass:
    """down(gelu(up(x))): keeps the rows before and after the activation."""

    def __init__(self, weights: Sequence[Weights], num_rows: int, approximate: str) -> None:
        up = weights[0]["up.weight"]
        assert up is not None
        self._weights = weights
        self._approximate = approximate
        self.saved = [up.new_empty(num_rows, len(up)) for _ in range(2)]  # hidden rows, active rows
        self._d_hidden_RF: Tensor | None = None

    def compute(self, expert: int, rows: slice, x_RD: Tensor, y_RD: Tensor) -> None:
        weights, (hidden_RF, active_RF) = self._weights[expert], self.saved
        linear_rows(x_RD[rows], _weight(weights, "up"), weights.get("up.bias"), hidden_RF[rows])
        torch.ops.aten.gelu(hidden_RF[rows], approximate=self._approximate, out=active_RF[rows])
        linear_rows(active_RF[rows], _weight(weights, "down"), weights.get("down.bias"), y_RD[rows])

    def input_grads(self, expert: int, rows: slice, dy_RD: Tensor, dx_RD: Tensor) -> None:
        weights, hidden_RF = self._weights[expert], self.saved[0]
        if self._d_hidden_RF is None:
            self._d_hidden_RF = torch.empty_like(hidden_RF)
        d_rows_RF = self._d_hidden_RF[rows]  # first the gradient of the active rows, then, in place, of the hidden ones
        linear_grad_rows(dy_RD[rows], _weight(weights, "down"), d_rows_RF)
        torch.ops.aten.gelu_backward(d_rows_RF, hidden_RF[rows], approximate=self._approximate, grad_input=d_rows_RF)
        linear_grad_rows(d_rows_RF, _weight(weights, "up"), dx_RD[rows])

    def weight_grads(self, expert: int, rows: slice, x_RD: Tensor, dy_RD: Tensor) -> list[Tensor | None]:
        active_RF = self.saved[1]
        d_hidden_RF = torch.empty_like(active_RF) if self._d_hidden_RF is None else self._d_hidden_RF
        inputs = {"up": (x_RD[rows], d_hidden_RF[rows]), "down": (active_RF[rows], dy_RD[rows])}
        return [_linear_grad(name, weight, inputs) for name, weight in self._weights[expert].items()]


class SwiGLUPass:
    """down(silu(gate(x)) * up(x)): keeps gate rows, up rows and their product."""

    def __init__(self, weights: Sequence[Weights], num_rows: int) -> None:
        up = weights[0]["up.weight"]
        assert up is not None
        self._weights = weights
        self.saved = [up.new_empty(num_rows, len(up)) for _ in range(3)]  # gate rows, up rows, active rows
        self._d_gate_RF: Tensor | None = None
        self._d_up_RF: Tensor | None = None

    def compute(self, expert: int, rows: slice, x_RD: Tensor, y_RD: Tensor) -> None:
        weights, (gate_RF, up_RF, active_RF) = self._weights[expert], self.saved
        linear_rows(x_RD[rows], _weight(weights, "gate"), weights.get("gate.bias"), gate_RF[rows])
        linear_rows(x_RD[rows], _weight(weights, "up"), weights.get("up.bias"), up_RF[rows])
        torch.mul(F.silu(gate_RF[rows]), up_RF[rows], out=active_RF[rows])
        linear_rows(active_RF[rows], _weight(weights, "down"), weights.get("down.bias"), y_RD[rows])

    def input_grads(self, expert: int, rows: slice, dy_RD: Tensor, dx_RD: Tensor) -> None:
        weights, (gate_RF, up_RF, _) = self._weights[expert], self.saved
        if self._d_gate_RF is None or self._d_up_RF is None:
            self._d_gate_RF, self._d_up_RF = torch.empty_like(gate_RF), torch.empty_like(up_RF)
        d_active_RF = torch.empty_like(gate_RF[rows])
        linear_grad_rows(dy_RD[rows], _weight(weights, "down"), d_active_RF)
        torch.mul(d_active_RF, F.silu(gate_RF[rows]), out=self._d_up_RF[rows])
        d_silu_RF = d_active_RF.mul_(up_RF[rows])
        self._d_gate_RF[rows] = torch.ops.aten.silu_backward(d_silu_RF, gate_RF[rows])
        linear_grad_rows(self._d_gate_RF[rows], _weight(weights, "gate"), dx_RD[rows])
        through_up_RD = torch.empty_like(dx_RD[rows])
        linear_grad_rows(self._d_up_RF[rows], _weight(weights, "up"), through_up_RD)
        dx_RD[rows] += through_up_RD

    def weight_grads(self, expert: int, rows: slice, x_RD: Tensor, dy_RD: Tensor) -> list[Tensor | None]:
        gate_RF, up_RF, active_RF = self.saved
        d_gate_RF = torch.empty_like(gate_RF) if self._d_gate_RF is None else self._d_gate_RF
        d_up_RF = torch.empty_like(up_RF) if self._d_up_RF is None else self._d_up_RF
        inputs = {
            "gate": (x_RD[rows], d_gate_RF[rows]),
            "up": (x_RD[rows], d_up_RF[rows]),
            "down": (active_RF[rows], dy_RD[rows]),
        }
        return [_linear_grad(name, weight, inputs) for name, weight in self._weights[expert].items()]


class ModulePass:
    """Any module: each run keeps its own graph until the backward pass.

    Autograd gives input and weight gradients together, so weight gradients are summed run by run, in the schedule's
    order: between schedules they agree up to rounding, not bit for bit.
    """

    def __init__(self, experts: Sequence[nn.Module], keep_graph: bool) -> None:
        self.saved: list[Tensor] = []
        self._experts = experts
        self._keep_graph = keep_graph
        self._graphs: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._grads: dict[int, list[Tensor | None]] = {}

    def compute(self, expert: int, rows: slice, x_RD: Tensor, y_RD: Tensor) -> None:
        if not self._keep_graph:
            y_RD[rows] = self._call(expert, x_RD[rows])
            return
        leaf_ND = x_RD[rows].detach().clone().requires_grad_()
        # Saved as they are: a surrounding recomputation must not unpack this graph's tensors.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
            out_ND = self._call(expert, leaf_ND)
        y_RD[rows] = out_ND.detach()
        self._graphs[expert, rows.start, rows.stop] = (leaf_ND, out_ND)

    def _call(self, expert: int, rows_ND: Tensor) -> Tensor:
        out = self._experts[expert](rows_ND)
        result_ND: Tensor = out[0] if isinstance(out, tuple) else out
        return result_ND  # as DeepSpeed: a second output (a bias) is left out

    def input_grads(self, expert: int, rows: slice, dy_RD: Tensor, dx_RD: Tensor) -> None:
        leaf_ND, out_ND = self._graphs.pop((expert, rows.start, rows.stop))
        trained = [p for p in self._experts[expert].parameters() if p.requires_grad]
        dx_ND, *grads = torch.autograd.grad(out_ND, [leaf_ND, *trained], dy_RD[rows], allow_unused=True)
        dx_RD[rows] = 0 if dx_ND is None else dx_ND
        known = self._grads.get(expert, [None] * len(grads))
        self._grads[expert] = [
            new if old is None else old if new is None else old + new for old, new in zip(known, grads, strict=True)
        ]

    def weight_grads(self, expert: int, rows: slice, x_RD: Tensor, dy_RD: Tensor) -> list[Tensor | None]:
        parameters = list(self._experts[expert].parameters())
        trained = [p for p in parameters if p.requires_grad]
        grads = dict(zip(map(id, trained), self._grads.get(expert, [None] * len(trained)), strict=True))
        found = [grads.get(id(p)) for p in parameters]
        return [
            torch.zeros_like(p) if g is None and p.requires_grad else g for p, g in zip(parameters, found, strict=True)
        ]


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def _weight(weights: Weights, part: str) -> Tensor:
    weight = weights[f"{part}.weight"]
    assert weight is not None
    return weight


def _linear_grad(name: str, weight: Tensor | None, inputs: dict[str, tuple[Tensor, Tensor]]) -> Tensor | None:
    """The gradient of a Linear's weight or bias from its inputs and its outputs' gradient; None when frozen."""
    if weight is None or not weight.requires_grad:
        return None
    part, _, leaf = name.rpartition(".")
    x_RI, dy_RO = inputs[part]
    return dy_RO.sum(0) if leaf == "bias" else dy_RO.t() @ x_RI
