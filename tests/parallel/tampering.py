"""Small faults in the baseline, each of which a comparison must see: the negative controls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn


def forgotten(region: Any, tensor: Tensor) -> Tensor:
    """An edge of a region without its all-reduce."""
    return tensor


def _copy_but_weights(enter: Any) -> Any:
    """The way in, that lets the router's weights [T, K] pass beside it."""
    return lambda region, whole: whole if whole.shape[-1] <= 2 else enter(region, whole)


def _wrong_share(of: Any) -> Any:
    """Every rank takes the first part of the attention's output matrix."""

    def first_of_out(share: Any, value: Tensor, name: str) -> Tensor:
        index = 0 if name.endswith("attention.out.weight") else share.index
        return of(type(share)(index, share.count), value, name)

    return first_of_out


def _without_column(pack: Any) -> Any:
    """Tokens go to the next stage, the losses so far do not."""
    return lambda carried: pack((carried[0], carried[1].new_zeros(())))


def _without_marks(connect: Any) -> Any:
    """The all-reduces without the marks that tell DeepSpeed which parameters are cut."""

    def connected(model: nn.Module, group: Any) -> nn.Module:
        connect(model, group)
        for parameter in model.parameters():
            del parameter.model_parallel, parameter.tensor_model_parallel
        return model

    return connected


def _with_losses_twice(pack: Any) -> Any:
    """The losses so far are counted again on their way to the next stage."""
    return lambda carried: pack((carried[0], 2 * carried[1]))


def _of_the_next_place(expert_index_of: Any) -> Any:
    """Each rank takes the first values of the experts that another place of its group holds."""
    return lambda ep_rank, num_local_experts: expert_index_of(1 - ep_rank, num_local_experts)


def _across_stages(ep_size: int, data_before_expert: bool) -> Any:
    """An expert group of ranks in two stages."""
    import torch.distributed as dist

    ranks = [dist.get_rank() % 2, dist.get_rank() % 2 + 2]
    return dist.new_group(ranks, use_local_synchronization=True), ranks


def _without_expert_marks(mark: Any) -> Any:
    """Experts' gradients are averaged as dense ones are, over ranks that hold other experts."""

    def unmarked(layer: Any) -> list[str]:
        mark(layer)
        for parameter in layer.deepspeed_moe.experts.parameters():
            parameter.allreduce = True
        return []

    return unmarked


@contextmanager
def tampered(fault: str) -> Iterator[None]:
    """Runs its block with the fault of this name; none where it is empty."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_moe_ep.engine import pipeline, seams
    from ds_moe_ep.engine.layer import MoE
    from ds_moe_ep.parallel import stages
    from ds_moe_ep.parallel.tensor import Share, TensorRegion

    faults: dict[str, tuple[Any, str, Any]] = {
        "no all-reduce of the output": (TensorRegion, "reduce_from_tp", forgotten),
        "no all-reduce of the input's gradient": (TensorRegion, "copy_to_tp", forgotten),
        "no all-reduce of the router's gradient": (
            TensorRegion,
            "copy_to_tp",
            _copy_but_weights(TensorRegion.copy_to_tp),
        ),
        "one share twice": (Share, "of", _wrong_share(Share.of)),
        "no column of losses": (stages, "pack", _without_column(stages.pack)),
        "no marks of cut parameters": (pipeline, "connect", _without_marks(pipeline.connect)),
        "losses twice": (stages, "pack", _with_losses_twice(stages.pack)),
        "experts of the wrong rank": (pipeline, "expert_index_of", _of_the_next_place(pipeline.expert_index_of)),
        "an expert group across stages": (seams, "expert_group", _across_stages),
        "experts reduced as dense": (MoE, "mark_experts", _without_expert_marks(MoE.mark_experts)),
        "groups of ranks apart": (seams, "has_data_before_experts", lambda engine: True),
        "tokens not shared": (MoE, "share_tokens", lambda layer: None),
        "experts not reduced": (DeepSpeedEngine, "_reduce_expert_gradients", lambda engine, *gradients: None),
    }
    if not fault:
        yield
        return
    with mock.patch.object(*faults[fault]):
        yield
