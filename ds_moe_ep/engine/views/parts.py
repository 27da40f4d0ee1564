"""Parts of a viewed layer: tensors of an expert where the model has them, its routing, one answer of its gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ds_moe_ep.engine.state.optimizer_view import OwnSpan, whole_shape


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a local expert where the model has it: a parameter, or its slice along the first dimension."""

    name: str  # the parameter's, in the model
    parameter: nn.Parameter
    index: int | None = None

    def of(self, stored: Tensor) -> Tensor:
        """This tensor's part of what has the parameter's shape."""
        return stored if self.index is None else stored[self.index]

    @property
    def num_values(self) -> int:
        """Numbers in it."""
        shape = whole_shape(self.parameter)
        return math.prod(shape if self.index is None else shape[1:])

    def in_span(self, span: OwnSpan) -> OwnSpan:
        """The part of a span of the parameter that is this tensor's."""
        start = (self.index or 0) * self.num_values
        return span.within(start, start + self.num_values)


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """The routing that a layer's configuration asks for."""

    top_k: int
    score: str
    renormalizes: bool
    scale: float = 1.0
    num_groups: int = 0  # of experts, of which `kept_groups` are chosen first; 0: none
    kept_groups: int = 0
    group_score: str = ""
    is_drawn: bool = False  # noise takes part in the choice, or recorded routes are replayed
    moves_input: bool = False  # noise on the gate's input, or no gate at all: the routing cannot be computed again


@dataclass(frozen=True)
class Routed:
    """One answer of a gate: experts [T, K], weights [T, K] with their graph, and the choices that keep a place."""

    ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor
    hides_dropped: bool = False  # the gate does not say which experts a dropped choice was for
