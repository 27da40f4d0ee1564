"""Optimizer states without ZeRO, in fp32, as another ep_size would have saved them.

Each expert-parallel rank has a file of torch's: states by the place of a parameter. What is dense is the same in all of
them; an expert's states move to the file of the rank that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.groups import ParameterGroup, Shapes, of_experts, resized
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.state_pieces import EXPERT_NAME, num_experts_of
from ds_moe_ep.errors import EngineError

OPTIMIZER_FILE = "expp_rank_{}_mp_rank_00_optim_states.pt"


@dataclass(frozen=True)
class PlainStates:
    """The states of `saved`, the optimizer's state of each expert-parallel rank, for `ep_size` ranks.

    `experts` has the shapes of every expert's parameters by name, each layer's with its first expert alone or more.
    """

    folder: Path
    saved: Sequence[Mapping[str, Any]]
    experts: Shapes
    num_experts: Mapping[str, int]
    ep_size: int

    def files(self, tag: str, reads: tuple[Path, ...]) -> Iterator[TargetFile]:
        """A file per expert-parallel rank. Raises EngineError where the states are not of these experts."""
        self._check()
        for rank in range(self.ep_size):
            num_bytes = sum(
                value.nbytes
                for state in self.of_rank(rank)["state"].values()
                for value in state.values()
                if isinstance(value, Tensor)
            )
            name = f"{tag}/{OPTIMIZER_FILE.format(rank)}"
            yield TargetFile(name, num_bytes, partial(self._write, rank), reads)

    def _write(self, rank: int, path: Path) -> None:
        torch.save({"optimizer": self.of_rank(rank)}, path)

    def of_rank(self, rank: int) -> dict[str, Any]:
        """The optimizer's state of a rank, in torch's form; its tensors are mapped from the source."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        count = 0
        for group in self._target_groups():
            holders = [self._holder(name, rank) for name in group.shapes]
            for index, (source, place) in enumerate(holders, start=count):
                state = self.saved[source]["state"].get(place)
                if state is not None:
                    states[index] = state
            groups.append({**group.options, "params": list(range(count, count + len(holders)))})
            count += len(holders)
        return {"state": states, "param_groups": groups}

    def _target_groups(self) -> list[ParameterGroup]:
        """Groups of a rank; a dense parameter's name is its place."""
        dense = [
            ParameterGroup({f"{place}": () for place in group["params"]}, group)
            for group in self.saved[0]["param_groups"]
            if not group.get("moe")
        ]
        options = next(group for group in self.saved[0]["param_groups"] if group.get("moe"))
        return [*dense, *resized([ParameterGroup(self.experts, options)], self.num_experts, self.ep_size)]

    def _holder(self, name: str, rank: int) -> tuple[int, int]:
        """The rank that saved a parameter, and its place there."""
        match = EXPERT_NAME.fullmatch(name)
        if match is None:
            return 0, int(name)
        total = num_experts_of(name, self.num_experts)
        index = rank * (total // self.ep_size) + int(match[2])
        source, local = divmod(index, total // len(self.saved))
        return source, self._places()[f"{match[1]}{local}.{match[3]}"]

    def _places(self) -> dict[str, int]:
        """The places of experts' parameters in every rank's state that was saved."""
        num_local = {name: size // len(self.saved) for name, size in self.num_experts.items()}
        names = of_experts(self.experts, num_local)
        return dict(zip(names, _expert_places(self.saved[0]), strict=True))

    def _check(self) -> None:
        num_local = {name: size // len(self.saved) for name, size in self.num_experts.items()}
        shapes = list(of_experts(self.experts, num_local).values())
        for rank, saved in enumerate(self.saved):
            places = _expert_places(saved)
            found = [saved["state"].get(place, {}) for place in places]
            if len(places) != len(shapes) or not all(map(_fits, found, shapes)):
                raise EngineError(
                    f"{self.folder / OPTIMIZER_FILE.format(rank)}: has states of {len(places)} parameters of experts, "
                    f"and its experts' files {len(shapes)} of these shapes: some do not train, or stand in another "
                    "order; load the folder with engine.load_checkpoint, which knows the model, and save it there"
                )


def _expert_places(saved: Mapping[str, Any]) -> list[int]:
    return [place for group in saved["param_groups"] if group.get("moe") for place in group["params"]]


def _fits(state: Mapping[str, Any], shape: Sequence[int]) -> bool:
    return all(
        tuple(value.shape) == tuple(shape) for value in state.values() if isinstance(value, Tensor) and value.dim()
    )
