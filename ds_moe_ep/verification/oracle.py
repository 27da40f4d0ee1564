"""The dense oracle: a layer's experts in turn on one rank, over all tokens of their group, in float64.

It takes what went into a layer and the gradient that came back to it, and computes what the layer must have computed:
output, gradients of tokens, of routing weights, and of each expert. Beside the exact one runs a second, whose inputs
and results are each moved by one unit in the last place of the run's own type (`engine/views/moved.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import SEED, ExactAndMoved, moved
from ds_moe_ep.engine.views.observe import ObservedPass

Weights = Mapping[str, Tensor]


@dataclass
class OracleLayer:
    """The oracle's answers on one layer for this rank: its tokens, pass by pass, and its own experts' gradients."""

    y_TD: list[ExactAndMoved] = field(default_factory=list)
    dx_TD: list[ExactAndMoved] = field(default_factory=list)
    dweights_TK: list[ExactAndMoved] = field(default_factory=list)
    experts: list[dict[str, ExactAndMoved]] = field(default_factory=list)  # by local expert; of this group alone
    rows_L: list[int] = field(default_factory=list)  # that reached each local expert, from the whole group


@dataclass
class _Side:
    """One rank's pass, exact or moved, on its way through the experts."""

    x_TD: Tensor
    weights_TK: Tensor
    dy_TD: Tensor
    y_TD: Tensor
    dx_TD: Tensor
    dweights_TK: Tensor

    @classmethod
    def of(cls, seen: ObservedPass, move: Callable[[Tensor], Tensor]) -> _Side:
        assert seen.weights_TK is not None and seen.dy_TD is not None
        x_TD, dy_TD = move(seen.x_TD.double()), move(seen.dy_TD.double())
        weights_TK = move(seen.weights_TK.double())
        return cls(
            x_TD, weights_TK, dy_TD, torch.zeros_like(x_TD), torch.zeros_like(x_TD), torch.zeros_like(weights_TK)
        )


def through_expert(
    compute: Callable[[Weights, Tensor], Tensor], weights: Weights, side: _Side, chosen_MK: Tensor, weighs_rows: bool
) -> dict[str, Tensor]:
    """Takes the tokens that chose an expert through it, forward and backward; returns its gradients."""
    tokens_M, choices_M = chosen_MK.unbind(1)
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    x_MD = side.x_TD[tokens_M].requires_grad_()
    weight_M1 = side.weights_TK[tokens_M, choices_M][:, None].clone().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        result_MD = compute(leaves, x_MD * weight_M1 if weighs_rows else x_MD)
        result_MD = result_MD if weighs_rows else result_MD * weight_M1
    wanted = [x_MD, weight_M1, *leaves.values()]
    found = torch.autograd.grad(result_MD, wanted, side.dy_TD[tokens_M], allow_unused=True)
    gradients = [torch.zeros_like(each) if g is None else g for each, g in zip(wanted, found, strict=True)]
    side.y_TD.index_add_(0, tokens_M, result_MD.detach())
    side.dx_TD.index_add_(0, tokens_M, gradients[0])
    side.dweights_TK[tokens_M, choices_M] += gradients[1][:, 0]
    return dict(zip(leaves, gradients[2:], strict=True))


class Oracle:
    """The oracle of one layer. Every rank of the layer's group asks it; the first one computes."""

    def __init__(self, layer: ViewedLayer) -> None:
        self._layer, self._group = layer, layer.group
        self._size = 1 if self._group is None else dist.get_world_size(self._group)
        self._leader = dist.get_rank() if self._group is None else dist.get_global_rank(self._group, 0)
        self._generator = torch.Generator().manual_seed(SEED)

    def ask(self, passes: Sequence[ObservedPass]) -> OracleLayer:
        """The oracle's answers. Collective over the layer's group; raises on every rank of it where it fails."""
        told = self._gathered(list(passes))
        sides: list[list[tuple[_Side, _Side]]] = []
        if told is not None:
            sides = [[self._sides(seen) for seen in theirs] for theirs in told]
        answer = OracleLayer()
        for local in range(self._layer.num_local):
            everyone = self._gathered(self._layer.expert_values(local))
            gradients, rows = self._scattered(partial(self._experts, local, everyone, told, sides))
            answer.experts.append(gradients)
            answer.rows_L.append(rows)
        mine = self._scattered(
            lambda: [self._results(theirs, seen) for theirs, seen in zip(sides, told or [], strict=True)]
        )
        answer.y_TD, answer.dx_TD, answer.dweights_TK = mine
        return answer

    def _sides(self, seen: ObservedPass) -> tuple[_Side, _Side]:
        return _Side.of(seen, lambda values: values), _Side.of(
            seen, lambda values: moved(values, seen.type, self._generator)
        )

    def _experts(
        self,
        local: int,
        everyone: list[Weights] | None,
        told: list[list[ObservedPass]] | None,
        sides: list[list[tuple[_Side, _Side]]],
    ) -> list[tuple[dict[str, ExactAndMoved], int]]:
        """The answers on one expert of each rank, in the ranks' order."""
        assert everyone is not None and told is not None, "on the leader alone"
        first = range(local, self._size * self._layer.num_local, self._layer.num_local)
        return [self._expert(expert, theirs, told, sides) for expert, theirs in zip(first, everyone, strict=True)]

    def _expert(
        self, expert: int, weights: Weights, told: list[list[ObservedPass]], sides: list[list[tuple[_Side, _Side]]]
    ) -> tuple[dict[str, ExactAndMoved], int]:
        """The gradients of one expert over all ranks' passes, and its rows."""
        total = {name: ExactAndMoved(torch.zeros_like(each), torch.zeros_like(each)) for name, each in weights.items()}
        num_rows = 0
        for passes, theirs in zip(told, sides, strict=True):
            for seen, (exact, other) in zip(passes, theirs, strict=True):
                assert seen.ids_TK is not None and seen.kept_TK is not None
                chosen_MK = ((seen.ids_TK == expert) & seen.kept_TK).nonzero()
                if not len(chosen_MK):
                    continue
                num_rows += len(chosen_MK)
                step: Callable[[Tensor], Tensor] = partial(self._moved, seen.type)
                near = {name: step(weight) for name, weight in weights.items()}
                arguments = chosen_MK, self._layer.weighs_rows
                own = through_expert(self._layer.compute, weights, exact, *arguments)
                next_to = through_expert(self._layer.compute, near, other, *arguments)
                for name, both in total.items():
                    both += ExactAndMoved(own[name], step(next_to[name]))
        return total, num_rows

    def _moved(self, dtype: torch.dtype, values: Tensor) -> Tensor:
        return moved(values, dtype, self._generator)

    def _gathered(self, value: Any) -> list[Any] | None:
        """Everybody's values on the leader; None on the others."""
        if self._group is None:
            return [value]
        found: list[Any] | None = [None] * self._size if dist.get_rank() == self._leader else None
        dist.gather_object(value, found, dst=self._leader, group=self._group)
        return found

    def _scattered(self, compute: Callable[[], list[Any]]) -> Any:
        """This rank's own of what the leader computes; the leader's error on every rank."""
        if self._group is None:
            return compute()[0]
        values: list[Any] | None = None
        if dist.get_rank() == self._leader:
            try:
                values = compute()
            except Exception as error:  # of whatever module an expert is
                values = [error] * self._size
        found: list[Any] = [None]
        dist.scatter_object_list(found, values, src=self._leader, group=self._group)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _results(self, sides: list[tuple[_Side, _Side]], passes: list[ObservedPass]) -> tuple[list[ExactAndMoved], ...]:
        """Outputs and gradients of one rank's passes, each result rounded once more on the moved side."""
        names = ("y_TD", "dx_TD", "dweights_TK")
        return tuple(
            [
                ExactAndMoved(getattr(exact, name), moved(getattr(other, name), seen.type, self._generator))
                for (exact, other), seen in zip(sides, passes, strict=True)
            ]
            for name in names
        )
