"""A checkpoint of expert parallelism for another ep_size, or another number of ranks, with its optimizer states.

Experts have a file each under any ep_size, and stay as they are; so do the dense weights. Optimizer states are laid
anew: `zero_states`, `plain_states`. Names of layers and experts are read from the files: no model is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.section import SECTION
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine.checkpoint.convert.groups import ParameterGroup, of_experts, resized
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.convert.plain_states import OPTIMIZER_FILE, PlainStates
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.convert.zero_states import ZeroStates
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE, MAIN_FILE, saved_ep_size
from ds_moe_ep.engine.checkpoint.reshard import ZERO_FILE, SavedStates, is_lean, prefix_of
from ds_moe_ep.engine.checkpoint.state_pieces import EXPERT_NAME, num_experts_of
from ds_moe_ep.errors import ConfigError, EngineError

INTERLEAVED = "use_data_before_expert_parallelism"  # DeepSpeed's key
_WEIGHTS_ALONE = "take --weights-only, and load with load_module_only=True"


@dataclass(frozen=True)
class ExpertCheckpoint:
    """A checkpoint folder of DeepSpeed's expert parallelism. Raises EngineError where it is not whole, or another."""

    folder: Path

    def __post_init__(self) -> None:
        if self.main.get("ds_autoep_layers"):
            raise EngineError(
                f"{self.folder}: is of AutoEP's layers; DeepSpeed's ds_to_universal.py cuts them anew, or load it and "
                "ds_moe_ep.save_pretrained(engine, folder)"
            )
        if int(self.main.get("mp_world_size") or 1) > 1:
            raise EngineError(f"{self.folder}: was saved by tensor ranks or stages; name a model to carry its weights")
        sizes = self.main.get("num_experts") or []
        planned = {(layer, index) for layer, size in enumerate(sizes) for index in range(size)}
        names = [match for path in self.folder.iterdir() if (match := EXPERT_FILE.fullmatch(path.name))]
        present = {(int(match[1]), int(match[2])) for match in names}
        for wrong, what in ((planned - present, "are missing"), (present - planned, "are left over")):
            if wrong:
                layer, index = min(wrong)
                raise EngineError(
                    f"{self.folder}: {len(wrong)} experts' files {what}, layer_{layer}_expert_{index}_* first; "
                    "complete the folder"
                )

    @cached_property
    def main(self) -> dict[str, Any]:
        """The file with the dense weights and the state of the run."""
        main = load_file(self.folder / MAIN_FILE)
        if not isinstance(main, dict) or not isinstance(main.get("module"), Mapping):
            raise EngineError(f"{self.folder / MAIN_FILE}: holds no weights; save the checkpoint again")
        return main

    def expert_path(self, layer: int, index: int) -> Path:
        return self.folder / f"layer_{layer}_expert_{index}_{MAIN_FILE}"

    def experts(self) -> Iterator[Path]:
        """The experts' files, by layer and index."""
        for layer, size in enumerate(self.main["num_experts"]):
            yield from (self.expert_path(layer, index) for index in range(size))

    @cached_property
    def first_experts(self) -> dict[str, Tensor]:
        """The tensors of each layer's first expert, mapped."""
        return {
            name: tensor
            for layer in range(len(self.main["num_experts"]))
            for name, tensor in load_file(self.expert_path(layer, 0)).items()
        }

    @cached_property
    def num_experts(self) -> dict[str, int]:
        """The number of experts of each layer, by the layer's name in the model."""
        found: dict[str, int] = {}
        for layer, size in enumerate(self.main["num_experts"]):
            name = next(iter(load_file(self.expert_path(layer, 0))), "")
            if ".deepspeed_moe." not in f".{name}":
                raise EngineError(f"{self.expert_path(layer, 0)}: holds no expert of DeepSpeed's; complete the folder")
            found[f".{name}".split(".deepspeed_moe.")[0].removeprefix(".")] = size
        return found

    @cached_property
    def zero_files(self) -> dict[int, Path]:
        """The files of ZeRO's states by rank."""
        found = ((ZERO_FILE.fullmatch(path.name), path) for path in self.folder.iterdir())
        return dict(
            sorted((int(match["rank"]), path) for match, path in found if match and match["model_rank"] == "00")
        )

    @cached_property
    def states_of_ranks(self) -> list[Mapping[str, Any]]:
        """The states without ZeRO of each expert-parallel rank, in any form; none where there are none, or ZeRO's."""
        states: list[Mapping[str, Any]] = []
        while not self.zero_files and (path := self.folder / OPTIMIZER_FILE.format(len(states))).is_file():
            state = load_file(path).get("optimizer")
            if state is None:
                break
            states.append(state)
        return states

    @property
    def plain_states(self) -> list[Mapping[str, Any]]:
        """Those of `states_of_ranks`, which must be of torch's form. Raises EngineError for others."""
        for rank, state in enumerate(self.states_of_ranks):
            if "param_groups" not in state or not any(group.get("moe") for group in state["param_groups"]):
                path = self.folder / OPTIMIZER_FILE.format(rank)
                raise EngineError(f"{path}: holds no optimizer states of torch's form; {_WEIGHTS_ALONE}")
        return self.states_of_ranks

    @property
    def has_states(self) -> bool:
        return bool(self.zero_files or self.states_of_ranks)

    @property
    def is_interleaved(self) -> bool:
        """True where an expert's ranks lie side by side, and those of an expert-parallel group apart."""
        config = self.main.get("ds_config")
        return bool(config.get(INTERLEAVED)) if isinstance(config, Mapping) else False

    def ep_size(self) -> int:
        """That of the run that saved. Raises EngineError where the files do not tell."""
        if self.states_of_ranks:
            return len(self.states_of_ranks)
        saved = saved_ep_size(str(self.folder.parent), self.folder.name)
        if saved is None:
            raise EngineError(f"{self.folder}: does not tell the ep_size that saved it; {_WEIGHTS_ALONE}")
        return saved


def target_grid(checkpoint: ExpertCheckpoint, ep_size: int, config: Mapping[str, Any], ranks: int | None) -> RankGrid:
    """The ranks of the target: by default as many as saved it. Raises ConfigError where experts cannot be shared so."""
    for layer, size in checkpoint.num_experts.items():
        if size % ep_size:
            raise ConfigError(
                f"{SECTION}.ep_size={ep_size} does not divide the {size} experts of {layer}; choose a divisor"
            )
    world_size = ranks or int(checkpoint.main.get("dp_world_size") or ep_size)
    is_interleaved = bool(config.get(INTERLEAVED, checkpoint.is_interleaved))
    return RankGrid(world_size=world_size, ep_size=ep_size, data_before_expert=is_interleaved)


def target_files(
    checkpoint: ExpertCheckpoint, tag: str, grid: RankGrid, config: Mapping[str, Any], with_states: bool
) -> Iterator[TargetFile]:
    """The files of the checkpoint for the ranks of `grid`; reads names and shapes."""
    own: dict[str, Any] = {"ds_config": dict(config) | {INTERLEAVED: grid.data_before_expert}, "optimizer": None}
    # DeepSpeed divides optimizer states by the data-parallel world: of none there are none.
    own |= {"dp_world_size": grid.world_size if with_states else 0, "param_shapes": None}
    states: list[TargetFile] = []
    if with_states and checkpoint.zero_files:
        groups, states = _zero_files(checkpoint, tag, grid)
        own["param_shapes"] = [
            OrderedDict((name, torch.Size(shape)) for name, shape in g.shapes.items()) for g in groups
        ]
    elif with_states:
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.first_experts.items()}
        plain = PlainStates(checkpoint.folder, checkpoint.plain_states, shapes, checkpoint.num_experts, grid.ep_size)
        reads = tuple(checkpoint.folder / OPTIMIZER_FILE.format(rank) for rank in range(len(checkpoint.plain_states)))
        states = list(plain.files(tag, reads))
    main = {**checkpoint.main, **_frozen(checkpoint, grid.ep_size), **own}
    dense_bytes = sum(value.nbytes for value in main["module"].values() if isinstance(value, Tensor))
    path = checkpoint.folder / MAIN_FILE
    yield TargetFile(f"{tag}/{MAIN_FILE}", dense_bytes, partial(torch.save, main), (path,))
    for path in checkpoint.experts():
        num_bytes = sum(tensor.nbytes for tensor in load_file(path).values())
        yield TargetFile(f"{tag}/{path.name}", num_bytes, partial(_copy, path), (path,))
    yield from states


def _copy(source: Path, target: Path) -> None:
    torch.save(load_file(source), target)


def _zero_files(
    checkpoint: ExpertCheckpoint, tag: str, grid: RankGrid
) -> tuple[list[ParameterGroup], list[TargetFile]]:
    folder, paths = checkpoint.folder, checkpoint.zero_files
    saved = {rank: load_file(path) for rank, path in paths.items()}  # refuses what would run code
    config = checkpoint.main.get("ds_config")
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {}
    if isinstance(zero, Mapping) and zero.get("round_robin_gradients"):
        raise EngineError(
            f"{folder}: zero_optimization.round_robin_gradients lays parameters in an order of the number of ranks; "
            f"{_WEIGHTS_ALONE}, or load it with engine.load_checkpoint, which cuts states anew"
        )
    ep_size = checkpoint.ep_size()
    states = SavedStates(folder, ep_size, checkpoint.is_interleaved, checkpoint.num_experts)
    first = saved[0]
    options = states.groups
    if is_lean(first["optimizer_state_dict"]):
        raise EngineError(
            f"{folder}: elastic states lack the options of their groups; load the folder with engine.load_checkpoint, "
            f"which keeps the run's own, or {_WEIGHTS_ALONE}"
        )
    shapes = checkpoint.main.get("param_shapes") or []
    if len(shapes) != len(options):
        raise EngineError(f"{folder / MAIN_FILE}: lists no shapes of its optimizer's parameters; {_WEIGHTS_ALONE}")
    pairs = zip(shapes, options, strict=True)
    groups = resized((ParameterGroup(each, option) for each, option in pairs), checkpoint.num_experts, grid.ep_size)
    beside = {name: value for name, value in first.items() if name != "optimizer_state_dict"}
    zero_states = ZeroStates(states, groups, grid, checkpoint.num_experts)
    return groups, list(zero_states.files(tag, prefix_of(paths[0]), beside, tuple(paths.values())))


def _frozen(checkpoint: ExpertCheckpoint, ep_size: int) -> dict[str, Any]:
    """The main file's entries for the first rank's parameters that do not train: those of its experts change."""
    shapes, fragments = (checkpoint.main.get(f"frozen_param_{what}") for what in ("shapes", "fragments"))
    if not shapes or not any(EXPERT_NAME.fullmatch(name) for name in shapes):
        return {}
    num_local = {name: size // ep_size for name, size in checkpoint.num_experts.items()}
    mine = of_experts(shapes, num_local)
    found = {"frozen_param_shapes": OrderedDict((name, torch.Size(shape)) for name, shape in mine.items())}
    if fragments:
        layers = list(checkpoint.num_experts)
        of_first = {
            name: tensor
            for layer, prefix in enumerate(layers)
            for index in range(num_experts_of(f"{prefix}.", num_local))
            for name, tensor in load_file(checkpoint.expert_path(layer, index)).items()
        }
        found["frozen_param_fragments"] = OrderedDict((name, of_first.get(name, fragments.get(name))) for name in mine)
    return found
