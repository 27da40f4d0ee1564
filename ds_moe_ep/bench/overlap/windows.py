"""Windows of a layer on a workload: micro-batches between two steps of an optimizer, whose weights stay as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench.candidates.cases import LayerCase, output_gradient, tokens_for
from ds_moe_ep.bench.candidates.layers import PHASES, LayerCandidate, dispatcher_of
from ds_moe_ep.bench.candidates.workloads import Workload

MicroBatch = tuple[Tensor, Tensor]  # tokens, and the gradient of their outputs


@dataclass(frozen=True)
class WindowedLoad:
    """A workload and the micro-batches of a window."""

    workload: str
    micro_batches: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.workload}, {self.micro_batches} micro-batches"

    def batches(self, case: LayerCase, rank: int, num_ranks: int, window: int) -> list[MicroBatch]:
        """This rank's micro-batches of one window, made before anything is timed."""
        load = Workload(self.workload, case.num_experts, num_ranks, self.seed)
        num_tokens = load.num_tokens(rank, case.num_tokens)
        dy_TD = output_gradient(case, rank)[:1].expand(num_tokens, -1).contiguous()
        first = window * self.micro_batches
        return [
            (tokens_for(case, rank, load.expert_ids(rank, step, num_tokens, case.top_k)), dy_TD)
            for step in range(first, first + self.micro_batches)
        ]


class LayerWindow:
    """The window that a layer's replicas follow, as an engine's would be."""

    def __init__(self, micro_batches: int = 1) -> None:
        self.number = 0
        self.micro_batches = micro_batches
        self.left = 0  # micro-batches of the window that have not gone backward

    is_in_order = True

    def is_last(self, passes: int) -> bool:
        """True in the backward pass of the window's last micro-batch."""
        return self.left == 1


def run_window(candidate: LayerCandidate, batches: Sequence[MicroBatch], window: LayerWindow) -> dict[str, float]:
    """Seconds of all micro-batches by pass, from the change of weights before them on. Collective.

    The step has besides what the layer does behind a change of weights: a placement, and a bias.
    """
    dispatcher = dispatcher_of(candidate.layer)
    replicas = getattr(dispatcher, "replicas", None)
    if replicas is not None and replicas.window is not window:
        dispatcher.follow(window)
    seconds = dict.fromkeys(PHASES, 0.0)
    window.left = len(batches)
    start_s = time.perf_counter()
    window.number += 1
    if replicas is not None:
        replicas.begin_early()
    seconds["step"] += time.perf_counter() - start_s
    for x_TD, dy_TD in batches:
        candidate.x_TD, candidate.dy_TD = x_TD.requires_grad_(), dy_TD
        candidate.run()
        window.left -= 1
        for phase in PHASES:
            seconds[phase] += candidate.seconds[phase]
    start_s = time.perf_counter()
    balance = getattr(candidate.layer, "balance", None)
    if balance is not None:
        balance.step(_summed)
    seconds["step"] += time.perf_counter() - start_s
    return seconds


def _summed(load_E: Tensor) -> Tensor:
    """The sum over all ranks."""
    dist.all_reduce(load_E)
    return load_E
