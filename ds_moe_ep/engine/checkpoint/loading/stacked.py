"""AutoEP's experts come from their files straight into the stacks that hold a rank's.

DeepSpeed collects a rank's experts of all layers, stacks them, and copies the stacks: as much again as the rank keeps.
Here each file's tensors are copied to their places when it is read, and what DeepSpeed stacks are these places: it gets
the stack itself, and copies that onto itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE
from ds_moe_ep.engine.checkpoint.loading.reading import reading_by
from ds_moe_ep.engine.checkpoint.own_experts import expert_group_of
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall


class StackedExperts(EngineCallback):
    """Loads AutoEP's experts one by one. Local; ZeRO-3, whose stacks are elsewhere, is left to DeepSpeed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        places = places_of(self._engine.module)
        checkpoints = self._engine.checkpoint_engine
        if not places or load.options.get("custom_load_fn") is not None:
            return proceed(load)
        read = checkpoints.load

        def load_into_places(path: Any, map_location: Any = None) -> Any:
            found = read(path, map_location=map_location)
            return _placed(found, places) if EXPERT_FILE.fullmatch(Path(path).name) else found

        with reading_by(checkpoints, load_into_places):
            return proceed(load)


class PlacedExpert(Tensor):
    """An expert's place in the stack of a rank's; all places of a stack, stacked, are that stack."""

    whole: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.stack:
            whole = next(part.whole for part in args[0] if isinstance(part, cls))
            places = [part for part in args[0] if isinstance(part, cls) and part.whole is whole]
            if len(places) == len(args[0]) == len(whole):
                return whole
        as_tensors: Any = super().__torch_function__
        return as_tensors(func, types, args, kwargs or {})


def places_of(model: torch.nn.Module) -> dict[str, PlacedExpert]:
    """The places of this rank's experts in AutoEP's stacks, by the names in files; none under ZeRO-3. Local."""
    found: dict[str, PlacedExpert] = {}
    for name, layer in model.named_modules():
        if not seams.is_autoep_layer(layer):
            continue
        num_local, group = int(layer.num_local_experts), expert_group_of(layer)
        first = dist.get_rank(group) * num_local if group is not None else 0
        for stack_name, stack in layer.experts.named_parameters():
            if stack.dim() != 3 or stack.shape[0] != num_local or hasattr(stack, "ds_id"):
                continue
            whole = stack.detach()
            for local, place in enumerate(whole):
                placed = place.as_subclass(PlacedExpert)
                placed.whole = whole
                found[f"{name}.experts.{stack_name}.{first + local}".removeprefix(".")] = placed
    return found


@torch.no_grad()
def _placed(found: Any, places: Mapping[str, PlacedExpert]) -> Any:
    """The content of an expert's file, with its tensors in their places; what has none, or another shape, stays."""
    if not isinstance(found, dict):
        return found
    content = dict(found)
    for name, tensor in found.items():
        place = places.get(name)
        if place is not None and isinstance(tensor, Tensor) and tensor.shape == place.shape:
            place.as_subclass(Tensor).copy_(tensor)
            content[name] = place
    return content
