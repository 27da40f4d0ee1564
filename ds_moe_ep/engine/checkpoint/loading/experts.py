"""Experts' files are compared with the layers that will take them, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE
from ds_moe_ep.engine.checkpoint.own_experts import expert_group_of
from ds_moe_ep.errors import EngineError

Shapes = Mapping[str, tuple[int, ...]]
_EXPERTS = "deepspeed_moe.experts.deepspeed_experts"


def check_experts(engine: Any, folder: Path, is_strict: bool) -> None:
    """Raises EngineError where a file of this rank's experts has other tensors than its layer. Local.

    It reads names and shapes. Files that are not there are left to those that look for them.
    """
    layers = [(name, module) for name, module in engine.module.named_modules() if seams.is_moe_layer(module)]
    for index, (name, layer) in enumerate(layers):
        for expert, shapes in expert_shapes(layer, f"{name}." if name else ""):
            path = folder / f"layer_{index}_expert_{expert}_{MAIN_FILE}"
            if path.is_file():
                check_expert(path, load_file(path), shapes, is_strict)


def expert_shapes(layer: Any, prefix: str) -> Iterator[tuple[int, Shapes]]:
    """Index of each expert of this rank over all ranks, and the shapes of its tensors by their names in its file."""
    group = expert_group_of(layer)
    num_local = int(layer.num_local_experts)
    first = dist.get_rank(group) * num_local if group is not None else 0
    if seams.is_autoep_layer(layer):
        stacks = {name: tuple(stack.shape) for name, stack in layer.experts.named_parameters()}
        stacks = {name: shape for name, shape in stacks.items() if len(shape) == 3 and shape[0] == num_local}
        for expert in range(first, first + num_local):
            yield expert, {f"{prefix}experts.{name}.{expert}": shape[1:] for name, shape in stacks.items()}
        return
    for local, module in enumerate(layer.get_submodule(_EXPERTS)):
        own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        if all(value.numel() for value in own.values()):  # of ZeRO 3 a rank holds no weight
            names = f"{prefix}{_EXPERTS}.{first + local}"
            yield first + local, {f"{names}.{name}": tuple(value.shape) for name, value in own.items()}


def check_expert(path: Path, saved: Any, shapes: Shapes, is_strict: bool) -> None:
    """Raises EngineError where a file does not hold tensors of these names and shapes, or, strictly, holds more."""
    named = saved if isinstance(saved, Mapping) else {}
    found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name, shape in shapes.items():
        if name in found and tuple(found[name].shape) != shape:
            raise EngineError(
                f"{path}: {name} is {tuple(found[name].shape)} there and {shape} here; give the saved model"
            )
    missing, more = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    for wrong, what in ((missing, "lacks"), (more, "has left over")):
        if wrong and is_strict and shapes:
            raise EngineError(
                f"{path}: {what} {len(wrong)} tensors of the expert, {wrong[0]} first; give the model that was saved, "
                "or another copy of the file"
            )
