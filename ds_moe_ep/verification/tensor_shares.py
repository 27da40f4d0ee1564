"""Passes of layers whose tokens a tensor group shares, and the oracle's answers on all shares, in host memory.

Each rank gives the oracle its own share, and the answers are put together again. Collective over the tensor group.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import ExactAndMoved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.engine.views.shares import OF_TOKENS
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from ds_moe_ep.verification.oracle import OracleLayer

OF_GATE = ("dweights_TK", "dlogits_TE")


def whole_passes(layer: ViewedLayer, passes: Sequence[ObservedPass]) -> list[ObservedPass]:
    """Passes with all tokens of the group, gathered where they come cut, and with the gradients that its gate gets."""
    ranks = layer.tensor_ranks
    if not ranks.is_shared or not (ranks.has_own_tokens or layer.averages_gate_gradients):
        return list(passes)
    names = OF_TOKENS if ranks.has_own_tokens else OF_GATE
    own = [{name: getattr(seen, name) for name in names} for seen in passes]
    everyone: list[list[dict[str, Any]]] = [[] for _ in range(ranks.size)]
    dist.all_gather_object(everyone, own, group=ranks.group)
    join: Callable[[Any], Any] = _joined if ranks.has_own_tokens else _averaged
    return [
        replace(seen, **{name: join([each[name] for each in theirs]) for name in names})
        for seen, theirs in zip(passes, zip(*everyone, strict=True), strict=True)
    ]


def whole_answers(ranks: TensorRanks, own: OracleLayer) -> OracleLayer:
    """The oracle's answers on the tokens of all ranks' shares; those on experts stay this rank's."""
    return _of_all(ranks.group, own, _in_turn) if ranks.is_shared else own


def summed_answers(group: dist.ProcessGroup | None, own: OracleLayer) -> OracleLayer:
    """The oracle's answers on tokens over the ranks that each have a share of the experts' width.

    Collective over them; those on experts stay this rank's.
    """
    if group is None or dist.get_world_size(group) == 1:
        return own
    return _of_all(group, own, partial(reduce, operator.add))


def _of_all(
    group: dist.ProcessGroup | None, own: OracleLayer, join: Callable[[Sequence[ExactAndMoved]], ExactAndMoved]
) -> OracleLayer:
    """The answers on tokens of a group's ranks, joined pass by pass; those on experts stay this rank's."""
    everyone: list[list[list[ExactAndMoved]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, [own.y_TD, own.dx_TD, own.dweights_TK], group=group)
    y_TD, dx_TD, dweights_TK = (
        [join(theirs) for theirs in zip(*of_ranks, strict=True)] for of_ranks in zip(*everyone, strict=True)
    )
    return replace(own, y_TD=y_TD, dx_TD=dx_TD, dweights_TK=dweights_TK)


def _in_turn(parts: Sequence[ExactAndMoved]) -> ExactAndMoved:
    return ExactAndMoved(torch.cat([each.exact for each in parts]), torch.cat([each.moved for each in parts]))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def _averaged(parts: Sequence[Any]) -> Any:
    """The mean of tensors, or of those of each key."""
    if isinstance(parts[0], dict):
        return {key: _averaged([each[key] for each in parts]) for key in parts[0]}
    return None if parts[0] is None else torch.stack(list(parts)).mean(0)
