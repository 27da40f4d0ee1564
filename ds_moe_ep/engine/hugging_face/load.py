"""A Hugging Face folder as a model whose MoE blocks are the package's layers, at any ep_size.

1. The model is made with one expert per block, so that no rank ever holds all experts, and its blocks are replaced.
2. Each rank reads the dense weights and its own experts, tensor by tensor, from the safetensors files.

Every name in the files is accounted for: what is missing, left over or of another shape is an error before training.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine.hugging_face.arguments import asked_dtype, dtype_of_folder, given_config, knobs_among
from ds_moe_ep.engine.hugging_face.blocks import MoEBlock, blocks_of
from ds_moe_ep.engine.hugging_face.checked_files import TensorForm, checksums_in, form_in, read_checked
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.export import INDEX
from ds_moe_ep.engine.hugging_face.families import STACKS, Family, family_of
from ds_moe_ep.engine.hugging_face.routing import knobs_of
from ds_moe_ep.engine.hugging_face.source import take_description
from ds_moe_ep.engine.hugging_face.stacks import BlockStacks, out_of_stack
from ds_moe_ep.errors import ConfigError, EngineError

SINGLE = "model.safetensors"
_IGNORED = (".rotary_emb.inv_freq",)  # in old files; computed by the model


class Weights:
    """The tensors of a folder by name. Files stay open, and memory-mapped, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, Mapping[str, list[int]]]] = {}
        self.file_of = _weight_map(folder)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor of the files, or one place of its first dimension, of which no more is read.

        Raises EngineError where there is none of that name, its file cannot be read, or a bit of it has changed since
        the package wrote it.
        """
        with self._opened(name) as (file, path, sums):
            return read_checked(file, path, name, sums, index)

    def form(self, name: str) -> TensorForm:
        """Type and shape of a tensor of the files, which is not read. Raises EngineError as `read` does."""
        with self._opened(name) as (file, path, _):
            return form_in(file, path, name)

    def dtypes(self) -> Iterator[torch.dtype]:
        """The types of the tensors, in the order of their names, each looked up when its turn comes."""
        return (self.form(name).dtype for name in sorted(self.file_of))

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Any, Path, Mapping[str, list[int]]]]:
        """The open file of a tensor, its path and its checksums."""
        from safetensors import SafetensorError, safe_open

        if name not in self.file_of:
            raise EngineError(f"{self.folder}: has no {name}; complete the folder, or name one of the model's family")
        file = self.file_of[name]
        path = self.folder / file
        try:
            if file not in self._files:
                fresh = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                self._files[file] = fresh, checksums_in(fresh, path)
            opened, sums = self._files[file]
            yield opened, path, sums
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path}: cannot be read ({error}); download or export it again") from error


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, from the index or from the single file."""
    from safetensors import SafetensorError, safe_open

    try:
        if (folder / INDEX).is_file():
            found: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return found
        with safe_open(folder / SINGLE, framework="pt", device="cpu") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise EngineError(
            f"{folder}: holds neither a whole {INDEX} nor {SINGLE} ({error}); name a Hugging Face folder with "
            "safetensors files"
        ) from error


def from_pretrained(
    folder: str | os.PathLike[str],
    ep_size: int = 1,
    *,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
    data_before_expert: bool = False,
    **knobs: Any,
) -> nn.Module:
    """The causal language model of a Hugging Face folder, with `MoE` in the place of its MoE blocks.

    A rank holds the dense weights and its own experts alone. `knobs` are those of `MoEConfig`; what routes tokens comes
    from the folder's configuration, and so do logits: they equal those of transformers. A router that chooses with a
    bias (DeepSeek-V3) has that of the files, which stays as it is unless `bias_step` moves it. No balance loss is
    computed unless `balance` asks for one; `balance_loss(model)` is then to be added to the loss. `data_before_expert`
    is DeepSpeed's use_data_before_expert_parallelism.

    As in transformers, `dtype` (or `torch_dtype`) is a torch type, its name, or "auto", the default: that of the
    configuration, or else of the files. `config` takes the place of the folder's configuration. Other arguments of
    transformers that would change the model are refused by name.

    Local, but with ep_size > 1 torch.distributed must be initialized; the layers are connected by
    deepspeed.initialize. Raises ConfigError for a family, router or argument that is not known, EngineError for files
    that are not whole, TopologyError where ep_size does not fit the world.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    asked = asked_dtype(dtype, torch_dtype)
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"{folder}: holds no config.json; name a Hugging Face folder on this machine (of the hub: "
            "huggingface_hub.snapshot_download)"
        )
    config = given_config(config, lambda: AutoConfig.from_pretrained(folder))
    family = family_of(config)
    moe = knobs_of(config, family, ep_size, knobs_among(knobs, config))
    ep_rank = RankGrid(
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        ep_size=ep_size,
        data_before_expert=data_before_expert,
    ).ep_rank(dist.get_rank() if dist.is_initialized() else 0)
    with Weights(folder) as weights:
        found = asked or dtype_of_folder(config, weights.dtypes())
        make: Any = partial(AutoModelForCausalLM.from_config, dtype=found, attn_implementation=attn_implementation)
        model = _empty(lambda: make(config), config, family)
        _replace_blocks(model, config, family, lambda: MoEBlock(config, family, moe).to(found))
        _fill(model, family, weights, ep_rank)
    take_description(model, folder)
    model.eval()
    return model


def _empty(make: Callable[[], nn.Module], config: Any, family: Family) -> nn.Module:
    """The model with one expert per block and weights that nobody has set."""
    from transformers.initialization import no_init_weights

    num_experts = getattr(config, family.num_experts)
    setattr(config, family.num_experts, 1)
    try:
        with no_init_weights():
            return make()
    finally:
        setattr(config, family.num_experts, num_experts)


def _replace_blocks(model: nn.Module, config: Any, family: Family, make: Callable[[], MoEBlock]) -> None:
    """Puts a block of the package where the family has one: a decoder layer may have a dense one instead."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name == family.module and hasattr(child, "experts") and hasattr(child, family.router.split(".")[0])
    ]
    if not places:
        raise ConfigError(f"config.model_type={config.model_type!r}: the model has no MoE block; train it as it is")
    for parent, name in places:
        setattr(parent, name, nn.Identity())  # the block is gone before another takes its place
        setattr(parent, name, make())


def _fill(model: nn.Module, family: Family, weights: Weights, ep_rank: int) -> None:
    """Sets every parameter from the files. Raises EngineError where files and model differ."""
    blocks = blocks_of(model, family)
    known = _known_names(model, blocks, family)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    left_over = sorted(
        name
        for name in weights.file_of
        if not (name in known or name.endswith(_IGNORED) or any(each.search(name) for each in ignored))
    )
    if left_over:
        raise EngineError(
            f"{weights.folder}: {len(left_over)} tensors have no place in the model, {left_over[0]} first; the files "
            "are of another model than config.json"
        )
    for name, target in _dense_targets(model, blocks):
        if name in weights.file_of or not _is_tied(model, name):
            _copy(weights, name, target)
    for block in blocks:
        first = ep_rank * block.num_local_experts
        experts = () if family.stacked else block.experts(first)
        if family.stacked:
            _fill_from_stacks(weights, block, first)
        for name, target in (*block.replicated(), *experts):
            if family.router_bias and name == f"{family.in_files(block.name)}.{family.router_bias}":
                block.take_router_bias(_read(weights, name, target))
            else:
                _copy(weights, name, target)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _fill_from_stacks(weights: Weights, block: ExpertBlock, first: int) -> None:
    """Sets a block's own experts from tensors that hold those of all ranks, a place at a time.

    Raises EngineError for other shapes.
    """
    forms = BlockStacks(block).forms
    for local in range(block.num_local_experts):
        own = block.weights_of(local)
        for part, (name, form) in zip(STACKS, forms.items(), strict=True):
            place = weights.read(name, first + local)
            _check_shape(weights, name, tuple(place.shape), form.shape[1:])
            for projection, value in out_of_stack(part, place).items():
                with torch.no_grad():
                    own[projection].copy_(value)


def _known_names(model: nn.Module, blocks: Iterable[ExpertBlock], family: Family) -> set[str]:
    known = {name for name, _ in _dense_targets(model, list(blocks))}
    for block in blocks:
        prefix = family.in_files(block.name)
        known |= {f"{prefix}.{name}" for name in family.names(block.num_experts)}
    return known


def _dense_targets(model: nn.Module, blocks: Iterable[ExpertBlock]) -> list[tuple[str, Tensor]]:
    inside = tuple(f"{block.name}." for block in blocks)
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return [(name, tensor) for name, tensor in state.items() if not name.startswith(inside)]


def _is_tied(model: nn.Module, name: str) -> bool:
    """True where files may leave a weight out, since it is another one's."""
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    return bool(getattr(model.config, "tie_word_embeddings", False)) and name in tied


def _copy(weights: Weights, name: str, target: Tensor) -> None:
    with torch.no_grad():
        target.copy_(_read(weights, name, target))


def _read(weights: Weights, name: str, target: Tensor) -> Tensor:
    """A tensor of the files in the place of another. Raises EngineError where it has another shape."""
    found = weights.read(name)
    _check_shape(weights, name, tuple(found.shape), tuple(target.shape))
    return found


def _check_shape(weights: Weights, name: str, found: tuple[int, ...], asked: tuple[int, ...]) -> None:
    if found != asked:
        raise EngineError(
            f"{weights.folder}: {name} is {found}, and the model of config.json has {asked}; the files are of another "
            "model"
        )
