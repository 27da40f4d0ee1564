"""Passes of layers whose tokens a tensor group shares: whole, as the gate routed them, and this rank's own share.

Experts meet a token once, from the rank whose span it lies in. So each rank gives the oracle its own share, and the
answers on all shares are put together again. Collective over the tensor group, in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.views.moved import ExactAndMoved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.moe.tensor_parallel.exchange import Spans
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from ds_moe_ep.verification.oracle import OracleLayer

ROUTED = ("ids_TK", "weights_TK", "kept_TK")
OF_TOKENS = ("x_TD", "y_TD", "dx_TD", "dy_TD")


def whole_passes(ranks: TensorRanks, passes: Sequence[ObservedPass]) -> list[ObservedPass]:
    """Passes with all tokens of the group: gathered where they come cut, else as they are."""
    if not (ranks.is_shared and ranks.has_own_tokens):
        return list(passes)
    own = [{name: getattr(seen, name) for name in OF_TOKENS} for seen in passes]
    everyone: list[list[dict[str, Tensor | None]]] = [[] for _ in range(ranks.size)]
    dist.all_gather_object(everyone, own, group=ranks.group)
    return [
        replace(seen, **{name: _joined([each[name] for each in theirs]) for name in OF_TOKENS})  # type: ignore[arg-type]
        for seen, theirs in zip(passes, zip(*everyone, strict=True), strict=True)
    ]


def own_shares(ranks: TensorRanks, passes: Sequence[ObservedPass]) -> list[ObservedPass]:
    """This rank's own tokens of whole passes. Local."""
    if not ranks.is_shared:
        return list(passes)
    return [replace(seen, **_cut(ranks, seen)) for seen in passes]  # type: ignore[arg-type]


def _cut(ranks: TensorRanks, seen: ObservedPass) -> dict[str, Tensor | None]:
    assert ranks.group is not None
    spans = Spans(ranks.group, ranks.rank, ranks.size, len(seen.x_TD))
    values = {name: getattr(seen, name) for name in (*ROUTED, *OF_TOKENS)}
    return {name: None if each is None else spans.own(each) for name, each in values.items()}


def whole_answers(ranks: TensorRanks, own: OracleLayer) -> OracleLayer:
    """The oracle's answers on the tokens of all ranks' shares; those on experts stay this rank's."""
    if not ranks.is_shared:
        return own
    everyone: list[list[list[ExactAndMoved]]] = [[] for _ in range(ranks.size)]
    dist.all_gather_object(everyone, [own.y_TD, own.dx_TD, own.dweights_TK], group=ranks.group)
    y_TD, dx_TD, dweights_TK = (
        [
            ExactAndMoved(torch.cat([each.exact for each in theirs]), torch.cat([each.moved for each in theirs]))
            for theirs in zip(*of_ranks, strict=True)
        ]
        for of_ranks in zip(*everyone, strict=True)
    )
    return replace(own, y_TD=y_TD, dx_TD=dx_TD, dweights_TK=dweights_TK)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if len(there) == len(parts) else None
