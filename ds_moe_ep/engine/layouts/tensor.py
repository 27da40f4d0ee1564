"""Tensor parallelism of the dense part as DeepSpeed was given it: Megatron's mpu, or AutoTP's section.

DeepSpeed makes expert groups of ranks of the whole world, tensor ranks among them, and averages the experts' gradients
over the data-parallel size, which does not count tensor ranks: right where each token goes to the experts once. Its
norms count a parameter of the first tensor rank alone unless it is marked as cut. Experts of other tensor ranks are
others, or under ZeRO other parts of them, and so they get that mark. Part of `seams.py`, as to private names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_rank
from torch import nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.parallel_keys import CUT_EXPERTS_RULE
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.state.tensor_bytes import crc32_of
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks, is_cut, is_whole

CUT_MARK = "tensor_model_parallel"  # Megatron's and AutoTP's, on parameters that are cut
OWN_MARK = "model_parallel"  # the same to DeepSpeed's norms
SEQUENCE_MARK = "sequence_parallel"  # Megatron's, on parameters and in configurations


def tensor_rank() -> int:
    """This rank's place in the tensor group that DeepSpeed was given; 0 without one."""
    return int(bwc_tensor_model_parallel_rank(groups.mpu)) if seams.tensor_parallel_size() > 1 else 0


def whole_tokens() -> TensorRanks:
    """The tensor group of this rank, for a layer of which every rank of it gets all tokens. Local."""
    size = seams.tensor_parallel_size()
    return TensorRanks() if size == 1 else TensorRanks(bwc_tensor_model_parallel_group(groups.mpu), tensor_rank(), size)


def tensor_ranks_of(layer: nn.Module, config: MoEConfig) -> TensorRanks:
    """The tensor group of this rank, for a layer. Local. Raises EngineError where its experts are cut over it."""
    ranks = whole_tokens()
    if ranks.size == 1:
        return ranks
    ours = [name for name in names_of_cut(layer) if "deepspeed_experts" in name or ".gate." in f".{name}"]
    if ours:
        raise EngineError(f"tensor parallel size={ranks.size} with {ours[0]}, which is cut over it: {CUT_EXPERTS_RULE}")
    if getattr(layer, "enable_expert_tensor_parallelism", False):
        raise EngineError(
            f"tensor parallel size={ranks.size} with MoE.enable_expert_tensor_parallelism=True: {CUT_EXPERTS_RULE}"
        )
    given = config.sequence_parallel
    has_own_tokens = is_marked_for_sequences(layer) if given is None else given
    return replace(ranks, has_own_tokens=has_own_tokens)


def names_of_cut(layer: nn.Module) -> list[str]:
    """The parameters that are cut over tensor ranks: by their marks, or by what Megatron's linear layers say.

    Copies of an expert have lost its parameters' marks.
    """
    return [
        name
        for owner_name, owner in layer.named_modules()
        if not is_whole(owner)
        for name, parameter in owner.named_parameters(owner_name, recurse=False)
        if getattr(parameter, CUT_MARK, False) or getattr(owner, "is_expert_without_slicing", None) is False
    ]


def take_whole(layer: nn.Module) -> None:
    """Takes linear layers of Megatron's that are whole as such, whatever their marks say. Local.

    DeepSpeed's norms count them once, and none scatters its rows over tensor ranks, as one of an expert would where
    tokens come cut: other rows are on each rank.
    """
    for module in filter(is_whole, layer.modules()):
        if getattr(module, SEQUENCE_MARK, False):
            setattr(module, SEQUENCE_MARK, False)
        for parameter in module.parameters(recurse=False):
            for mark in (CUT_MARK, SEQUENCE_MARK):
                if getattr(parameter, mark, False):
                    setattr(parameter, mark, False)


def refuse_scattering(layer: nn.Module, name: str) -> None:
    """Raises EngineError where whole linear layers of experts scatter their rows over tensor ranks. Local."""
    if any(is_whole(module) and getattr(module, SEQUENCE_MARK, False) for module in layer.modules()):
        raise EngineError(
            f"{name}: its experts' linear layers have sequence_parallel=True, and so would sum rows of other tokens "
            "over tensor ranks; use ds_moe_ep.MoE, which switches that off, or give the experts a configuration "
            "without it and set moe_ep.sequence_parallel=true"
        )


def first_rank_of_group() -> int:
    """The first rank, of the world, of the tensor group that this rank belongs to. Local."""
    if seams.tensor_parallel_size() == 1:
        return dist.get_rank()
    return dist.get_global_rank(bwc_tensor_model_parallel_group(groups.mpu), 0)


def is_marked_for_sequences(layer: nn.Module) -> bool:
    """True where a layer's parameters, modules or their configurations say that tokens come cut, as Megatron's do."""
    if any(getattr(parameter, SEQUENCE_MARK, False) for parameter in layer.parameters()):
        return True
    owners = [owner for module in layer.modules() for owner in (module, getattr(module, "config", None))]
    return any(getattr(owner, SEQUENCE_MARK, None) is True for owner in owners if not isinstance(owner, MoEConfig))


def mark_as_apart(experts: nn.Module) -> list[nn.Parameter]:
    """Lets DeepSpeed's norms count experts of every tensor rank; returns those that were not marked before. Local."""
    unmarked = [p for p in experts.parameters() if not getattr(p, OWN_MARK, False)]
    if seams.tensor_parallel_size() == 1:
        return []
    for parameter in unmarked:
        setattr(parameter, OWN_MARK, True)
    return unmarked


def group_of_shares() -> dist.ProcessGroup:
    """The ranks whose tokens, or shares of tokens, are a batch: data-parallel ranks, and tensor ranks beside them.

    In a pipeline the data-parallel ranks alone.
    """
    if seams.tensor_parallel_size() > 1 and seams.num_pipeline_stages() == 1:
        world: dist.ProcessGroup = groups._clone_world_group()
        return world
    return seams.data_parallel_group()


def sum_over_shares(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks of `group_of_shares`. Collective, without gradient."""
    total = values.clone()
    dist.all_reduce(total, group=group_of_shares())
    return total


@torch.no_grad()
def make_alike(ranks: TensorRanks, module: nn.Module) -> None:
    """Gives a module that every tensor rank has whole the first rank's weights. Collective over the group."""
    if ranks.group is None or is_cut(module):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, dist.get_global_rank(ranks.group, 0), group=ranks.group)


@torch.no_grad()
def refuse_unlike(ranks: TensorRanks, module: nn.Module, name: str) -> None:
    """Raises EngineError on every tensor rank where a module that each has whole differs. Collective over the group."""
    if ranks.group is None:
        return
    mine = 0
    for parameter in module.parameters():
        mine = crc32_of(parameter, mine)
    theirs: list[int] = [0] * ranks.size
    dist.all_gather_object(theirs, mine, group=ranks.group)
    if len(set(theirs)) > 1:
        raise EngineError(
            f"{name}: its weights differ between the ranks of a tensor-parallel group, which must route alike; make "
            "the model with the same seed on all of them, or load one checkpoint"
        )


def refuse_mixed_groups(ranks: TensorRanks, ep_group: dist.ProcessGroup, config: MoEConfig) -> None:
    """Raises EngineError where balance_scope "group" would count some tensor groups' tokens more often than others'.

    On every rank, or of this stage; collective over the world, or the expert group in a pipeline.
    """
    if ranks.group is None or config.balance_scope == "rank" or config.ep_size == 1:
        return
    first = dist.get_global_rank(ranks.group, 0)
    members: list[int] = [0] * dist.get_world_size(ep_group)
    dist.all_gather_object(members, first, group=ep_group)
    counts = Counter(members)
    seen: list[Counter[int]] = [Counter()] * ranks.size
    dist.all_gather_object(seen, counts, group=ranks.group)
    problem = None
    if len(set(counts.values())) > 1 or any(each != counts for each in seen):
        problem = EngineError(
            f"moe_ep.balance_scope='group' with ep_size={config.ep_size} and tensor parallel size={ranks.size}: an "
            "expert group holds parts of tensor groups, whose tokens it would count unequally; take sizes of which "
            "one divides the other, or balance_scope='rank'"
        )
    if seams.num_pipeline_stages() == 1:
        seams.settle(problem)
    elif problem is not None:  # stages have layers of their own, and come here at their own times
        raise problem
