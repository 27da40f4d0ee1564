"""Optimizer states without ZeRO, in fp32, under another ep_size than they were saved with.

Each expert-parallel rank has a file of torch's: states by the place of a parameter in the optimizer. The places of the
run that saved follow from this run's, as both list the same modules in the same order, with other numbers of experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.engine.checkpoint.reshard import OF_THE_GROUP, num_experts_of
from ds_moe_ep.errors import EngineError

_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)\.(.*)")
_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def can_reshard_plain(optimizer: Any) -> bool:
    """True for an optimizer of torch's that is not wrapped."""
    return isinstance(optimizer, torch.optim.Optimizer)


def load_plain_states(
    engine: Any, folder: Path, ep_rank: int, sizes: tuple[int, int], num_experts: Mapping[str, int]
) -> None:
    """Gives this rank's optimizer its states. `sizes`: the ep_size that saved, and this run's. Local."""
    saved_size = sizes[0]
    files = _files(folder, saved_size)
    name_of = {parameter: name for name, parameter in engine.module.named_parameters()}
    for number, group in enumerate(engine.optimizer.param_groups):
        names = [name_of[parameter] for parameter in group["params"]]
        place_of = {name: place for place, name in enumerate(_names_that_saved(names, saved_size, num_experts))}
        for name, parameter in zip(names, group["params"], strict=True):
            rank, known = _where(name, ep_rank, sizes, num_experts)
            saved = files[rank]
            places = saved["param_groups"][number]["params"]
            if len(places) != len(place_of):
                raise EngineError(
                    f"{folder}: parameter group {number} has {len(places)} parameters there and would have "
                    f"{len(place_of)} here under ep_size={saved_size}; give the model and groups that were saved"
                )
            state = saved["state"].get(places[place_of[known]], {})
            engine.optimizer.state[parameter] = _copied(state, parameter, f"{folder}: {name}")
        saved_group = files[0]["param_groups"][number]
        group.update({key: value for key, value in saved_group.items() if key not in OF_THE_GROUP})


def _files(folder: Path, saved_size: int) -> list[dict[str, Any]]:
    """The optimizer's state of each rank of a group that saved, mapped into memory."""
    paths = {int(m[1]): path for path in folder.iterdir() if (m := _FILE.fullmatch(path.name))}
    absent = [rank for rank in range(saved_size) if rank not in paths]
    if absent:
        raise EngineError(f"{folder}: has no expp_rank_{absent[0]}_*_optim_states.pt; complete the folder")
    loaded = [torch.load(paths[rank], map_location="cpu", mmap=True, weights_only=False) for rank in range(saved_size)]
    states = [each.get("optimizer") for each in loaded]
    if not all(isinstance(state, dict) and "param_groups" in state for state in states):
        raise EngineError(
            f"{folder}: holds no optimizer states of torch's form; load the weights alone: load_checkpoint(..., "
            "load_module_only=True)"
        )
    return states


def _names_that_saved(names: Sequence[str], saved_size: int, num_experts: Mapping[str, int]) -> list[str]:
    """The names of a group in the run that saved: as many experts of each layer as its ranks had."""
    listed: list[str] = []
    done: set[str] = set()
    for name in names:
        match = _EXPERT.fullmatch(name)
        if match is None:
            listed.append(name)
        elif match[1] not in done:  # a layer's experts stand side by side, and the first one says what each has
            done.add(match[1])
            rests = [m[3] for each in names if (m := _EXPERT.fullmatch(each)) and m[1] == match[1] and m[2] == "0"]
            count = num_experts_of(name, num_experts) // saved_size
            listed.extend(f"{match[1]}{index}.{rest}" for index in range(count) for rest in rests)
    return listed


def _where(name: str, ep_rank: int, sizes: tuple[int, int], num_experts: Mapping[str, int]) -> tuple[int, str]:
    """The rank that saved a parameter, and the name that it had there."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return 0, name
    total = num_experts_of(name, num_experts)
    index = ep_rank * (total // sizes[1]) + int(match[2])
    rank, local = divmod(index, total // sizes[0])
    return rank, f"{match[1]}{local}.{match[3]}"


def _copied(state: Mapping[str, Any], parameter: nn.Parameter, path: str) -> dict[str, Any]:
    """The state in memory of its own, on the parameter's device. Raises EngineError for another shape."""
    copied: dict[str, Any] = {}
    for kind, value in state.items():
        if not isinstance(value, Tensor):
            copied[kind] = value
        elif value.dim() == 0:
            copied[kind] = value.clone()  # torch's step stays where it was
        elif value.shape == parameter.shape:
            copied[kind] = value.to(parameter.device, copy=True)
        else:
            raise EngineError(f"{path} has {kind} of {tuple(value.shape)} there and {tuple(parameter.shape)} here")
    return copied
