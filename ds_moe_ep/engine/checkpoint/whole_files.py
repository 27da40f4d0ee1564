"""Model files with the experts of all ranks, from writers that every rank calls.

`engine.save_16bit_model` and Hugging Face's `Trainer.save_model` take the model's state on every rank, and write it on
one. Under an engine of `ds_moe_ep.initialize` or `attach_overlap` a layer completes that state:

1. Each expert's tensors are broadcast by the first rank that holds it, one tensor at a time.
2. The first rank of each host keeps them, in host memory; on the others the state has no experts.
3. In a model of a family of Hugging Face's the block's names become those of the family's files. In other models an
   expert stands under its global index, as it would in the model made with ep_size=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.model_files import (
    BY_ALL_RANKS,
    has_adapters_elsewhere,
    refuse_part_of_experts,
    writer_of_file,
)
from ds_moe_ep.engine.checkpoint.own_experts import holders_of, shifted, take_own_experts
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.hugging_face.adapters import is_of_transformers
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import FAMILIES
from ds_moe_ep.engine.hugging_face.routing import check_routing
from ds_moe_ep.engine.hugging_face.stacks import BlockStacks
from ds_moe_ep.model.initialize import LOCAL_EXPERT


class ModelFiles(EngineCallback):
    """Keeps parts of experts out of model files, and completes those that all ranks write. Local.

    `made_by_deepspeed` names DeepSpeed's layers, which refuse parts of experts until this is closed, as the package's
    own do by themselves.
    """

    def __init__(self, model: nn.Module, made_by_deepspeed: Iterable[str]) -> None:
        refusing = [model.get_submodule(name) for name in made_by_deepspeed]
        self._layers = [layer for layer in model.modules() if seams.is_moe_layer(layer) and is_shared_whole(layer)]
        self._handles = [layer.register_state_dict_pre_hook(refuse_part_of_experts) for layer in refusing]
        for layer in self._layers:
            layer.completes_files = True  # type: ignore[assignment]
            self._handles.append(layer.register_state_dict_post_hook(complete_experts))
        self._handles += [
            layer.register_state_dict_post_hook(rename_experts) for layer in model.modules() if is_on_every_rank(layer)
        ]
        self._handles += [
            layer.register_load_state_dict_pre_hook(take_own_experts)
            for layer in refusing
            if layer in self._layers and not seams.is_autoep_layer(layer)
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            del layer.completes_files


def is_shared_whole(layer: Any) -> bool:
    """True for a layer whose experts lie on several ranks, each whole, in the only stage of a model."""
    is_whole = all(parameter.numel() > 0 for parameter in layer.parameters())  # of ZeRO 3 a rank holds no weight
    is_only_stage = seams.tensor_parallel_size() == 1 and seams.num_pipeline_stages() == 1
    return int(layer.ep_size) > 1 and is_whole and is_only_stage


def is_on_every_rank(layer: Any) -> bool:
    """True for a layer whose experts are all on this rank."""
    return seams.is_moe_layer(layer) and int(layer.ep_size) == 1


def complete_experts(layer: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A post-hook of `state_dict`: puts the experts of all ranks in the place of this rank's, for a model file.

    Collective over the world where every rank writes, and nothing elsewhere.
    """
    writer, root = writer_of_file()
    if writer not in BY_ALL_RANKS or has_adapters_elsewhere(root, layer):
        return
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    for name in own:
        del state_dict[name]
    if (found := _block_of_family(root, layer, prefix)) is not None:
        config, block = found
        check_routing(config, block)
        state_dict.update((name, tensor.detach()) for name, tensor in block.replicated())
        if block.family.stacked:
            state_dict.update(BlockStacks(block).filled(is_writer()))
            return
        local = [list(block.experts(rank * block.num_local_experts)) for rank in range(int(layer.ep_size))]
        state_dict.update(_of_all_holders(layer, local))
        return
    experts = [name for name in own if LOCAL_EXPERT.search(name)] if not seams.is_autoep_layer(layer) else []
    state_dict.update((name, tensor) for name, tensor in own.items() if name not in experts)
    state_dict.update(_of_all_holders(layer, _global_names(layer, {name: own[name] for name in experts})))
    if seams.is_autoep_layer(layer):
        _stack_all(layer, state_dict, f"{prefix}experts.")


def rename_experts(layer: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A post-hook of `state_dict` for a layer whose experts are all on this rank: a family's names, for a model file.

    Local.
    """
    writer, root = writer_of_file()
    found = _block_of_family(root, layer, prefix) if writer else None
    if found is None:
        return
    config, block = found
    if block.family.stacked or any(parameter.numel() == 0 for parameter in layer.parameters()):
        return
    check_routing(config, block)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
    state_dict.update((name, tensor.detach()) for name, tensor in (*block.replicated(), *block.experts(0)))


def _block_of_family(root: Any, layer: Any, prefix: str) -> tuple[Any, ExpertBlock] | None:
    """The configuration of a model of transformers and the layer as a block of its family; None for other models."""
    plain = getattr(root, "_orig_mod", root)  # of what torch.compile made
    config = getattr(plain, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    if family is None or not is_of_transformers(plain) or hasattr(root, "peft_config"):
        return None
    return config, ExpertBlock(prefix.removesuffix(".").removesuffix(".moe"), family, layer)


def _global_names(layer: Any, experts: dict[str, Tensor]) -> list[list[tuple[str, Tensor]]]:
    """For every expert-parallel rank the names that its experts have over all ranks, with this rank's tensors."""
    return [
        [(shifted(name, rank * int(layer.num_local_experts)), tensor) for name, tensor in experts.items()]
        for rank in range(int(layer.ep_size))
    ]


def _of_all_holders(layer: Any, named: list[list[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """The experts' tensors of every expert-parallel rank on the ranks that write; none on others.

    `named` has, for each expert-parallel rank, the names there with this rank's own tensors, which are of equal shapes.
    """
    for holder, tensors in zip(holders_of(layer), named, strict=True):
        for name, own in tensors:
            there = own.detach().contiguous() if dist.get_rank() == holder else torch.empty_like(own).contiguous()
            dist.broadcast(there, src=holder)
            if is_writer():
                yield name, there.cpu()


def _stack_all(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """AutoEP's stacks [E_local, ...] of all ranks as one [E, ...] each."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own = state_dict.pop(name)
        parts = [part for _, part in _of_all_holders(layer, [[(name, own)]] * int(layer.ep_size))]
        if parts:
            state_dict[name] = torch.cat(parts)


def is_writer() -> bool:
    """True on the first rank of each host, which writes where the others do not."""
    return dist.get_rank() == 0 or os.environ.get("LOCAL_RANK") == "0"
