"""Sums of gradients in every layout that DeepSpeed was given: over which ranks, and what they are divided by.

Part of `seams.py`, as to private names.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.layouts.tensor import tensor_rank

IS_CUT = "moe_ep_is_cut"  # of a parameter of `parallel/tensor.py`: True where tensor ranks each have a part of it


def batch_group() -> dist.ProcessGroup:
    """The ranks over which dense gradients are summed: data-parallel ranks, and sequence ranks beside them."""
    group: dist.ProcessGroup = groups._get_sequence_data_parallel_group()
    return group


def replica_group(group_name: str) -> dist.ProcessGroup:
    """The ranks that hold the same experts as this one."""
    group: dist.ProcessGroup = groups._get_expert_data_parallel_group(group_name)
    return group


def summing_group(parameter: nn.Parameter) -> dist.ProcessGroup:
    """The ranks over which a parameter's gradient is summed."""
    if seams.is_expert_parameter(parameter):
        return replica_group(parameter.group_name)  # type: ignore[attr-defined]
    return batch_group()


def gradient_divisor() -> float:
    """The number of copies of the model that share a batch: the divisor of every summed gradient."""
    return dist.get_world_size(batch_group()) / seams.sequence_parallel_size()


def is_share(parameter: torch.Tensor) -> bool:
    """True where each tensor rank has a part of its own of a dense parameter.

    The marks that DeepSpeed's norms read say more in a pipeline of the package's own model, whose first rank has them
    on all that it holds.
    """
    return bool(getattr(parameter, IS_CUT, is_model_parallel_parameter(parameter)))


def num_holders(parameter: nn.Parameter) -> int:
    """Ranks of the world that hold the parameter; 0 for a tied one that DeepSpeed counts in another stage."""
    if getattr(parameter, PIPE_REPLICATED, False):
        return 0
    if seams.is_expert_parameter(parameter):
        return int(groups._get_expert_data_parallel_world_size(parameter.group_name))  # type: ignore[attr-defined]
    shares = seams.tensor_parallel_size() if is_share(parameter) else 1
    return dist.get_world_size() // seams.num_pipeline_stages() // shares


def num_counts(parameter: nn.Parameter, has_partitions: bool) -> float:
    """Ranks of the world that have each number of a parameter's gradient; 0 for one that another stage counts.

    Partitions of an optimizer divide a parameter among the ranks that reduce it.
    """
    holders = num_holders(parameter)
    if not has_partitions:
        return holders
    return holders / dist.get_world_size(summing_group(parameter))


def copy_name(name: str, parameter: torch.Tensor) -> str:
    """The name under which copies of a dense parameter are alike: its own, with the tensor rank where it is cut."""
    if seams.tensor_parallel_size() == 1 or not is_share(parameter):
        return name
    return f"{name} of tensor rank {tensor_rank()}"
