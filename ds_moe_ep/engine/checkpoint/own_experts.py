"""A whole model's state in a layer that holds some of its experts: each rank takes its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_moe_ep.engine import seams
from ds_moe_ep.errors import EngineError
from ds_moe_ep.model.initialize import LOCAL_EXPERT


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
    group = seams.known_expert_group(int(layer.ep_size))
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


def shifted(name: str, offset: int) -> str:
    """The name of an expert's tensor with `offset` added to the expert's index."""
    return LOCAL_EXPERT.sub(lambda match: f"deepspeed_experts.{int(match[1]) + offset}.", name)
