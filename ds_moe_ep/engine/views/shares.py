"""Passes of layers whose tokens a tensor group shares: whole, as the gate routed them, and this rank's own share.

Experts meet a token once, from the rank whose span it lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.views.moved import ExactAndMoved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks

ROUTED = ("ids_TK", "weights_TK", "kept_TK")
OF_TOKENS = ("x_TD", "y_TD", "dx_TD", "dy_TD")


def own_shares(ranks: TensorRanks, passes: Sequence[ObservedPass]) -> list[ObservedPass]:
    """This rank's own tokens of whole passes. Local."""
    if not ranks.is_shared:
        return list(passes)
    return [replace(seen, **_cut(ranks, seen)) for seen in passes]  # type: ignore[arg-type]


def _cut(ranks: TensorRanks, seen: ObservedPass) -> dict[str, Tensor | None]:
    values = {name: getattr(seen, name) for name in (*ROUTED, *OF_TOKENS)}
    spans = ranks.spans(len(seen.x_TD))
    return {name: None if each is None else spans.own(each) for name, each in values.items()}


def gathered_passes(ranks: TensorRanks, passes: Sequence[ObservedPass]) -> list[ObservedPass]:
    """Passes with all tokens of the group, gathered on the device where they come cut, else as they are.

    Collective over the group.
    """
    if not (ranks.is_shared and ranks.has_own_tokens):
        return list(passes)
    found = []
    for seen in passes:
        spans = ranks.spans(len(seen.x_TD) * ranks.size)
        values = {name: getattr(seen, name) for name in OF_TOKENS}
        found.append(
            replace(seen, **{name: None if each is None else spans.gather(each) for name, each in values.items()})  # type: ignore[arg-type]
        )
    return found


def of_all_shares(ranks: TensorRanks, whole: ObservedPass, share: ExactAndMoved) -> ExactAndMoved:
    """The values of all tokens of a pass, from those of each rank's own. Collective over the group, on the device."""
    if not ranks.is_shared:
        return share
    spans = ranks.spans(len(whole.x_TD))
    return ExactAndMoved(spans.gather(share.exact), spans.gather(share.moved))


def owner_of_token(ranks: TensorRanks, num_tokens: int, token: int) -> int:
    """The rank of the world that takes a token to the experts. Local."""
    if not ranks.is_shared:
        return dist.get_rank()
    spans = ranks.spans(num_tokens)
    places = [place for place in range(ranks.size) if token >= spans.span(place)[0]]
    return dist.get_global_rank(spans.group, places[-1])
