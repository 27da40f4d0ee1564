"""Sums of gradients in every layout that DeepSpeed was given: over which ranks, and what they are divided by.

Part of `seams.py`, as to private names.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.layouts.tensor import tensor_rank


def batch_group() -> dist.ProcessGroup:
    """The ranks over which dense gradients are summed: data-parallel ranks, and sequence ranks beside them."""
    group: dist.ProcessGroup = groups._get_sequence_data_parallel_group()
    return group


def replica_group(group_name: str) -> dist.ProcessGroup:
    """The ranks that hold the same experts as this one."""
    group: dist.ProcessGroup = groups._get_expert_data_parallel_group(group_name)
    return group


def gradient_divisor() -> float:
    """The number of copies of the model that share a batch: the divisor of every summed gradient."""
    return dist.get_world_size(batch_group()) / seams.sequence_parallel_size()


def num_counts(parameter: nn.Parameter, has_partitions: bool) -> float:
    """Ranks of the world that have each number of a parameter's gradient; 0 for one that another stage counts.

    Partitions of an optimizer divide a parameter among the ranks that reduce it.
    """
    holders = seams.num_holders(parameter)
    if not has_partitions:
        return holders
    is_expert = seams.is_expert_parameter(parameter)
    group = replica_group(parameter.group_name) if is_expert else batch_group()  # type: ignore[attr-defined]
    return holders / dist.get_world_size(group)


def copy_name(name: str, parameter: torch.Tensor) -> str:
    """The name under which copies of a dense parameter are alike: its own, with the tensor rank where it is cut."""
    if seams.tensor_parallel_size() == 1 or not is_model_parallel_parameter(parameter):
        return name
    return f"{name} of tensor rank {tensor_rank()}"
