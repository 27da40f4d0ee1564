"""Tensor parallelism by columns and rows, as Megatron has it (arXiv 1909.08053, section 3).

The first matrix of a pair is cut by its outputs (query, key and value heads; an expert's inner width), the second by
its inputs: each rank computes a part of every sum, and one all-reduce after the pair adds the parts. In the backward
pass one all-reduce adds the gradients of the pair's input. Everything else (norms, router, embedding, head) is whole on
every rank of the group and computes the same there.

1. `cut` keeps this rank's share of each matrix, on any device, the meta device too.
2. `connect` puts the two all-reduces around attention and experts, and marks the shares for the engine.

The router stands outside: all ranks route all tokens alike, and its gradient is whole because the weights that it gives
to the experts pass the same gate as the tokens.

Experts that ranks share (ep_size above 1) are not cut: each tensor rank takes its part of the tokens to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.moe.layer import ExpertParallel

# Which dimension of a parameter is cut, by its name. A router's `gate.wg.weight` is none of these.
CUT_DIMENSIONS = (
    (re.compile(r"\battention\.qkv\.weight$"), 0),
    (re.compile(r"\battention\.out\.weight$"), 1),
    (re.compile(r"\b(fc1|gate|up)\.weight$"), 0),
    (re.compile(r"\b(fc2|down)\.weight$"), 1),
)
SHARED_LAYER = "deepspeed_moe."  # in names of a layer whose experts lie on several ranks


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts."""

    index: int
    count: int

    def of(self, value: Tensor, name: str) -> Tensor:
        """This part of the parameter `name`; all of it where its kind is not cut."""
        dimension = cut_dimension(name)
        return value if dimension is None else value.chunk(self.count, dimension)[self.index]

    def whole_shape(self, shape: torch.Size, name: str) -> torch.Size:
        """The shape of the whole parameter `name`, of which a part has `shape`."""
        dimension = cut_dimension(name)
        return torch.Size(size * (self.count if i == dimension else 1) for i, size in enumerate(shape))


def cut_dimension(name: str) -> int | None:
    """The dimension in which the parameter of this name is cut; None for one that every rank holds whole.

    Experts that ranks share are whole, and all that lies in their layer.
    """
    if SHARED_LAYER in name:
        return None
    return next((dimension for pattern, dimension in CUT_DIMENSIONS if pattern.search(name)), None)


def tensor_parallel(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """`model` with this rank's shares of its matrices, in place; the passes are collective over `group` from now on."""
    return connect(cut(model, Share(dist.get_rank(group), dist.get_world_size(group))), group)


def cut(model: nn.Module, share: Share) -> nn.Module:
    """`model` with `share` of each matrix that is cut, in place. Local; names do not change."""
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if cut_dimension(f"{prefix}.{name}") is not None:
                kept = share.of(parameter.detach(), f"{prefix}.{name}").clone()
                setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    return model


def connect(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """`model`, already cut, with the all-reduces over `group` around attention and experts, in place. Local."""
    region = TensorRegion(group)
    for module in model.modules():
        if isinstance(module, CausalAttention):
            module.register_forward_pre_hook(lambda _, inputs: (region.copy_to_tp(inputs[0]), *inputs[1:]))
            module.register_forward_hook(lambda _, inputs, output: region.reduce_from_tp(output))
        elif isinstance(module, ExpertParallel) and module.config.ep_size == 1:
            module.region = region
    shares_experts = any(SHARED_LAYER in name for name, _ in model.named_parameters())
    is_first = dist.get_rank(group) == 0 and not shares_experts  # whose norms are taken in another way
    for name, parameter in model.named_parameters():
        # DeepSpeed takes the gradients' norm over what bears the mark, and over all of the first rank. Without ZeRO
        # that is the first of all stages together: what a stage holds whole bears the mark on the stage's first rank.
        is_cut = cut_dimension(name) is not None
        parameter.moe_ep_is_cut = is_cut  # type: ignore[attr-defined]
        counts = is_first or is_cut
        parameter.model_parallel = parameter.tensor_model_parallel = counts  # type: ignore[attr-defined]
    return model


class TensorRegion:
    """The edge of a part whose sums are cut over a group: whole tensors go in, sums come out."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def copy_to_tp(self, whole: Tensor) -> Tensor:
        """`whole`, the same on every rank; its gradient is summed over the group."""
        copied: Tensor = _CopyToTensorRanks.apply(whole, self.group)  # type: ignore[no-untyped-call]
        return copied

    def reduce_from_tp(self, part: Tensor) -> Tensor:
        """The sum of `part` over the group, in its place; its gradient is the sum's."""
        summed: Tensor = _ReduceFromTensorRanks.apply(part, self.group)  # type: ignore[no-untyped-call]
        return summed


class _CopyToTensorRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, part: Tensor) -> tuple[Tensor, None]:
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


class _ReduceFromTensorRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(part)
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx: Any, whole: Tensor) -> tuple[Tensor, None]:
        return whole, None
