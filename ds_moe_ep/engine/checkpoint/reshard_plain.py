"""Optimizer states without ZeRO under another ep_size than they were saved with.

Each expert-parallel rank has a file: states by the place of a parameter in the optimizer. The places of the run that
saved follow from this run's, as both list the same modules in the same order, with other numbers of experts. In 16
bits DeepSpeed wraps the optimizer: a master weight stands beside each parameter, or one flat vector per group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.state_pieces import (
    EXPERT_NAME,
    SavedPieces,
    StatePart,
    StatePiece,
    global_name,
    num_experts_of,
)
from ds_moe_ep.errors import EngineError

_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# What DeepSpeed's 16-bit wrappers keep of the loss scale, on their configuration of it.
LOSS_SCALE = ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


@dataclass(frozen=True)
class Owned:
    """A parameter of this run's optimizer, by the model's name, in the order of its group."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlainRun:
    """This run's optimizer without ZeRO: its expert-parallel place, and the layers' numbers of experts."""

    engine: Any
    ep_rank: int
    ep_size: int
    num_experts: Mapping[str, int]
    stacked: Collection[str]
    model_rank: int = 0  # of a pipeline: its stage

    @property
    def optimizer(self) -> Any:
        return self.engine.optimizer

    @property
    def base(self) -> Any:
        """The optimizer of torch's form."""
        return self.optimizer if isinstance(self.optimizer, torch.optim.Optimizer) else self.optimizer.optimizer

    def groups(self) -> list[list[Owned]]:
        """The parameters of each group."""
        name_of = {parameter: name for name, parameter in self.engine.module.named_parameters()}
        is_wrapped = self.base is not self.optimizer
        groups = self.optimizer.fp16_groups if is_wrapped else [g["params"] for g in self.base.param_groups]
        return [[Owned(name_of.get(each, ""), tuple(each.shape)) for each in group] for group in groups]

    def parts(self) -> Iterator[StatePart]:
        """The part of each parameter's states that this rank keeps. Local."""
        for number, group in enumerate(self.groups()):
            start = 0
            for place, owned in enumerate(group):
                size, is_stacked = math.prod(owned.shape), owned.name in self.stacked
                vectors = self.base.param_groups[number]["params"]
                vector = vectors[0] if self._is_flat else vectors[place]
                known = global_name(owned.name, self.ep_rank, self.ep_size, self.num_experts)
                first, total = (self.ep_rank * size, self.ep_size * size) if is_stacked else (0, size)
                master = None if self.base is self.optimizer else vector.data
                at = start if self._is_flat else 0
                yield StatePart(known, number, vector, master, at, size, first, total)
                start += size

    @property
    def _is_flat(self) -> bool:
        return hasattr(self.optimizer, "fp32_groups_flat")


def can_reshard_plain(optimizer: Any) -> bool:
    """True for an optimizer of torch's that is not wrapped, and for DeepSpeed's 16-bit wrappers without ZeRO."""
    is_wrapped = hasattr(optimizer, "fp16_groups") and (
        hasattr(optimizer, "fp32_groups") or hasattr(optimizer, "fp32_groups_flat")
    )
    return isinstance(optimizer, torch.optim.Optimizer) or is_wrapped


def plain_states(run: PlainRun, folder: Path, saved_size: int) -> SavedPieces:
    """The states in the files that `saved_size` expert-parallel ranks saved, by parameter.

    Raises EngineError where they are of another form, or of another model than this run's.
    """
    files = _files(folder, saved_size, run.model_rank)
    pieces: dict[str, list[StatePiece]] = {}
    for number, group in enumerate(run.groups()):
        listed = _that_saved(group, run, saved_size)
        for rank, file in enumerate(files):
            _check_places(folder, file, number, len(listed), saved_size)
            for owned, piece in zip(listed, _pieces(folder, file, number, listed), strict=True):
                if owned.name in run.stacked:
                    offset = rank * piece.num_values
                    moved = StatePiece(piece.state, piece.options, piece.master, piece.start, piece.num_values, offset)
                    pieces.setdefault(owned.name, []).append(moved)
                elif rank == 0 or EXPERT_NAME.fullmatch(owned.name):
                    pieces[global_name(owned.name, rank, saved_size, run.num_experts)] = [piece]
    return SavedPieces(folder, pieces, files[0], _base(files[0]))


def take_loss_scale(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Gives a 16-bit wrapper the loss scale of the run that saved."""
    config = getattr(optimizer, "loss_scale_config", None)
    for name in LOSS_SCALE if config is not None else ():
        if name in saved:
            setattr(config, name, saved[name])


def _base(file: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of torch's optimizer: wrapped, or alone."""
    found: Mapping[str, Any] = file.get("optimizer_state_dict", file)
    return found


def _files(folder: Path, saved_size: int, model_rank: int) -> list[dict[str, Any]]:
    """The optimizer's state of each rank of a group that saved, mapped into memory."""
    found = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    paths = {int(match[1]): path for match, path in found if match and int(match[2]) == model_rank}
    absent = [rank for rank in range(saved_size) if rank not in paths]
    if absent:
        raise EngineError(f"{folder}: has no expp_rank_{absent[0]}_*_optim_states.pt; complete the folder")
    loaded = [load_file(paths[rank]) for rank in range(saved_size)]
    states = [each.get("optimizer") if isinstance(each, Mapping) else None for each in loaded]
    if not all(isinstance(each, dict) and {"state", "param_groups"} <= set(_base(each)) for each in states):
        raise EngineError(
            f"{folder}: holds no optimizer states of torch's form; load the weights alone: load_checkpoint(..., "
            "load_module_only=True)"
        )
    return [each for each in states if each is not None]


def _check_places(folder: Path, file: Mapping[str, Any], number: int, planned: int, saved_size: int) -> None:
    groups = _base(file)["param_groups"]
    there = len(groups[number]["params"]) if number < len(groups) else 0
    if "fp32_groups_flat" in file:
        planned = 1
    elif "fp32_groups" in file and number < len(file["fp32_groups"]):
        there = min(there, len(file["fp32_groups"][number]))
    if there != planned:
        raise EngineError(
            f"{folder}: parameter group {number} has {there} parameters there and would have {planned} here under "
            f"ep_size={saved_size}; give the model and groups that were saved"
        )


def _pieces(folder: Path, file: Mapping[str, Any], number: int, listed: Sequence[Owned]) -> Iterator[StatePiece]:
    """The piece of each parameter of a group in a rank's file."""
    base = _base(file)
    options = base["param_groups"][number]
    flat = file.get("fp32_groups_flat")
    start = 0
    for place, owned in enumerate(listed):
        size = math.prod(owned.shape)
        state = base["state"].get(options["params"][0 if flat else place], {})
        if flat:
            yield StatePiece(state, options, flat[number], start, size)
        else:
            master = file["fp32_groups"][number][place] if "fp32_groups" in file else None
            _check_shapes(f"{folder}: {owned.name}", {**state, "the master weight": master}, owned.shape)
            yield StatePiece(state, options, master, 0, size)
        start += size


def _check_shapes(path: str, state: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for kind, value in state.items():
        if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shape:
            raise EngineError(f"{path} has {kind} of {tuple(value.shape)} there and {shape} here; give the saved model")


def _that_saved(group: Sequence[Owned], run: PlainRun, saved_size: int) -> list[Owned]:
    """A group in the run that saved: as many experts of each layer as its ranks had."""
    if saved_size == run.ep_size:
        return list(group)
    listed: list[Owned] = []
    done: set[str] = set()
    for owned in group:
        match = EXPERT_NAME.fullmatch(owned.name)
        if owned.name in run.stacked:
            experts = owned.shape[0] * run.ep_size // saved_size
            listed.append(Owned(owned.name, (experts, *owned.shape[1:])))
        elif match is None:
            listed.append(owned)
        elif match[1] not in done:  # a layer's experts stand side by side, and the first one says what each has
            done.add(match[1])
            mine = ((each, EXPERT_NAME.fullmatch(each.name)) for each in group)
            rests = [(m[3], each.shape) for each, m in mine if m and m[1] == match[1] and m[2] == "0"]
            count = num_experts_of(owned.name, run.num_experts) // saved_size
            listed.extend(Owned(f"{match[1]}{index}.{rest}", shape) for index in range(count) for rest, shape in rests)
    return listed
