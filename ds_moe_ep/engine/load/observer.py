"""Observer of one layer's passes: it keeps what the host knows of the load, and computes nothing before a report.

Without a capacity the host has the counts of a pass, since it sizes the messages by them, and the observer keeps a
reference. With one, or where experts are replicated, the plan's columns are no experts' choices: there the counts stay
on the device, and are read when all are gathered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.moe.dispatch_plan import Counts, DispatchPlan
from ds_moe_ep.moe.routes import Routes, Routing

MAX_PASSES = 64  # that a report speaks of: the last ones


@dataclass(frozen=True)
class SeenPass:
    """One forward pass of a layer on this rank; `chosen_E` is None where the sent rows tell."""

    send_rows_PL: Counts
    recv_rows_PL: Counts
    capacity: int | None
    chosen_E: Tensor | None


@dataclass(frozen=True)
class OwnLoad:
    """This rank's part of a layer's load."""

    rows_E: Tensor  # of all passes
    dropped_E: Tensor
    received: tuple[int, ...]  # rows of each pass
    num_tokens: int


class LoadObserver:
    """Keeps the last passes of a layer's training. Local."""

    def __init__(self, layer: OverlappedLayer) -> None:
        self.layer = layer
        self.is_paused = False
        self._passes: deque[SeenPass] = deque(maxlen=MAX_PASSES)
        self._num_tokens = 0

    def __call__(self, routes: Routes, plan: DispatchPlan) -> None:
        if self.is_paused:
            return
        chosen_E = None
        if routes.capacity is not None or len(plan.send_rows_PL[0]) != self.layer.config.num_local_experts:
            # A layer that is hooked has counted before it dispatches; the package's own counts after.
            chosen_E = routes.load_E() if isinstance(routes, Routing) else self.layer.last_counts_E
        self._passes.append(SeenPass(plan.send_rows_PL, plan.recv_rows_PL, routes.capacity, chosen_E))
        self._num_tokens += len(routes.expert_ids_TK)

    def take(self, device: torch.device) -> OwnLoad:
        """The load that was seen since the last call, on a device. No sync."""
        passes, num_tokens = list(self._passes), self._num_tokens
        self._passes.clear()
        self._num_tokens = 0
        rows_E = torch.zeros(self.layer.config.num_experts, dtype=torch.float64, device=device)
        dropped_E = torch.zeros_like(rows_E)
        on_host = [seen.send_rows_PL for seen in passes if seen.chosen_E is None]
        if on_host:
            rows_E += torch.tensor(on_host, dtype=torch.float64).sum(0).flatten().to(device)
        for seen in passes:
            if seen.chosen_E is not None:
                chosen_E = seen.chosen_E.to(device, torch.float64)
                rows_E += chosen_E
                if seen.capacity is not None:
                    dropped_E += (chosen_E - seen.capacity).clamp(min=0)
        received = tuple(sum(map(sum, seen.recv_rows_PL)) for seen in passes)
        return OwnLoad(rows_E, dropped_E, received, num_tokens)
