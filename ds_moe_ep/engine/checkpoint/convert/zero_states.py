"""ZeRO's optimizer states of a checkpoint as another ep_size, or another number of ranks, would have saved them.

Each rank's file holds its cut of every parameter group: master weights, what the optimizer keeps beside them, and which
span belongs to which parameter. The states of one parameter at a time are read and laid where the rank keeps them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine.checkpoint.convert.groups import ParameterGroup
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.reshard import SavedStates
from ds_moe_ep.engine.checkpoint.state_pieces import MASTER, global_name

ALIGNMENT = 2  # values of a cut, for each rank of its group


@dataclass(frozen=True)
class GroupCut:
    """A rank's part of a parameter group: values `first` to `first + size` of the group's, padded at the end."""

    first: int
    size: int
    padding: int
    num_ranks: int


def cut_of(group: ParameterGroup, rank: int, grid: RankGrid) -> GroupCut:
    """A rank's part, as ZeRO cuts it over the ranks that hold the group's parameters."""
    ranks: Sequence[int] = range(grid.world_size)
    if group.is_of_experts:
        ranks = next(holders for holders in grid.expert_data_groups() if rank in holders)
    count, num_values = len(ranks), group.num_values
    size = -(-num_values // (ALIGNMENT * count)) * ALIGNMENT
    first = ranks.index(rank) * size
    return GroupCut(first, size, min(max(first + size - num_values, 0), size), count)


class StatesByName(Protocol):
    """Saved states by the names that the target's ranks have, experts counted over all of them."""

    @property
    def first(self) -> Mapping[str, Any]:
        """The first rank's states, with what all ranks have alike."""

    def of_group(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The optimizer's state and options of what a parameter was in."""

    def whole(self, name: str, kind: str, num_values: int) -> Tensor:
        """All values of one state of a parameter, flat."""


@dataclass(frozen=True)
class ZeroStates:
    """The states to write: read from `saved`, for the ranks of `grid`, which are those of one model rank."""

    saved: StatesByName
    groups: Sequence[ParameterGroup]
    grid: RankGrid
    num_experts: Mapping[str, int]
    model_rank: int = 0

    def files(self, tag: str, prefix: str, beside: Mapping[str, Any], reads: tuple[Path, ...]) -> Iterator[TargetFile]:
        """A file per rank; `beside` is what stands beside the states in each."""
        for rank in range(self.grid.world_size):
            name = f"{tag}/{prefix}zero_pp_rank_{rank}_mp_rank_{self.model_rank:02d}_optim_states.pt"
            yield TargetFile(name, self._num_bytes(rank), partial(self._write, rank, beside), reads)

    def _num_bytes(self, rank: int) -> int:
        total = 0
        for group in self.groups:
            state, _ = self.saved.of_group(self._known(next(iter(group.shapes)), rank))
            kinds = [value.element_size() for value in state.values() if is_vector(value)]
            master = self.saved.first["single_partition_of_fp32_groups"][0].element_size()
            total += cut_of(group, rank, self.grid).size * (sum(kinds) + master)
        return total

    def _known(self, name: str, rank: int) -> str:
        return global_name(name, self.grid.ep_rank(rank), self.grid.ep_size, self.num_experts)

    def _write(self, rank: int, beside: Mapping[str, Any], path: Path) -> None:
        torch.save({**beside, "optimizer_state_dict": self.of_rank(rank)}, path)

    def of_rank(self, rank: int) -> dict[str, Any]:
        """The states of a rank in the form of DeepSpeed's files."""
        first = self.saved.first
        cuts = [cut_of(group, rank, self.grid) for group in self.groups]
        masters, states, spans = [], {}, []
        for index, (group, cut) in enumerate(zip(self.groups, cuts, strict=True)):
            master, state, of_group = self._group_on(rank, group, cut)
            masters.append(master[: cut.size - cut.padding].clone())
            states[index] = state
            spans.append(of_group)
        options = [{**group.options, "params": [index]} for index, group in enumerate(self.groups)]
        own = {
            "base_optimizer_state": {"state": states, "param_groups": options},
            "single_partition_of_fp32_groups": masters,
            "group_paddings": [cut.padding for cut in cuts],
            "param_alignment_paddings": [[0] * len(group.shapes) for group in self.groups],
            "partition_count": [cut.num_ranks for cut in cuts],
            "param_slice_mappings": spans,
        }
        return {name: own.get(name, value) for name, value in first.items()}

    def _group_on(
        self, rank: int, group: ParameterGroup, cut: GroupCut
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """The master weights, states and spans of a rank's part of a group."""
        state, _ = self.saved.of_group(self._known(next(iter(group.shapes)), rank))
        kinds = [MASTER, *(kind for kind, value in state.items() if is_vector(value))]
        vectors: dict[str, Tensor] = {}
        spans: dict[str, Any] = OrderedDict()
        offset = 0
        for name, shape in group.shapes.items():
            num_values = math.prod(shape)
            start, stop = max(offset, cut.first), min(offset + num_values, cut.first + cut.size)
            if start < stop:
                spans[name] = fragment_address(numel=stop - start, start=start - cut.first)
            for kind in kinds if start < stop or kinds[0] not in vectors else ():
                whole = self.saved.whole(self._known(name, rank), kind, num_values)
                here = vectors.setdefault(kind, torch.zeros(cut.size, dtype=whole.dtype))
                if start < stop:
                    here[start - cut.first : stop - cut.first] = whole[start - offset : stop - offset]
            offset += num_values
        states = {kind: vectors[kind] if kind in vectors else _own(value) for kind, value in state.items()}
        return vectors[MASTER], states, spans


def master_weight(saved: SavedStates, name: str, shape: Sequence[int]) -> Tensor:
    """A parameter's master weight, whole and in fp32."""
    return saved.whole(name, MASTER, math.prod(shape)).view(*shape).float()


def is_vector(value: Any) -> bool:
    """True for a state with a value for each of the parameter's; False for what is one for all."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 1


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
