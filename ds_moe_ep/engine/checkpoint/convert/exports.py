"""A checkpoint as files of safetensors: a Hugging Face folder of the package's own model, or the weights in fp32.

Both have one name per tensor of the model on one device, in shards with an index, each written by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.convert.resize import ExpertCheckpoint
from ds_moe_ep.engine.checkpoint.convert.weight_files import WHOLE, WeightFiles, WeightPlace
from ds_moe_ep.engine.checkpoint.convert.weights import Parts, share_at
from ds_moe_ep.engine.checkpoint.convert.zero_states import master_weight
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE
from ds_moe_ep.engine.checkpoint.reshard import SavedStates
from ds_moe_ep.engine.hugging_face.checked_files import TensorForm, same, write_made
from ds_moe_ep.engine.hugging_face.export import INDEX, SHARD_BYTES, shard_name
from ds_moe_ep.engine.hugging_face.transformer_folder import (
    CODE,
    code_path,
    config_values,
    is_balance_state,
    name_in_files,
    routing_biases,
)
from ds_moe_ep.parallel.tensor import cut_dimension


@dataclass(frozen=True)
class NamedTensor:
    """A tensor to write: its name in the files, its form there, and how it is read when its turn comes."""

    name: str
    form: TensorForm
    read: Callable[[], Tensor]
    reads: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        return self.form.num_bytes


def shards(tensors: Sequence[NamedTensor], max_bytes: int = SHARD_BYTES) -> Iterator[TargetFile]:
    """The tensors in files of at most so many bytes, or of one tensor, and their index."""
    files: list[list[NamedTensor]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.num_bytes
    names = [shard_name(index, len(files)) for index in range(len(files))]
    for name, held in zip(names, files, strict=True):
        reads = tuple(sorted({path for tensor in held for path in tensor.reads}))
        yield TargetFile(name, sum(tensor.num_bytes for tensor in held), partial(_write_shard, held), reads)
    weight_map = {tensor.name: name for name, held in zip(names, files, strict=True) for tensor in held}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    yield TargetFile(INDEX, 0, partial(_write_json, index))


def hugging_face_files(
    folder: Path, files: WeightFiles, parts: Parts, model: ModelConfig, moe: MoEConfig
) -> Iterator[TargetFile]:
    """The folder of the package's own model. Raises ExportError where its gate is not that of the folder's code."""
    holders = files.holders(folder)
    config = config_values(model, moe, parts["head.weight"][0].dtype)
    biases = routing_biases(
        {name: shares[0] for name, shares in parts.items() if is_balance_state(name)}, moe.bias_step
    )
    tensors = [
        NamedTensor(
            name_in_files(name),
            whole_form(name, shares),
            partial(share_at, WeightPlace("", "", name, WHOLE), parts),
            tuple(holders[name]),
        )
        for name, shares in parts.items()
        if not is_balance_state(name)
    ]
    tensors += [NamedTensor(name, TensorForm.of(bias), partial(same, bias), ()) for name, bias in biases.items()]
    yield from shards(tensors)
    yield TargetFile("config.json", 0, partial(_write_json, config))
    yield TargetFile(f"{CODE}.py", 0, partial(_copy_text, code_path()))


def fp32_files(checkpoint: ExpertCheckpoint) -> Iterator[TargetFile]:
    """The weights in fp32: ZeRO's master weights where there are some, else those of the model's files."""
    states: SavedStates | None = None
    if checkpoint.zero_files:
        for path in checkpoint.zero_files.values():
            load_file(path)  # refuses what would run code
        places = checkpoint.ep_size(), checkpoint.is_interleaved, checkpoint.num_experts
        states = SavedStates(checkpoint.folder, *places)
    of_states = tuple(checkpoint.zero_files.values())
    trained = _trained(checkpoint) if states is not None else set()
    tensors = []
    for path in (checkpoint.folder / MAIN_FILE, *checkpoint.experts()):
        weights = checkpoint.main["module"] if path.name == MAIN_FILE else load_file(path)
        for name, weight in weights.items():
            is_master = states is not None and _pattern(name) in trained
            read = (
                partial(master_weight, states, name, tuple(weight.shape))
                if states is not None and is_master
                else partial(_wide, weight)
            )
            dtype = torch.float32 if weight.is_floating_point() else weight.dtype
            form = TensorForm.of_shape(dtype, weight.shape)
            tensors.append(NamedTensor(name, form, read, of_states if is_master else (path,)))
    yield from shards(tensors)


def whole_form(name: str, shares: Sequence[Tensor]) -> TensorForm:
    """The form of a weight that lies in shares, by its name on one device."""
    shape, dimension = list(shares[0].shape), cut_dimension(name)
    if dimension is not None:
        shape[dimension] = sum(share.shape[dimension] for share in shares)
    return TensorForm.of_shape(shares[0].dtype, shape)


def _trained(checkpoint: ExpertCheckpoint) -> set[str]:
    """The names of parameters with optimizer states, without the indices of experts."""
    return {_pattern(name) for group in checkpoint.main.get("param_shapes") or () for name in group}


def _pattern(name: str) -> str:
    from ds_moe_ep.model.initialize import renumbered

    return renumbered(name, lambda _: 0)


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _write_shard(tensors: Sequence[NamedTensor], path: Path) -> None:
    write_made({each.name: (each.form, each.read) for each in tensors}, path)


def _write_json(values: Any, path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_text(source: Path, path: Path) -> None:
    path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
