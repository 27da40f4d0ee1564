"""Optimizer states of one layout by the names and shares of another: expert parallelism, tensor and pipeline.

1. `find_states` reads which span of which file is whose: ZeRO's cuts, torch's states without ZeRO, or those beside
   master weights of 16 bits (`wrapped_states`), of every model rank. A parameter is known by its name on one device;
   tensor ranks hold shares of it, in their order.
2. `CarriedStates` puts the shares of one parameter at a time together, and cuts from them what a rank of the target
   keeps. Nothing else is in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.engine.checkpoint.convert.groups import own_options
from ds_moe_ep.engine.checkpoint.convert.layout_parameters import Listed, expert_parameters, pipeline_parameters
from ds_moe_ep.engine.checkpoint.convert.plain_states import OPTIMIZER_FILE
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.convert.resize import ExpertCheckpoint
from ds_moe_ep.engine.checkpoint.convert.weight_files import WeightFiles
from ds_moe_ep.engine.checkpoint.convert.wrapped_states import is_wrapped, wrapped_pieces
from ds_moe_ep.engine.checkpoint.reshard import ZERO_FILE, SavedStates, prefix_of
from ds_moe_ep.engine.checkpoint.state_pieces import MASTER, SavedPieces, StatePiece, is_vector
from ds_moe_ep.errors import EngineError
from ds_moe_ep.parallel.tensor import cut_dimension

_ALONE = "take --weights-only, and load with load_module_only=True"


@dataclass(frozen=True)
class Holding:
    """A share of a parameter's states: in which pieces, and under which name there."""

    saved: SavedPieces
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayoutStates:
    """The optimizer states of a checkpoint, by the parameters' names on one device.

    `prefix` is that of ZeRO's files, None without master weights; `beside` stands beside the states in such a file;
    `reads` are all files with states; `num_ranks` saved them.
    """

    holdings: Mapping[str, Sequence[Holding]]
    prefix: str | None
    beside: Mapping[str, Any]
    reads: tuple[Path, ...]
    num_ranks: int
    was_wrapped: bool = False  # 16 bits without ZeRO

    @property
    def is_zero(self) -> bool:
        """True for states with master weights: ZeRO's, and those of 16 bits without it, which take its form."""
        return self.prefix is not None

    @cached_property
    def options(self) -> dict[str, Any]:
        """The optimizer's options, which all parameters have alike. Raises EngineError where they differ."""
        every = {id(each.saved): each.saved for shares in self.holdings.values() for each in shares}.values()
        options = [own_options(group) for saved in every for group in saved.groups]
        if "lr" not in options[0]:
            raise EngineError(f"{self.reads[0]}: elastic states lack the options of their groups; {_ALONE}")
        odd = next((each for each in options if each != options[0]), None)
        if odd is not None:
            name = next(name for name in {**options[0], **odd} if options[0].get(name) != odd.get(name))
            raise EngineError(
                f"{self.reads[0]}: parameter groups have {name}={options[0].get(name)!r} and {odd.get(name)!r}; "
                f"another layout has other groups; {_ALONE}"
            )
        return options[0]

    def check(self) -> None:
        """Raises EngineError where a parameter's states are not whole."""
        for shares in self.holdings.values():
            for each in shares:
                kinds = [kind for kind, value in each.saved.of_group(each.key)[0].items() if is_vector(value)]
                each.saved.check(each.key, [*kinds, MASTER] if self.is_zero else kinds, math.prod(each.shape))


class CarriedStates:
    """The states by the names that the target's ranks have for them: `listed` are those, with their shares."""

    def __init__(self, states: LayoutStates, listed: Iterable[Listed]) -> None:
        self._states = states
        self._listed = {each.key: each for each in listed}
        self.first: Mapping[str, Any] = next(iter(states.holdings.values()))[0].saved.first

    def of_group(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The optimizer's state and options of what a parameter was in."""
        holding = self._states.holdings[self._listed[name].name][0]
        return holding.saved.of_group(holding.key)

    def whole(self, name: str, kind: str, num_values: int) -> Tensor:
        """All values of one state of the target's share of a parameter, flat."""
        listed = self._listed[name]
        shares = self._states.holdings[listed.name]
        dimension = cut_dimension(listed.name)
        parts = [
            each.saved.whole(each.key, kind, math.prod(each.shape)).view(each.shape)
            for each in (shares if dimension is not None else shares[:1])
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dimension or 0)
        found = listed.share.of(whole, listed.name).contiguous().flatten()
        assert found.numel() == num_values, (name, kind, found.numel(), num_values)
        return found


def find_states(
    folder: Path, files: WeightFiles, model: ModelConfig, moe: MoEConfig, config: Mapping[str, Any]
) -> LayoutStates | None:
    """The states in `folder`, whose weights lie in `files`; None where there are none. `config` is the target's.

    Reads names and shapes. Raises EngineError where they are of a form that is not known, or not whole.
    """
    found = _of_pipeline(folder, files, model, moe) if files.is_pipeline else _of_experts(folder, model, moe, config)
    if found is not None:
        found.check()
    return found


def _of_experts(folder: Path, model: ModelConfig, moe: MoEConfig, config: Mapping[str, Any]) -> LayoutStates | None:
    checkpoint = ExpertCheckpoint(folder)
    if not checkpoint.has_states:
        return None
    every = expert_parameters(model, moe, 1)
    ep_size = checkpoint.ep_size()
    if checkpoint.zero_files:
        saved: SavedPieces = SavedStates(folder, ep_size, checkpoint.is_interleaved, checkpoint.num_experts)
        holdings = {each.name: [Holding(saved, each.key, each.shape)] for each in every}
        reads = tuple(checkpoint.zero_files.values())
        return LayoutStates(holdings, prefix_of(reads[0]), _beside(reads[0]), reads, len(reads))
    holdings = {}
    has_masters = all(is_wrapped(state) for state in checkpoint.states_of_ranks)
    for rank, state in enumerate(checkpoint.states_of_ranks if has_masters else checkpoint.plain_states):
        listed = expert_parameters(model, moe, ep_size, rank)
        if has_masters:
            pieces = wrapped_pieces(folder, state, listed, config)
            of_rank = [Holding(pieces, each.key, each.shape) for each in listed]
        else:
            of_rank = _plain_holdings(folder, state, listed)
        for each, holding in zip(listed, of_rank, strict=True):
            holdings.setdefault(each.name, [holding])
    reads = tuple(folder / OPTIMIZER_FILE.format(rank) for rank in range(ep_size))
    num_ranks = int(checkpoint.main.get("dp_world_size") or ep_size)
    if not has_masters:
        return LayoutStates(holdings, None, {}, reads, num_ranks)
    is_bf16 = any(tensor.dtype == torch.bfloat16 for tensor in checkpoint.first_experts.values())
    beside = {"ds_config": dict(config), "ds_version": checkpoint.main.get("ds_version")}
    return LayoutStates(holdings, "bf16_" if is_bf16 else "", beside, reads, num_ranks, was_wrapped=True)


def _of_pipeline(folder: Path, files: WeightFiles, model: ModelConfig, moe: MoEConfig) -> LayoutStates | None:
    tp_size = files.places[0].share.count
    layout = Layout(tp_size=tp_size, pp_size=files.num_state_files // tp_size)
    by_rank = pipeline_parameters(model, dataclasses.replace(moe, ep_size=1), layout)
    zero = sorted(path for path in folder.iterdir() if ZERO_FILE.fullmatch(path.name))
    mains = [folder / name for name in files.state_files()]
    holdings: dict[str, list[Holding]] = {}
    for model_rank, listed in enumerate(by_rank):
        if zero:
            saved: SavedPieces = SavedStates(folder, 1, False, {"": moe.num_experts}, model_rank=model_rank)
            of_rank = [Holding(saved, each.key, each.shape) for each in listed]
        else:
            state = load_file(mains[model_rank]).get("optimizer")
            if state is None:
                return None
            of_rank = _plain_holdings(folder, state, listed)
        for each, holding in zip(listed, of_rank, strict=True):
            holdings.setdefault(each.name, []).append(holding)
    if not zero:
        num_copies = int(load_file(mains[0]).get("dp_world_size") or 1)
        return LayoutStates(holdings, None, {}, tuple(mains), num_copies * layout.size)
    return LayoutStates(holdings, prefix_of(zero[0]), _beside(zero[0]), tuple(zero), len(zero))


def _beside(path: Path) -> dict[str, Any]:
    """Everything beside the states in a file of ZeRO's."""
    return {name: value for name, value in load_file(path).items() if name != "optimizer_state_dict"}


def _plain_holdings(folder: Path, state: Any, listed: Sequence[Listed]) -> list[Holding]:
    """Holdings of the parameters in the optimizer's state of one rank, which lists them in that order."""
    if not (isinstance(state, Mapping) and {"state", "param_groups"} <= set(state)):
        raise EngineError(f"{folder}: holds no optimizer states of torch's form; {_ALONE}")
    places = [(place, group) for group in state["param_groups"] for place in group["params"]]
    if len(places) != len(listed):
        raise EngineError(
            f"{folder}: its optimizer has {len(places)} parameters on a rank, and the model of the ds_config "
            f"{len(listed)}; give the model that was saved, or {_ALONE}"
        )
    pieces: dict[str, list[StatePiece]] = {}
    for (place, group), each in zip(places, listed, strict=True):
        own = state["state"].get(place, {})
        odd = next((k for k, v in own.items() if is_vector(v) and tuple(v.shape) != each.shape), None)
        if odd is not None:
            raise EngineError(
                f"{folder}: {odd} of {each.key} is {tuple(own[odd].shape)} there and {each.shape} in the model of the "
                f"ds_config; give the model that was saved, or {_ALONE}"
            )
        pieces[each.key] = [StatePiece(own, group, None, 0, math.prod(each.shape))]
    saved = SavedPieces(folder, pieces, {}, state)
    return [Holding(saved, each.key, each.shape) for each in listed]
