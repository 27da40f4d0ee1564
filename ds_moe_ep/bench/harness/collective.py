"""Numbers that the ranks of a benchmark agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


def slowest(values: Sequence[float], device: torch.device = CPU) -> list[float]:
    """The largest of each number over the ranks. Collective."""
    return _reduced(values, dist.ReduceOp.MAX, device)


def mean(values: Sequence[float], device: torch.device = CPU) -> list[float]:
    """The mean of each number over the ranks. Collective."""
    return [value / dist.get_world_size() for value in _reduced(values, dist.ReduceOp.SUM, device)]


def _reduced(values: Sequence[float], operation: dist.ReduceOp.RedOpType, device: torch.device) -> list[float]:
    numbers = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=operation)
    return [float(number) for number in numbers]
