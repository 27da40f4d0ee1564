"""Writes the model of an engine as a Hugging Face folder: safetensors in shards, their index, config.json.

What the files hold depends on the model: a family's names, or those of the package's own model (`Content`).

1. Every rank plans: the first rank that holds an expert writes it, rank 0 all that is replicated. Plans are names and
   bytes; shards are numbered over all ranks.
2. Every rank writes its shards into `<folder>.part`, tensor by tensor: at most one is copied to the host at a time.
3. Rank 0 writes index and configuration; once all ranks have succeeded the folder takes its name.

Weights are written in the type in which the model computes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.own_experts import expert_group_of
from ds_moe_ep.engine.hugging_face import source, transformer_folder
from ds_moe_ep.engine.hugging_face.adapters import Merged, merged
from ds_moe_ep.engine.hugging_face.blocks import blocks_of, clamp_of
from ds_moe_ep.engine.hugging_face.checked_files import CheckedFile, Made, TensorForm, write_made
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import family_of
from ds_moe_ep.engine.hugging_face.routing import check_routing
from ds_moe_ep.engine.hugging_face.stacks import BlockStacks
from ds_moe_ep.errors import ConfigError, EngineError, ExportError, MoEError
from ds_moe_ep.model.transformer import Transformer

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 1000**3
Named = list[tuple[str, Tensor]]
Shard = list[tuple[str, Made]]


def save_pretrained(engine: Any, folder: str | os.PathLike[str], max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes the model of an engine to a new Hugging Face folder, from which `from_pretrained` loads it; returns it.

    For models of Hugging Face whose MoE blocks are AutoEP's layers (hooked or not), the package's `MoE`
    (`from_pretrained`), or DeepSpeed's; and for the package's own model (`build_transformer`), whose folder carries its
    code and is loaded with trust_remote_code=True. Adapters of the peft library leave as a part of the weights that
    they adapt; the engine's stay as they are. Collective over the world; with ZeRO 0, 1 and 2. In memory beside the
    model is at most one tensor (of gpt-oss's stacks one expert's part), twice where adapters change it. Raises, on
    every rank, ConfigError for families that it does not know, ExportError where a layer does not compute what the
    family's files hold, and EngineError where a rank cannot write; nothing is left behind.
    """
    folder = Path(folder).absolute()
    with ExitStack() as scopes:
        return _save(engine, folder, max_shard_bytes, scopes)


@dataclass(frozen=True)
class Content:
    """The content of a folder: the tensors that this rank writes, by their names in files, and what describes them."""

    tensors: Named
    stacks: Sequence[BlockStacks]  # that all ranks fill together and rank 0 writes, a file each
    describe: Callable[[Path], None]  # writes the configuration


def _save(engine: Any, folder: Path, max_shard_bytes: int, scopes: ExitStack) -> Path:
    partial = folder.with_name(folder.name + ".part")
    model: nn.Module = getattr(engine, "module", engine)
    shards: list[Shard] = []
    content = Content([], (), lambda folder: None)
    error: MoEError | None = None
    try:
        _check(engine, folder, partial)
        plain = scopes.enter_context(merged(model))
        content = _content(plain)
        tensors = [(name, (TensorForm.of(tensor), partial_of(plain.read, tensor))) for name, tensor in content.tensors]
        shards = cut(tensors, max_shard_bytes)
    except MoEError as found:
        error = found
    seams.settle(error)
    of_stacks = [stacks.names for stacks in content.stacks] if dist.get_rank() == 0 else []
    plans = seams.gather([[name for name, _ in shard] for shard in shards] + of_stacks)
    first, total = sum(map(len, plans[: dist.get_rank()])), sum(map(len, plans))
    try:
        seams.settle(_attempt(lambda: partial.mkdir(parents=True), dist.get_rank() == 0))
        seams.settle(_attempt(lambda: write_shards(shards, partial, first, total)))
        num_bytes = sum(seams.gather(sum(form.num_bytes for shard in shards for _, (form, _) in shard)))
        num_bytes += _write_stacks(content.stacks, partial, len(shards), total)
        files = [names for plan in plans for names in plan]
        seams.settle(_attempt(lambda: _finish(content, files, num_bytes, partial, folder), dist.get_rank() == 0))
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


def _content(plain: Merged) -> Content:
    """The content of a model's folder. Local. Raises MoEError where no folder holds what the model computes."""
    model = plain.model
    if isinstance(model, Transformer):
        values = transformer_folder.values_of(model)
        own = transformer_folder.tensors_of(model, dist.get_rank() == 0, first_expert)
        return Content(list(own), (), partial_of(transformer_folder.describe, values))
    family = family_of(getattr(model, "config", None))
    blocks = blocks_of(model, family)
    if not blocks:
        raise ExportError(
            f"model={type(model).__name__}: has no MoE layer of DeepSpeed's or this package's; "
            "model.save_pretrained writes it"
        )
    for block in blocks:
        check_routing(model.config, block)
    stacks = [BlockStacks(block, plain.read) for block in blocks] if family.stacked else []
    for each in stacks:
        each.check(clamp_of(model.config))
    return Content(_own_tensors(model, blocks), stacks, partial_of(describe, model))


def _own_tensors(model: nn.Module, blocks: Sequence[ExpertBlock]) -> Named:
    """The tensors that this rank writes by itself, by name in files."""
    own: Named = []
    if dist.get_rank() == 0:
        own.extend(_dense(model, blocks))
        for block in blocks:
            own.extend(block.replicated())
    for block in blocks:
        if not block.family.stacked and (first := first_expert(block.name, block.layer)) is not None:
            own.extend(block.experts(first))
    for name, _ in own:
        if any(part in name for part in (".base_layer.", ".original_module.", "lora_")):
            raise ExportError(f"{name}: belongs to an adapter of an unknown kind; merge it (model.merge_and_unload())")
    return own


def first_expert(name: str, layer: Any) -> int | None:
    """The global index of this rank's first expert of a layer; None where another rank writes the same ones."""
    ep_size = int(layer.ep_size)
    if ep_size == 1:
        return 0 if dist.get_rank() == 0 else None
    group = expert_group_of(layer)
    if group is None:
        raise EngineError(f"{name}: has no expert-parallel group; export from an engine")
    ep_rank = dist.get_rank(group)
    return ep_rank * int(layer.num_local_experts) if seams.is_first_holder(f"ep_size_{ep_size}") else None


def _dense(model: nn.Module, blocks: Sequence[ExpertBlock]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and kept buffers outside of the blocks, each once: tied weights are one."""
    inside = tuple(f"{block.name}." for block in blocks)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(inside) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def cut(tensors: Sequence[tuple[str, Made]], max_shard_bytes: int) -> list[Shard]:
    """The tensors in their order, cut into shards of at most so many bytes; a larger tensor has one of its own."""
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes!r}: a shard holds one byte or more; give some gigabytes")
    shards: list[Shard] = []
    room = 0
    for name, made in tensors:
        num_bytes = made[0].num_bytes
        if not shards or num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, made))
        room -= num_bytes
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


def write_shards(shards: Sequence[Shard], folder: Path, first: int, total: int) -> None:
    """Writes shards `first` and following of a folder of `total`; each tensor is made when its turn comes."""
    for index, shard in enumerate(shards, start=first):
        write_made(dict(shard), folder / shard_name(index, total))


def _write_stacks(stacks: Sequence[BlockStacks], partial: Path, first: int, total: int) -> int:
    """Writes each block's stacks on rank 0, a part of one expert in memory at a time; their bytes. Collective."""
    error, num_bytes = None, 0
    for index, block in enumerate(stacks, start=first):
        error = _write_places(block, partial / shard_name(index, total), error)
        num_bytes += sum(form.num_bytes for form in block.forms.values())
    seams.settle(error)
    return num_bytes


def _write_places(block: BlockStacks, path: Path, error: MoEError | None) -> MoEError | None:
    """A block's file on rank 0, which writes nothing behind an error; the error that it met. Collective."""
    with ExitStack() as scopes:
        files: list[CheckedFile] = []  # none where this rank does not write

        def begin() -> None:
            files.append(CheckedFile(scopes.enter_context(path.open("wb")), block.forms))

        error = error or _attempt(begin, dist.get_rank() == 0)
        for name, index, place in block.places():
            for file in files if error is None else ():
                error = _attempt(partial_of(file.write, name, place, index))
        for file in files if error is None else ():
            error = _attempt(file.finish) or _attempt(scopes.close)
    return error


def _finish(content: Content, files: Sequence[Sequence[str]], num_bytes: int, partial: Path, folder: Path) -> None:
    """Index and configuration; then the folder takes its name."""
    write_index(partial, files, num_bytes)
    content.describe(partial)
    partial.rename(folder)


def describe(model: nn.Module, folder: Path) -> None:
    """The configuration of a model of Hugging Face's, with its source's keys and the type of the written weights."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    source.complete(model, folder)


def _attempt(work: Any, is_mine: bool = True) -> MoEError | None:
    """Does this rank's part; the error that it met, for all ranks."""
    if not is_mine:
        return None
    try:
        work()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        return EngineError(f"rank {dist.get_rank()} cannot write the folder ({type(error).__name__}: {error})")
    return None
