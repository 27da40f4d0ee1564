"""Files of optimizer states in another layout than they were saved in, as DeepSpeed itself writes and loads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.section import SECTION
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine.checkpoint.convert.groups import ParameterGroup, cut_group
from ds_moe_ep.engine.checkpoint.convert.layout_parameters import Listed, expert_parameters, pipeline_parameters
from ds_moe_ep.engine.checkpoint.convert.layout_states import CarriedStates, LayoutStates
from ds_moe_ep.engine.checkpoint.convert.output import TargetFile
from ds_moe_ep.engine.checkpoint.convert.plain_states import OPTIMIZER_FILE
from ds_moe_ep.engine.checkpoint.convert.zero_states import ZeroStates
from ds_moe_ep.engine.checkpoint.state_pieces import is_vector
from ds_moe_ep.errors import ConfigError

DENSE = "dense-params"  # DeepSpeed's name of the group


@dataclass(frozen=True)
class PipelineStates:
    """States for the ranks of a pipeline, `num_copies` of which hold the same share of a stage."""

    states: LayoutStates
    by_rank: Sequence[Sequence[Listed]]
    num_copies: int

    def of_run(self, model_rank: int) -> dict[str, Any]:
        """Entries of a model rank's file with the state of the run."""
        listed = self.by_rank[model_rank]
        shapes = [OrderedDict((each.key, torch.Size(each.shape)) for each in listed)]
        if self.states.is_zero:
            return {"dp_world_size": self.num_copies, "optimizer": None, "param_shapes": shapes}
        return {"dp_world_size": self.num_copies, "optimizer": self._plain(listed)}

    def num_bytes(self, model_rank: int) -> int:
        """Bytes of the states in that file."""
        return 0 if self.states.is_zero else plain_bytes(self.states, self.by_rank[model_rank])

    def files(self, tag: str) -> Iterator[TargetFile]:
        """The files beside them: ZeRO's."""
        grid = RankGrid(world_size=self.num_copies, ep_size=1)
        for model_rank, listed in enumerate(self.by_rank if self.states.is_zero else ()):
            group = ParameterGroup({each.key: each.shape for each in listed}, self.states.options)
            carried = CarriedStates(self.states, listed)
            num_experts = {"": 1}  # each expert's key is already its own: there is one rank of experts
            zero = ZeroStates(carried, [group], grid, num_experts, model_rank)
            yield from zero.files(tag, self.states.prefix or "", self.states.beside, self.states.reads)

    def _plain(self, listed: Sequence[Listed]) -> dict[str, Any]:
        return plain_optimizer(CarriedStates(self.states, listed), [(listed, self.states.options)])


@dataclass(frozen=True)
class ExpertStates:
    """States for ranks that share experts. `of_rank` lists the parameters of each expert-parallel rank."""

    states: LayoutStates
    of_rank: Sequence[Sequence[Listed]]
    grid: RankGrid
    num_experts: Mapping[str, int]

    def of_run(self) -> dict[str, Any]:
        """Entries of the file with the dense weights."""
        groups = self._groups() if self.states.is_zero else []
        shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in each.shapes.items()) for each in groups]
        return {"dp_world_size": self.grid.world_size, "param_shapes": shapes or None, "optimizer": None}

    def files(self, tag: str) -> Iterator[TargetFile]:
        """The files of states: one per rank under ZeRO, else one per expert-parallel rank."""
        if self.states.is_zero:
            carried = CarriedStates(self.states, {each.key: each for rank in self.of_rank for each in rank}.values())
            zero = ZeroStates(carried, self._groups(), self.grid, self.num_experts)
            yield from zero.files(tag, self.states.prefix or "", self.states.beside, self.states.reads)
            return
        for rank, listed in enumerate(self.of_rank):
            num_bytes = plain_bytes(self.states, listed)
            write = partial(self._write_plain, listed)
            yield TargetFile(f"{tag}/{OPTIMIZER_FILE.format(rank)}", num_bytes, write, self.states.reads)

    def _options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of the dense group and of experts'."""
        options = self.states.options
        of_experts = {**options, "name": f"ep_size_{self.grid.ep_size}", "moe": True}
        return {**options, "name": DENSE}, of_experts

    def _groups(self) -> list[ParameterGroup]:
        """The groups of a rank, whose experts are counted from 0."""
        return [
            ParameterGroup({each.key: each.shape for each in listed}, options)
            for listed, options in self._split(self.of_rank[0])
        ]

    def _split(self, listed: Sequence[Listed]) -> list[tuple[list[Listed], dict[str, Any]]]:
        """A rank's parameters as DeepSpeed groups them, and each group's options."""
        dense, of_experts = self._options()
        by_key = {each.key: each for each in listed}
        parts = cut_group({each.key: each.shape for each in listed if each.is_of_expert})
        groups = [([by_key[name] for name in part], of_experts) for part in parts]
        return [([each for each in listed if not each.is_of_expert], dense), *groups]

    def _write_plain(self, listed: Sequence[Listed], path: Path) -> None:
        torch.save({"optimizer": plain_optimizer(CarriedStates(self.states, listed), self._split(listed))}, path)


def pipeline_states(
    states: LayoutStates, model: ModelConfig, moe: MoEConfig, layout: Layout, num_copies: int | None
) -> PipelineStates:
    """The states for a pipeline; by default on as many ranks in all as saved them, where these can be shared so."""
    whole = states.num_ranks // layout.size if states.num_ranks % layout.size == 0 else 1
    return PipelineStates(states, pipeline_parameters(model, moe, layout), num_copies or max(whole, 1))


def expert_states(
    states: LayoutStates, model: ModelConfig, moe: MoEConfig, num_ranks: int | None, data_before_expert: bool
) -> ExpertStates:
    """The states for ranks that share experts; by default as many as saved them."""
    world_size = num_ranks or states.num_ranks
    grid = RankGrid(world_size=world_size, ep_size=moe.ep_size, data_before_expert=data_before_expert)
    of_rank = [expert_parameters(model, moe, moe.ep_size, rank) for rank in range(moe.ep_size)]
    layers = {f"layers.{index}.feed_forward": moe.num_experts for index in range(model.num_layers)}
    return ExpertStates(states, of_rank, grid, layers)


def refuse_stage(states: LayoutStates, config: Mapping[str, Any], is_pipeline: bool) -> None:
    """Raises ConfigError where the target's ds_config names a stage of ZeRO that does not load such states."""
    zero = config.get("zero_optimization")
    stage = int(zero.get("stage", 0)) if isinstance(zero, Mapping) else 0 if states.was_wrapped else None
    stages = ((1,) if is_pipeline else (1, 2)) if states.is_zero else (0,)
    if stage is not None and stage not in stages:
        saved = "with master weights" if states.is_zero else "without ZeRO"
        raise ConfigError(
            f"zero_optimization.stage={stage}: the source has optimizer states {saved}, which load with stage "
            f"{' or '.join(map(str, stages))} there; give that one, or take --weights-only ({SECTION} of a pipeline "
            "takes no stage above 1)"
        )


def plain_optimizer(
    carried: CarriedStates, groups: Sequence[tuple[Sequence[Listed], Mapping[str, Any]]]
) -> dict[str, Any]:
    """The state of torch's optimizer over these groups."""
    states: dict[int, Any] = {}
    written: list[dict[str, Any]] = []
    for listed, options in groups:
        start = len(states)
        for place, each in enumerate(listed, start=start):
            state, _ = carried.of_group(each.key)
            states[place] = {
                kind: _shaped(carried, each, kind) if is_vector(value) else _own(value) for kind, value in state.items()
            }
        written.append({**options, "params": list(range(start, start + len(listed)))})
    return {"state": states, "param_groups": written}


def plain_bytes(states: LayoutStates, listed: Sequence[Listed]) -> int:
    """Bytes of the states of these parameters without ZeRO."""
    total = 0
    for each in listed:
        holding = states.holdings[each.name][0]
        vectors = [value for value in holding.saved.of_group(holding.key)[0].values() if is_vector(value)]
        total += torch.Size(each.shape).numel() * sum(vector.element_size() for vector in vectors)
    return total


def _shaped(carried: CarriedStates, listed: Listed, kind: str) -> Tensor:
    shape = torch.Size(listed.shape)
    return carried.whole(listed.key, kind, shape.numel()).view(shape).clone()


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
