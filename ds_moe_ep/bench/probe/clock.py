"""How the probe samples on each rank, the same number of times on all of them.

1. Each thing measured has a share of the time. It is tried once, then sampled three times or more while its share
   lasts; sizes rise, and those that would not fit into what is left are left out.
2. A sample repeats its work until the clock can tell its length. On CUDA it lies between two events on the device.
3. On GPUs all ranks compute at once, as they do in training, and a sample is the slowest rank's. On a CPU, whose cores
   the ranks share, rank 0 computes alone.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench.harness.collective import slowest
from ds_moe_ep.bench.harness.processes import Finding, Tell

LEAST, MOST = 3, 25  # samples of one thing
SAMPLE_S = {"cpu": 2e-3, "cuda": 1e-2}  # the least length of a sample
MOST_REPEATS = 1000
SHORTEST_S = 1e-9  # a clock may stand still


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """One run of the probe; the same on every rank."""

    device: Literal["cpu", "cuda"]
    num_ranks: int
    node_size: int  # ranks of a node; 0: by the hosts' names
    seconds: float
    hidden_size: int
    expert_width: int
    num_heads: int
    sequence_length: int
    port: int = 0  # of ranks that the probe starts itself

    @property
    def precisions(self) -> dict[str, torch.dtype]:
        """Number types of the products that are measured, the one that the device is made for first.

        fp16 on a CPU is emulated, hundreds of times slower, and no number for anybody.
        """
        if self.device == "cuda":
            return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankProbe:
    """One rank's clock, and what it tells."""

    plan: ProbePlan
    rank: int
    device: torch.device
    tell: Tell

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """The node of every rank. Collective at the first call."""
        if self.plan.node_size:
            return tuple(rank // self.plan.node_size for rank in range(self.plan.num_ranks))
        hosts: list[Any] = [None] * self.plan.num_ranks
        dist.all_gather_object(hosts, socket.gethostname())
        order = list(dict.fromkeys(hosts))
        return tuple(order.index(host) for host in hosts)

    def describe(self) -> None:
        """Tells where the ranks are, and on what. Collective."""
        sizes = [self.nodes.count(node) for node in dict.fromkeys(self.nodes)]
        text = "nodes of " + ", ".join(map(str, sizes)) + " ranks"
        if self.device.type == "cuda":
            text += f", each on {torch.cuda.get_device_name(self.device)}"
        self.tell(Finding("device", text))

    def samples(self, run: Callable[[], object], budget_s: float, *, alone: bool = False) -> list[float]:
        """Seconds of one `run`, as often as there is time for it. Collective, unless a rank is `alone` on a CPU."""
        agree = list if alone and self.device.type == "cpu" else self.slowest
        self.timed(run, 1)
        repeats = self.repeats(agree([self.timed(run, 1)])[0])
        found: list[float] = []
        while len(found) < LEAST or ((len(found) + 1) * repeats * found[-1] < budget_s and len(found) < MOST):
            found.append(max(SHORTEST_S, agree([self.timed(run, repeats)])[0]))
        return found

    def repeats(self, once_s: float) -> int:
        """How often a sample runs what takes so long."""
        wanted = math.ceil(SAMPLE_S[self.device.type] / max(once_s, SHORTEST_S))
        return max(1, min(MOST_REPEATS, wanted))

    def spent_s(self, seconds: Sequence[float]) -> float:
        """About what these samples and the trial before them took: the same number on every rank."""
        return (len(seconds) * self.repeats(seconds[0]) + 2) * seconds[0]

    def timed(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of one of `repeats` runs."""
        if self.device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                run()
            stop.record()
            stop.synchronize()
            return 1e-3 * float(start.elapsed_time(stop)) / repeats
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks. Collective."""
        return slowest(values, self.device)

    def random(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Numbers of about a weight's size."""
        return torch.randn(*shape, device=self.device).mul_(0.02).to(dtype)

    def phase(self, text: str) -> None:
        """Tells what comes now."""
        self.tell(Finding("phase", text, advance=1))

    def found(self, name: str, values: Sequence[float]) -> None:
        """Tells the samples of the Record `probe.<name>`."""
        self.tell(Finding(samples={f"probe.{name}": tuple(values)}))
