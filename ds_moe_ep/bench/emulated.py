"""An emulated device: experts that wait as long as their rows would take, and leave the processor to others.

Many ranks on few cores cannot compute at once, so real experts there say little about a machine with a device a rank.
These say what a schedule hides if each rank had one. Everything else is real: routing, rows, messages, links. The
output of an expert is its input, in both directions; it has no parameters. Every figure made with them says `emulated`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.moe.experts import Experts
from ds_moe_ep.moe.forms import ExpertPass, Span


class EmulatedExpert(nn.Module):
    """One expert for layers that differentiate it by autograd: a row waits once forward, twice backward."""

    def __init__(self, row_us: float) -> None:
        super().__init__()
        self.row_us = row_us

    def forward(self, rows_ND: Tensor) -> Tensor:
        y_ND: Tensor = _Wait.apply(rows_ND, self.row_us)  # type: ignore[no-untyped-call]
        return y_ND


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, row_us: float) -> Tensor:
        ctx.row_us = row_us
        _wait(num_rows(rows_ND), row_us)
        return rows_ND.clone()

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None]:
        _wait(2 * num_rows(dy_ND), ctx.row_us)
        return dy_ND, None


class EmulatedExperts(Experts):
    """The same in place of a layer's own experts: input gradients and weight gradients wait once a row each."""

    def __init__(self, num_local_experts: int, row_us: float) -> None:
        super().__init__(EmulatedExpert(row_us), num_local_experts)
        self.row_us = row_us

    def start(self, spans: Sequence[Span], keep_graph: bool) -> ExpertPass:
        return EmulatedPass(self.row_us)


class EmulatedPass:
    """One pass through emulated experts."""

    def __init__(self, row_us: float) -> None:
        self.saved: list[Tensor] = []
        self.may_overwrite = False
        self._row_us = row_us

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        _wait(len(x_nD), self._row_us)
        y_nD.copy_(x_nD)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        _wait(len(dy_nD), self._row_us)
        dx_nD.copy_(dy_nD)

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        _wait(len(dy_nD), self._row_us)

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        return []


def num_rows(rows: Tensor) -> int:
    """Rows of a tensor [..., D]."""
    return rows.numel() // max(rows.shape[-1], 1)


def _wait(rows: int, row_us: float) -> None:
    if rows and row_us:
        time.sleep(1e-6 * rows * row_us)
