"""Parameter groups of an optimizer as another ep_size has them: which parameters they hold, in which order.

DeepSpeed lists a layer's experts side by side, puts the parameters of experts into groups of their own behind the
others, and begins another group where one would hold more than so many values. All of that follows from names and
shapes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from ds_moe_ep.engine.checkpoint.state_pieces import EXPERT_NAME, OF_THE_GROUP, num_experts_of

Shapes = Mapping[str, Sequence[int]]  # of a rank's parameters, by their names there, in their order


@dataclass(frozen=True)
class ParameterGroup:
    """A parameter group of one rank; `options` are the optimizer's."""

    shapes: Shapes
    options: Mapping[str, Any]

    @property
    def is_of_experts(self) -> bool:
        return any(EXPERT_NAME.fullmatch(name) for name in self.shapes)

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def resized(groups: Iterable[ParameterGroup], num_experts: Mapping[str, int], ep_size: int) -> list[ParameterGroup]:
    """The groups that a rank of `ep_size` ranks has; `num_experts` is that of each layer, by its name."""
    found: list[ParameterGroup] = []
    for group in _whole_groups(groups):
        if not group.is_of_experts:
            found.append(group)
            continue
        options = {**group.options, "name": f"ep_size_{ep_size}"} if "name" in group.options else group.options
        shapes = of_experts(group.shapes, {name: size // ep_size for name, size in num_experts.items()})
        found.extend(ParameterGroup(part, options) for part in cut_group(shapes))
    return found


def most_values() -> int:
    """Values that DeepSpeed puts into one group of experts' parameters at most."""
    parameters = inspect.signature(split_params_into_different_moe_groups_for_optimizer).parameters
    return int(parameters["max_group_size"].default)


def of_experts(shapes: Shapes, num_local: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """The parameters of so many experts per layer, side by side, each with the names that the first one has."""
    by_layer: dict[str, dict[str, Sequence[int]]] = {}
    first: dict[str, str] = {}
    found: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        match = EXPERT_NAME.fullmatch(name)
        if match is None:
            found[name] = shape
        elif first.setdefault(match[1], match[2]) == match[2]:
            by_layer.setdefault(match[1], {})[match[3]] = shape
    for prefix, rests in by_layer.items():
        for index in range(num_experts_of(prefix, num_local)):
            found |= {f"{prefix}{index}.{rest}": shape for rest, shape in rests.items()}
    return found


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group without what names its parameters."""
    return {name: value for name, value in options.items() if name not in OF_THE_GROUP}


def _whole_groups(groups: Iterable[ParameterGroup]) -> Iterator[ParameterGroup]:
    """The groups as they were before DeepSpeed cut them: those that one more parameter would have made too large."""
    last: ParameterGroup | None = None
    for group in groups:
        if last is not None and _continues(last, group):
            last = replace(last, shapes={**last.shapes, **group.shapes})
            continue
        if last is not None:
            yield last
        last = group
    if last is not None:
        yield last


def _continues(last: ParameterGroup, group: ParameterGroup) -> bool:
    if not (last.is_of_experts and group.is_of_experts) or own_options(last.options) != own_options(group.options):
        return False
    next_values = math.prod(next(iter(group.shapes.values())))
    of_last_cut = list(cut_group(last.shapes))[-1]
    return sum(math.prod(shape) for shape in of_last_cut.values()) + next_values > most_values()


def cut_group(shapes: Shapes) -> Iterator[dict[str, Sequence[int]]]:
    """Runs of parameters as DeepSpeed cuts them."""
    cut: dict[str, Sequence[int]] = {}
    num_values, most = 0, most_values()
    for name, shape in shapes.items():
        values = math.prod(shape)
        if cut and num_values + values > most:
            yield cut
            cut, num_values = {}, 0
        cut[name] = shape
        num_values += values
    if cut:
        yield cut
