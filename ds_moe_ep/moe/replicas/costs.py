"""Costs of copies for a layer: by sizes and knobs, or as the schedule "auto" measured them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.replicas.told import present
from ds_moe_ep.moe.split_experts import Weights
from ds_moe_ep.schedule.placement import CopyCosts
from ds_moe_ep.schedule.price import Costs

RowType = tuple[int, torch.dtype]  # width and type of a row


def costs_by_sizes(
    config: MoEConfig, row_type: RowType, experts: Sequence[Weights], micro_batches: int, ranks: int
) -> CopyCosts:
    """Costs by the sizes of rows and weights and by two knobs alone, equal on every rank and in every run."""
    both = {"traffic": config.replica_traffic, "pass_share": config.replica_pass_share}
    return CopyCosts.by_sizes(_row_bytes(row_type), *_copy_bytes(experts, micro_batches), ranks, **both)


def measured_costs(
    costs: Costs, num_rows: int, row_type: RowType, experts: Sequence[Weights], micro_batches: int, torus: Torus
) -> CopyCosts:
    """Costs that follow from those of a schedule, measured for `num_rows` rows per rank."""
    weight_bytes, gradient_bytes = _copy_bytes(experts, micro_batches)
    return CopyCosts.of(costs, torus, num_rows, _row_bytes(row_type), weight_bytes, gradient_bytes, micro_batches)


def _row_bytes(row_type: RowType) -> int:
    width, dtype = row_type
    return width * dtype.itemsize


def _copy_bytes(experts: Sequence[Weights], micro_batches: int) -> tuple[int, int]:
    """Bytes of an expert's weights, and of its gradient sums."""
    weights = present(experts[0])
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return weight_bytes, weight_bytes if micro_batches == 1 else 4 * sum(weight.numel() for weight in weights)
