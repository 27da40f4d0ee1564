"""A whole model's state in a layer that holds some of its experts: each rank takes its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_moe_ep.engine import seams
from ds_moe_ep.errors import EngineError
from ds_moe_ep.model.initialize import LOCAL_EXPERT, renumbered


def take_own_experts(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of `load_state_dict` for a layer whose experts lie on several ranks. Local.

    A state with indices of experts beyond this rank's number counts experts over all ranks: this rank's take their
    places here, the others leave. A rank's own state stays as it is. Raises EngineError where the rank's place is not
    known yet.
    """
    index_of = {
        name: int(match[1])
        for name in state_dict
        if name.startswith(prefix) and (match := LOCAL_EXPERT.search(name, len(prefix)))
    }
    num_local = int(layer.num_local_experts)
    if all(index < num_local for index in index_of.values()):
        return
    group = expert_group_of(layer)
    if group is None:
        raise EngineError(
            f"{prefix.removesuffix('.') or type(layer).__name__}: a state of all experts cannot be loaded before the "
            f"expert-parallel groups of ep_size {layer.ep_size} exist; load it behind deepspeed.initialize"
        )
    first = dist.get_rank(group) * num_local
    taken = {name: state_dict.pop(name) for name in index_of}
    for name, tensor in taken.items():
        if first <= index_of[name] < first + num_local:
            state_dict[shifted(name, -first)] = tensor


def expert_group_of(layer: Any) -> dist.ProcessGroup | None:
    """The ranks that share the experts of a layer, whoever made it; None where their group does not exist yet."""
    if seams.is_autoep_layer(layer):
        group: dist.ProcessGroup | None = layer.ep_group
        return group
    return seams.known_expert_group(int(layer.ep_size))


def holders_of(layer: Any) -> list[int]:
    """The first rank of the world that holds each expert-parallel rank's experts. Collective over the world."""
    ranks = seams.gather(dist.get_rank(expert_group_of(layer)))
    return [ranks.index(ep_rank) for ep_rank in range(int(layer.ep_size))]


def shifted(name: str, offset: int) -> str:
    """The name of an expert's tensor with `offset` added to the expert's index."""
    return renumbered(name, lambda index: index + offset)
