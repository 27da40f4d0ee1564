"""Optimizer states of ZeRO 1 and 2 under another ep_size, or another number of ranks, than they were saved with.

ZeRO keeps each parameter group as one flat vector, cut over the ranks that hold its parameters. Every file tells which
span of its cut belongs to which parameter. So the states of a parameter can be read out of the files of the ranks that
held it, and written where this run has them:

1. The spans of every file are indexed: (parameter, and of an expert its global index) -> spans in the order of ranks.
2. For each parameter of which this rank keeps a span the whole state is read, one parameter at a time, and its span of
   it is copied: the master weight, and what the optimizer keeps beside it.
3. Steps, learning rates and the loss scale are the same on every rank and are taken from the first file.

Files are mapped into memory, and read where a span lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.errors import EngineError

_EXPERT = re.compile(r"(\.deepspeed_experts\.)(\d+)\.")
_STATES_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MASTER = "the master weight"
OF_THE_GROUP = ("params", "name", "moe")  # options of a parameter group that are this run's own
FORMAT = ("base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings", "zero_stage")


@dataclass(frozen=True)
class StateSpan:
    """Where a part of a parameter's states lies: in the file of a rank, in the cut of a parameter group."""

    rank: int
    group: int
    start: int
    num_values: int


class SavedStates:
    """The optimizer states of a checkpoint, by parameter. Raises EngineError for files in another form."""

    def __init__(self, folder: Path, ep_size: int, data_before_expert: bool, num_experts: Mapping[str, int]) -> None:
        self._folder, self._num_experts = folder, num_experts
        self._files = [self._file(path) for path in _paths(folder)]
        grid = RankGrid(world_size=len(self._files), ep_size=ep_size, data_before_expert=data_before_expert)
        self._spans: dict[str, list[StateSpan]] = {}
        for rank, file in enumerate(self._files):
            for group, spans in enumerate(file["param_slice_mappings"]):
                for name, span in spans.items():
                    key = global_name(name, grid.ep_rank(rank), ep_size, num_experts)
                    self._spans.setdefault(key, []).append(StateSpan(rank, group, int(span.start), int(span.numel)))

    def _file(self, path: Path) -> dict[str, Any]:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # as DeepSpeed itself loads it
        states: dict[str, Any] = saved.get("optimizer_state_dict", {})
        lacking = [name for name in FORMAT if name not in states]
        is_aligned = any(any(paddings) for paddings in states.get("param_alignment_paddings") or ())
        if lacking or is_aligned or isinstance(states[FORMAT[0]], list):
            reason = ", ".join(lacking) or "elastic or aligned"
            raise EngineError(
                f"{path}: holds optimizer states in a form that cannot be cut anew ({reason}); load the "
                "weights alone: load_checkpoint(..., load_module_only=True)"
            )
        return states

    @property
    def first(self) -> dict[str, Any]:
        """States of the first rank: values that all ranks have alike."""
        return self._files[0]

    def of_group(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The optimizer's state and options of the group that a parameter was in."""
        span = self._found(name)[0]
        base = self._files[span.rank]["base_optimizer_state"]
        return base["state"].get(span.group, {}), base["param_groups"][span.group]

    def whole(self, name: str, kind: str, num_values: int) -> Tensor:
        """All values of one state of a parameter, in fp32 and flat."""
        parts = [self._cut(span, kind)[span.start : span.start + span.num_values] for span in self._found(name)]
        values = torch.cat(parts)
        if values.numel() != num_values:
            raise EngineError(
                f"{self._folder}: {name} has {values.numel():,} values of {kind} there and {num_values:,} here; the "
                "checkpoint is of another model"
            )
        return values

    def _cut(self, span: StateSpan, kind: str) -> Tensor:
        file = self._files[span.rank]
        cut: Tensor = (
            file["single_partition_of_fp32_groups"][span.group]
            if kind == _MASTER
            else file["base_optimizer_state"]["state"][span.group][kind]
        )
        return cut.flatten()

    def _found(self, name: str) -> list[StateSpan]:
        if name not in self._spans:
            raise EngineError(
                f"{self._folder}: has no optimizer states of {name}; load the weights alone "
                "(load_checkpoint(..., load_module_only=True)), or give the model that was saved"
            )
        return self._spans[name]


def _paths(folder: Path) -> list[Path]:
    """The files of states by the rank that wrote them. Raises EngineError where one is missing."""
    found = {int(m[1]): path for path in folder.iterdir() if (m := _STATES_FILE.fullmatch(path.name))}
    absent = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if absent:
        raise EngineError(f"{folder}: has no optimizer states of rank {absent[0]}; complete the folder")
    return [found[rank] for rank in sorted(found)]


def global_name(name: str, ep_rank: int, ep_size: int, num_experts: Mapping[str, int]) -> str:
    """A parameter's name with the global index of its expert; `num_experts` is that of each layer, by its name."""
    match = _EXPERT.search(name)
    if match is None:
        return name
    index = ep_rank * (num_experts_of(name, num_experts) // ep_size) + int(match[2])
    return f"{name[: match.end(1)]}{index}.{name[match.end() :]}"


def num_experts_of(name: str, num_experts: Mapping[str, int]) -> int:
    """The number of experts of the layer that a parameter is in."""
    return next(size for layer, size in num_experts.items() if name.startswith(f"{layer}.") or not layer)


def can_reshard(optimizer: Any) -> bool:
    """True for ZeRO 1 and 2 of this release, whose states tell which span belongs to which parameter."""
    names = ("single_partition_of_fp32_groups", "_param_slice_mappings", "param_names", "bit16_groups", "optimizer")
    return all(hasattr(optimizer, name) for name in names) and not hasattr(optimizer, "fp16_partitioned_groups")


def load_states(optimizer: Any, saved: SavedStates, ep_rank: int, ep_size: int, num_experts: Mapping[str, int]) -> None:
    """Gives this rank its part of the saved states. Local."""
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        by_name = {optimizer.param_names[parameter]: parameter for parameter in optimizer.bit16_groups[group]}
        spans = optimizer._param_slice_mappings[group]
        kinds: dict[str, Tensor] = {}
        for name, span in spans.items():
            known = global_name(name, ep_rank, ep_size, num_experts)
            parameter = by_name[name]
            state, options = saved.of_group(known)
            if not kinds:
                kinds = _state_of(optimizer, group, flat, state)
                _take_options(optimizer.optimizer.param_groups[group], options)
            here = parameter._hp_mapping.lp_fragment_address
            for kind, target in (*kinds.items(), (_MASTER, flat.data)):
                values = saved.whole(known, kind, parameter.numel())
                target[span.start : span.start + span.numel].copy_(values[here.start : here.start + here.numel])
    first = saved.first
    for name in ("loss_scaler", "dynamic_loss_scale"):
        if name in first:
            setattr(optimizer, name, first[name])


def _state_of(optimizer: Any, group: int, flat: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vectors of this run's optimizer to fill, by kind; what is one value for all is copied."""
    own = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][0]]
    own.clear()
    vectors: dict[str, Tensor] = {}
    for kind, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.numel() > 1:
            own[kind] = vectors[kind] = torch.zeros_like(flat.data)
        else:
            own[kind] = value.clone() if isinstance(value, Tensor) else value
    return vectors


def _take_options(own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    own.update({name: value for name, value in saved.items() if name not in OF_THE_GROUP})
