"""How much of the experts' communication was hidden, measured on every n-th step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.recorder import Off, make_recorder
from ds_moe_ep.timeline import Overlap, overlap


class OverlapMeter:
    """Records one step in every `every` and keeps the last measured Overlap, summed over the ranks.

    A transfer counts from its issue to its completion; it is hidden while an expert computes on the same rank.
    """

    def __init__(self, layers: Mapping[str, MoE], device: torch.device, every: int) -> None:
        self._layers = layers
        self._every = every
        self._steps = 0
        self._recorder = make_recorder(device, dist.get_rank())
        self._device = device
        self.last: Overlap | None = None

    def hidden_percent(self) -> float | None:
        """The hidden share of the last measured step's communication, or None before one was measured. Local."""
        return None if self.last is None else self.last.hidden_percent

    def step(self) -> None:
        """Ends a step: reads the one that was recorded, and turns recording on or off for the next.

        Collective over the data-parallel ranks after a recorded step.
        """
        if self._steps and self._steps % self._every == 0:
            mine = overlap(self._recorder.spans())
            times_us = torch.tensor([mine.total_us, mine.exposed_us], device=self._device, dtype=torch.float32)
            self.last = Overlap(*seams.sum_over_data_parallel(times_us).tolist())
        self._steps += 1
        recorder = self._recorder if self._steps % self._every == 0 else Off()
        for layer in self._layers.values():
            layer.deepspeed_moe.recorder = recorder
