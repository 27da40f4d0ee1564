"""Writes the model of an engine as a Hugging Face folder: safetensors in shards, their index, config.json.

1. Every rank plans: the first rank that holds an expert writes it, rank 0 all that is replicated. Plans are names and
   bytes; shards are numbered over all ranks.
2. Every rank writes its shards into `<folder>.part`, copying one shard's tensors to the host at a time.
3. Rank 0 writes index and configuration; once all ranks have succeeded the folder takes its name.

Weights are written in the type in which the model computes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.own_experts import expert_group_of
from ds_moe_ep.engine.hugging_face.adapters import merged
from ds_moe_ep.engine.hugging_face.blocks import blocks_of
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import family_of
from ds_moe_ep.errors import ConfigError, EngineError, ExportError, MoEError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 1000**3
Named = list[tuple[str, Tensor]]


def save_pretrained(engine: Any, folder: str | os.PathLike[str], max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the model of an engine to a new Hugging Face folder, from which `from_pretrained` loads it; returns it.

    For models of Hugging Face whose MoE blocks are AutoEP's layers (hooked or not), the package's `MoE`
    (`from_pretrained`), or DeepSpeed's. Adapters of the peft library leave as a part of the weights that they adapt;
    the engine's stay as they are. Collective over the world; with ZeRO 0, 1 and 2. A rank copies to the host what one
    shard holds, and the weights that adapters change. Raises, on every rank, ConfigError for families that it does not
    know, ExportError where a layer does not compute what the family's files hold, and EngineError where a rank cannot
    write; nothing is left behind.
    """
    folder = Path(folder).absolute()
    with ExitStack() as scopes:
        return _save(engine, folder, max_shard_bytes, scopes)


def _save(engine: Any, folder: Path, max_shard_bytes: int, scopes: ExitStack) -> Path:
    partial = folder.with_name(folder.name + ".part")
    model: nn.Module = getattr(engine, "module", engine)
    shards: list[Named] = []
    error: MoEError | None = None
    try:
        _check(engine, folder, partial)
        model = scopes.enter_context(merged(model))
        shards = cut(_own_tensors(model), max_shard_bytes)
    except MoEError as found:
        error = found
    seams.settle(error)
    plans = seams.gather([[name for name, _ in shard] for shard in shards])
    first, total = sum(map(len, plans[: dist.get_rank()])), sum(map(len, plans))
    try:
        seams.settle(_attempt(lambda: partial.mkdir(parents=True), dist.get_rank() == 0))
        seams.settle(_attempt(lambda: _write_shards(shards, partial, first, total)))
        num_bytes = sum(seams.gather(sum(tensor.nbytes for shard in shards for _, tensor in shard)))
        seams.settle(_attempt(lambda: _finish(model, plans, num_bytes, partial, folder), dist.get_rank() == 0))
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    seams.log_rank0(f"{folder}: {sum(len(names) for plan in plans for names in plan)} tensors in {total} files")
    return folder


def _check(engine: Any, folder: Path, partial: Path) -> None:
    for path in (folder, partial):
        if path.exists():
            raise EngineError(f"{path}: exists, and an export overwrites nothing; remove it or name another folder")
    stage = int(engine.zero_optimization_stage()) if hasattr(engine, "zero_optimization_stage") else 0
    if stage > 2:
        raise ExportError(
            f"zero_optimization.stage={stage}: a rank holds parts of weights; save_checkpoint, load it with stage 2 or "
            "less, and export there"
        )
    if seams.tensor_parallel_size() > 1 or seams.num_pipeline_stages() > 1:
        raise ExportError("tensor parallelism and pipeline stages cut weights; export from a run without them")


def _own_tensors(model: nn.Module) -> Named:
    """The tensors that this rank writes, by name in files."""
    config = getattr(model, "config", None)
    family = family_of(config)
    blocks = blocks_of(model, family)
    if not blocks:
        raise ExportError(
            f"model={type(model).__name__}: has no MoE layer of DeepSpeed's or this package's; "
            "model.save_pretrained writes it"
        )
    own: Named = []
    if dist.get_rank() == 0:
        own.extend(_dense(model, blocks))
        for block in blocks:
            own.extend(block.replicated())
    for block in blocks:
        if (first := _first_expert(block)) is not None:
            own.extend(block.experts(first))
    for name, _ in own:
        if any(part in name for part in (".base_layer.", ".original_module.", "lora_")):
            raise ExportError(f"{name}: belongs to an adapter of an unknown kind; merge it (model.merge_and_unload())")
    return own


def _first_expert(block: ExpertBlock) -> int | None:
    """The global index of this rank's first expert; None where another rank writes the same ones."""
    layer = block.layer
    ep_size = int(layer.ep_size)
    if ep_size == 1:
        return 0 if dist.get_rank() == 0 else None
    group = expert_group_of(layer)
    if group is None:
        raise EngineError(f"{block.name}: has no expert-parallel group; export from an engine")
    ep_rank = dist.get_rank(group)
    return ep_rank * block.num_local_experts if seams.is_first_holder(f"ep_size_{ep_size}") else None


def _dense(model: nn.Module, blocks: Sequence[ExpertBlock]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and kept buffers outside of the blocks, each once: tied weights are one."""
    inside = tuple(f"{block.name}." for block in blocks)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(inside) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def cut(tensors: Named, max_shard_bytes: int) -> list[Named]:
    """The tensors in their order, cut into shards of at most so many bytes; a larger tensor has one of its own."""
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}: a shard holds one byte or more; give some gigabytes")
    shards: list[Named] = []
    room = 0
    for name, tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, tensor))
        room -= tensor.nbytes
    return shards


def shard_name(index: int, total: int) -> str:
    """The name of a file, as Hugging Face numbers them: from 1."""
    place, count = (str(number).zfill(5) for number in (index + 1, total))
    return f"model-{place}-of-{count}.safetensors"


def write_index(folder: Path, files: Sequence[Sequence[str]], num_bytes: int) -> None:
    """Writes which shard holds which tensor; `files` has the names in each shard, in the shards' order."""
    weight_map = {name: shard_name(index, len(files)) for index, names in enumerate(files) for name in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shards(shards: Sequence[Named], partial: Path, first: int, total: int) -> None:
    from safetensors.torch import save_file

    for index, shard in enumerate(shards, start=first):
        # An expert's weights may be a part of a stack: only a copy has memory of its own.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in shard}
        save_file(tensors, partial / shard_name(index, total), {"format": "pt"})


def _finish(
    model: nn.Module, plans: Sequence[Sequence[Sequence[str]]], num_bytes: int, partial: Path, folder: Path
) -> None:
    """Index and configuration; then the folder takes its name."""
    write_index(partial, [names for plan in plans for names in plan], num_bytes)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(partial)
    partial.rename(folder)


def _attempt(work: Any, is_mine: bool = True) -> MoEError | None:
    """Does this rank's part; the error that it met, for all ranks."""
    if not is_mine:
        return None
    try:
        work()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        return EngineError(f"rank {dist.get_rank()} cannot write the folder ({type(error).__name__}: {error})")
    return None
