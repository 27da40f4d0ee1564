"""Gathers all ranks' load in one all-reduce: sums of what is summed, and a row of its own for each rank's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.layouts.tensor import group_of_shares, sum_over_shares
from ds_moe_ep.engine.load.observer import MAX_PASSES, OwnLoad
from ds_moe_ep.live.load import LayerReport, fullest_over_mean, quantile


@dataclass(frozen=True)
class OwnStep:
    """This rank's numbers beside the load; `loss` is the sum of `num_losses` micro-batches."""

    loss: Tensor
    num_losses: int
    expert_ms: float


@dataclass(frozen=True)
class GatheredLoad:
    """The load of all ranks, on the host, the same on each."""

    layers: tuple[LayerReport, ...]
    num_tokens: int
    loss: float | None
    expert_ms_R: tuple[float, ...]


def gather_load(own: Mapping[str, OwnLoad], step: OwnStep, guests: Mapping[str, Sequence[int]]) -> GatheredLoad:
    """The load of all data-parallel ranks by layer. Collective over them; one device sync.

    `guests`: the experts in this rank's replica slots, of which every rank has as many, -1 in one that is free. Expert
    groups place copies each for itself, so that every rank tells its own.
    """
    group = group_of_shares()
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    device = step.loss.device
    # A pass that a rank has is told as its rows and one: 0 stands for a pass that it has not.
    received = [[float(rows + 1) for rows in load.received] for load in own.values()]
    padded = [rows + [0.0] * (MAX_PASSES - len(rows)) for rows in received]
    num_tokens = max((load.num_tokens for load in own.values()), default=0)
    numbers = [float(num_tokens), float(step.num_losses), step.expert_ms, *(rows for its in padded for rows in its)]
    numbers += [float(guest) for name in own for guest in guests.get(name, ())]
    mine = torch.cat([step.loss.double().reshape(1), torch.tensor(numbers, dtype=torch.float64).to(device)])
    by_rank = torch.zeros(num_ranks, len(mine), dtype=torch.float64, device=device)
    by_rank[rank] = mine
    summed = [counts_E for load in own.values() for counts_E in (load.rows_E, load.dropped_E)]
    flat = sum_over_shares(torch.cat([*summed, by_rank.flatten()])).cpu()
    *counts, rest = flat.split([*map(len, summed), by_rank.numel()])
    by_rank = rest.view(num_ranks, -1)
    losses_R, tokens_R, num_losses_R, expert_ms_R = by_rank[:, :4].T.tolist()
    num_slots = [len(guests.get(name, ())) for name in own]
    passes_RM, *of_layers = by_rank[:, 4:].split([len(own) * MAX_PASSES, *num_slots], 1)
    passes_RLM = passes_RM.view(num_ranks, len(own), MAX_PASSES)
    layers = tuple(
        _layer(name, rows_E, dropped_E, passes_RLM[:, index], of_layers[index])
        for index, (name, rows_E, dropped_E) in enumerate(zip(own, counts[::2], counts[1::2], strict=True))
    )
    loss = sum(losses_R) / sum(num_losses_R) if sum(num_losses_R) else None
    return GatheredLoad(layers, round(sum(tokens_R)), loss, tuple(expert_ms_R))


def _layer(name: str, rows_E: Tensor, dropped_E: Tensor, passes_RM: Tensor, slots_RS: Tensor) -> LayerReport:
    """A layer's load from what the ranks told of each of its passes, and of their slots."""
    there = passes_RM.amin(0) > 0
    rows_MR: Sequence[Sequence[float]] = (passes_RM[:, there] - 1).T.tolist()
    ratios = [fullest_over_mean(rows_R) for rows_R in rows_MR]
    num_ranks, num_passes = len(passes_RM), len(rows_MR)
    return LayerReport(
        name=name,
        num_passes=num_passes,
        rows_E=tuple(int(rows) for rows in rows_E.tolist()),
        dropped_E=tuple(int(rows) for rows in dropped_E.tolist()),
        rank_rows_R=tuple(sum(rows) / max(num_passes, 1) for rows in zip(*rows_MR, strict=True)) or (0.0,) * num_ranks,
        p50=quantile(ratios, 0.5),
        p95=quantile(ratios, 0.95),
        guests_RS=tuple(tuple(map(int, slots)) for slots in slots_RS.tolist()) if slots_RS.numel() else (),
    )
