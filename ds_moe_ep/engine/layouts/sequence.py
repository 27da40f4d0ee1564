"""Sequence parallelism (Ulysses) by an mpu: ranks that share a sequence have different tokens of it.

A layer takes its rank's tokens as any, and DeepSpeed sums gradients over sequence ranks and averages them over copies.
Without ZeRO its own unit of groups (`parallel_state_sp`) misleads it: it divides the experts' gradients by the whole
world, sequence ranks among them. Part of `seams.py`, as to private names.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback

REDUCE_EXPERTS = "_reduce_expert_gradients"  # of an engine: what it reduces without ZeRO


def expert_divisor_excess() -> float:
    """By how much DeepSpeed divides experts' gradients more than dense ones, where its optimizer is not ZeRO's."""
    taken = dist.get_world_size(groups._get_data_parallel_group())
    return taken * seams.sequence_parallel_size() / int(groups._get_sequence_data_parallel_world_size())


class ExpertGradients(EngineCallback):
    """Gives experts' gradients, once they are reduced, the scale of the dense ones."""

    def __init__(self, engine: Any) -> None:
        self._engine, excess, reduce = engine, expert_divisor_excess(), getattr(engine, REDUCE_EXPERTS)

        @functools.wraps(reduce)
        @torch.no_grad()
        def reduce_and_scale(gradients: dict[str, list[torch.Tensor]], *args: Any, **kwargs: Any) -> None:
            reduce(gradients, *args, **kwargs)
            for of_group in gradients.values():
                for gradient in of_group:
                    gradient.mul_(excess)

        setattr(engine, REDUCE_EXPERTS, reduce_and_scale)

    @staticmethod
    def is_needed() -> bool:
        """True where DeepSpeed divides them by more."""
        return seams.sequence_parallel_size() > 1 and not seams.has_mesh() and expert_divisor_excess() != 1

    def close(self) -> None:
        vars(self._engine).pop(REDUCE_EXPERTS, None)
