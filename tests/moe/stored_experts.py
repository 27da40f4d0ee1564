"""Experts in float64 whose stored numbers are rounded to fp16: the least error that a layer in fp16 can have.

Rows, hidden rows, active rows and results lie in memory or travel between ranks in the job's type, and so do their
gradients; products are summed exactly, and nothing else is rounded. Outputs and gradients of parameters come out before
their own, last rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.moe.layer_cases import Weights
from tests.reference import Expert


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor) -> Tensor:
        return numbers.half().to(numbers.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.half().to(gradient.dtype)


def stored(numbers: Tensor) -> Tensor:
    """The numbers, and on the way back their gradients, as fp16 has them."""
    kept: Tensor = _Stored.apply(numbers)  # type: ignore[no-untyped-call]
    return kept


def stored_expert(kind: str, weights: Weights) -> Expert:
    """The expert of a case, as `expert_function` makes it, with all that it stores rounded."""

    def linear(rows: Tensor, name: str) -> Tensor:
        return stored(F.linear(rows, weights[f"{name}.weight"], weights.get(f"{name}.bias")))

    def gelu(rows: Tensor) -> Tensor:
        hidden = linear(stored(rows), "fc1")
        return linear(stored(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))), "fc2")

    def swiglu(rows: Tensor) -> Tensor:
        rows = stored(rows)
        gate = linear(stored(rows), "gate")  # whose gradient is written before the other one is added to it
        return linear(stored(gate * torch.sigmoid(gate) * linear(rows, "up")), "down")

    return gelu if kind.startswith("gelu") else swiglu
