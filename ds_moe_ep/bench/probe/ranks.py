"""The life of one rank of the probe, in a process that the probe or a launcher has started."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank, loopback_environment
from ds_moe_ep.bench.probe import compute as probe_compute
from ds_moe_ep.bench.probe import links as probe_links
from ds_moe_ep.bench.probe.clock import ProbePlan, RankProbe

START_TIMEOUT_S = 300.0


def run_probe_rank(rank: int, plan: ProbePlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank that the probe has started."""
    os.environ |= loopback_environment(rank, plan.num_ranks, plan.port) | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    live_as_rank(rank, findings, partial(run_probe, plan, rank, rank))


def run_probe(plan: ProbePlan, rank: int, local_rank: int, tell: Tell) -> None:
    """Measures everything as rank `rank` of the world that MASTER_ADDR and MASTER_PORT lead to. Collective."""
    torch.set_num_threads(1)
    device = torch.device("cuda", local_rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=plan.num_ranks,
        timeout=timedelta(seconds=START_TIMEOUT_S + 4 * plan.seconds),
        device_id=device if device.type == "cuda" else None,  # all make their communicator now, before pairs talk
    )
    try:
        probe = RankProbe(plan, rank, device, tell)
        probe.describe()
        if device.type == "cuda" or rank == 0:
            probe_compute.measure(probe)
        dist.barrier()
        probe_links.measure(probe)
        dist.barrier()
    finally:
        dist.destroy_process_group()
