"""A report as events of DeepSpeed's monitor, and as a picture in its TensorBoard."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_moe_ep.engine.extensions.measurement import Event
from ds_moe_ep.live.lines import RunReport
from ds_moe_ep.live.load import LayerReport

PREFIX = "Train/moe_ep"
PICTURE = f"{PREFIX}/expert_load/heat_map"
MAX_EXPERTS = 1024  # of all layers: with more, each expert's own numbers would be thousands of curves

CELL = 12  # pixels
LEAST, MOST = 1 / 4, 4.0  # times the mean, where the colours end
COLD, EVEN, HOT, DEAD = (33, 102, 172), (240, 240, 240), (200, 80, 30), (0, 0, 0)


def load_events(report: RunReport, num_samples: int) -> list[Event]:
    """The load by layer, expert and rank; experts one by one while they are at most MAX_EXPERTS."""
    is_small = sum(len(layer.rows_E) for layer in report.layers) <= MAX_EXPERTS
    return [
        (f"{PREFIX}/{layer.name}/{name}", value, num_samples)
        for layer in report.layers
        for name, value in _values(layer, is_small)
    ]


def _values(layer: LayerReport, has_experts: bool) -> list[tuple[str, float]]:
    found = [
        ("load_max_over_mean", layer.max_over_mean),
        ("expert_load/dead_experts", float(len(layer.dead_experts))),
        ("expert_load/entropy_bits", layer.entropy_bits),
        ("expert_load/dropped_percent", layer.dropped_percent),
        ("rank_load/p50_max_over_mean", layer.p50),
        ("rank_load/p95_max_over_mean", layer.p95),
        ("replicas/in_use", float(layer.num_replicas)),
    ]
    found += [(f"rank_load/rows/rank_{rank:03d}", rows) for rank, rows in enumerate(layer.rank_rows_R)]
    if has_experts:
        for expert, share in enumerate(layer.share_E):
            found.append((f"expert_load/rows/expert_{expert:03d}", layer.rows_per_pass(expert)))
            found.append((f"expert_load/share/expert_{expert:03d}", share))
            if any(layer.dropped_E):
                dropped = layer.dropped_E[expert] / max(layer.num_passes, 1)
                found.append((f"expert_load/dropped/expert_{expert:03d}", dropped))
    return found


def heat_map(layers: tuple[LayerReport, ...]) -> Tensor:
    """A picture [height, width, 3] in bytes: a row per layer, the first on top, and a column per expert.

    Grey has the mean of its layer, blue less and orange more, on a logarithmic scale that ends at LEAST and MOST times
    the mean; black has no row at all.
    """
    num_columns = max(len(layer.rows_E) for layer in layers)
    shares = [[*layer.share_E, *[float("nan")] * (num_columns - len(layer.rows_E))] for layer in layers]
    sizes = torch.tensor([len(layer.rows_E) for layer in layers], dtype=torch.float32).unsqueeze(1)
    ratio_LE = torch.tensor(shares, dtype=torch.float32) * sizes
    place_LE1 = (ratio_LE.clamp(LEAST, MOST).log2() / torch.tensor(MOST).log2()).unsqueeze(2)
    cold, even, hot, dead = (torch.tensor(color, dtype=torch.float32) for color in (COLD, EVEN, HOT, DEAD))
    far = torch.where(place_LE1 < 0, cold, hot)
    color_LE3 = even + place_LE1.abs() * (far - even)
    color_LE3 = torch.where((ratio_LE == 0).unsqueeze(2), dead, color_LE3)
    color_LE3 = torch.where(ratio_LE.isnan().unsqueeze(2), torch.tensor(255.0), color_LE3)  # a layer of fewer experts
    return color_LE3.round().to(torch.uint8).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
