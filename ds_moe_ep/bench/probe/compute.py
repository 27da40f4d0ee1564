"""The probe's measurements of one device: products by rows, attention, memory, and on a GPU the host's launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.bench.probe.clock import LEAST, MOST, RankProbe

SHARES = {"matmul": 0.5, "attention": 0.06, "memory": 0.04, "launch": 0.02}  # of the probe's time
ROWS = tuple(2**n for n in range(3, 14))  # 8 to 8,192
MEMORY_NUMBERS = {"cpu": 2**24, "cuda": 2**28}  # beyond every cache
LAUNCHES = 1000  # of one sample
SCORES_PASSES = 3.5  # forward, and 2.5 times its arithmetic backward, which computes the scores again


def measure(probe: RankProbe) -> None:
    """Everything, one after the other."""
    share_s = {name: share * probe.plan.seconds for name, share in SHARES.items()}
    precisions = probe.plan.precisions
    for name, dtype in precisions.items():
        matmul(probe, name, dtype, share_s["matmul"] / len(precisions))
    attention(probe, *next(iter(precisions.items())), share_s["attention"])
    memory(probe, share_s["memory"])
    if probe.device.type == "cuda":
        launches(probe, share_s["launch"])


def matmul(probe: RankProbe, precision: str, dtype: torch.dtype, budget_s: float) -> None:
    """The two products of an expert: 4*R*D*F operations for R rows. On a GPU they queue, so no launch is in them."""
    probe.phase(f"products in {precision}")
    D, width = probe.plan.hidden_size, probe.plan.expert_width
    up_FD, down_DF = probe.random(dtype, width, D), probe.random(dtype, D, width)
    left_s, last_s = budget_s, 0.0
    for index, rows in enumerate(ROWS):
        if 2 * last_s * (LEAST + 2) > left_s:
            break
        run = partial(_expert, probe.random(dtype, rows, D), up_FD, down_DF)
        seconds = probe.samples(run, left_s / (len(ROWS) - index), alone=True)
        left_s, last_s = left_s - probe.spent_s(seconds), seconds[-1]
        probe.found(f"matmul.{precision}.rows{rows}", [4e-9 * rows * D * width / s for s in seconds])


def attention(probe: RankProbe, precision: str, dtype: torch.dtype, budget_s: float) -> None:
    """Causal attention of a sequence of S tokens, forward and backward: 3.5 times 2*S*S*D operations."""
    probe.phase("attention")
    heads, length, D = probe.plan.num_heads, probe.plan.sequence_length, probe.plan.hidden_size
    shape = (1, heads, length, D // heads)
    qkv = [probe.random(dtype, *shape).requires_grad_() for _ in range(3)]
    seconds = probe.samples(partial(_attend, qkv, probe.random(dtype, *shape)), budget_s, alone=True)
    flops = SCORES_PASSES * 2 * length * length * D
    probe.found(f"attention.{precision}", [1e-9 * flops / s for s in seconds])


def memory(probe: RankProbe, budget_s: float) -> None:
    """An elementwise operation on fp32: each number is read once, and one is written."""
    probe.phase("memory")
    x = torch.ones(MEMORY_NUMBERS[probe.device.type], device=probe.device)
    y = torch.empty_like(x)
    seconds = probe.samples(lambda: torch.add(x, 1.0, out=y), budget_s, alone=True)
    probe.found("memory", [1e-9 * 2 * 4 * x.numel() / s for s in seconds])


def launches(probe: RankProbe, budget_s: float) -> None:
    """On a GPU: the host's time to issue a kernel, and to read a number that a kernel has just made. Collective."""
    probe.phase("launches")
    x = torch.zeros(1, device=probe.device)

    def issue() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)
        torch.cuda.synchronize(probe.device)

    def read() -> None:
        for _ in range(LAUNCHES):
            x.add_(1).item()

    issue()
    launch_us, sync_us, spent_s = list[float](), list[float](), 0.0
    while len(launch_us) < LEAST or (spent_s < budget_s and len(launch_us) < MOST):
        both_s = probe.slowest([_wall_s(issue), _wall_s(read)])
        spent_s += sum(both_s)
        issued_us, read_us = (1e6 * s / LAUNCHES for s in both_s)
        launch_us.append(issued_us)
        sync_us.append(max(0.0, read_us - issued_us))
    probe.found("launch", launch_us)
    probe.found("sync", sync_us)


def _wall_s(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def _expert(x_RD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    return F.linear(F.linear(x_RD, up_FD), down_DF)


def _attend(qkv: Sequence[Tensor], gradient: Tensor) -> None:
    query, key, value = qkv
    torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, is_causal=True), qkv, gradient)
