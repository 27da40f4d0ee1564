"""Prints the processor time of layers, all threads: python -m tests.account.processor_time [ranks] [rounds] [experts]

The sides alternate in the same processes. Other work on the machine lengthens wall time at will, and processor time by
what it leaves in the caches: so each round gives a ratio, and the median of the ratios is printed beside the times.
The calling thread, which computes, stands apart from all threads, among which are the backend's.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import CASES
from ds_moe_ep.bench.candidates.layers import PLAIN, LayerSetup, build
from ds_moe_ep.bench.harness.collective import mean
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import (
    Finding,
    Tell,
    arriving,
    free_port,
    live_as_rank,
    loopback_environment,
    started_ranks,
)

SIDES = (PLAIN, "serial")
WARM_UPS = 2
PRELOADED = ("torch", "deepspeed", "ds_moe_ep.bench.candidates.native", "ds_moe_ep.engine.layer")


@dataclass(frozen=True)
class Plan:
    """One run; the same on every rank."""

    ranks: int
    rounds: int
    experts: int
    port: int


def run_rank(rank: int, plan: Plan, findings: Queue[Finding]) -> None:
    """The life of a rank; rank 0 tells the mean rank's milliseconds of each side, round by round."""
    os.environ.update(loopback_environment(rank, plan.ranks, plan.port))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_measure, rank, plan))


def _measure(rank: int, plan: Plan, tell: Tell) -> None:
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR

    native.start_ranks("gloo", 300.0)
    case = replace(CASES[0], num_experts=plan.experts)
    setup = LayerSetup(case=case, rank=rank, num_ranks=plan.ranks, aux_loss_weight=0.01)
    layers = {name: build(name, setup) for name in SIDES}
    gc.collect()
    gc.freeze()
    for index in range(WARM_UPS + plan.rounds):
        of_all, of_caller = dict[str, float](), dict[str, float]()
        for name in rotation(SIDES, index):
            layers[name].prepare()
            dist.barrier()
            start_s = time.process_time(), time.thread_time()
            layers[name].run()
            of_all[name] = 1e3 * (time.process_time() - start_s[0])
            of_caller[name] = 1e3 * (time.thread_time() - start_s[1])
        found = mean([took[name] for took in (of_all, of_caller) for name in SIDES])
        if index >= WARM_UPS:
            tell(Finding("round", json.dumps(found)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """The times of both sides, and the second over the first; of all threads, and of the calling one."""
    ranks, rounds, experts = (int(given) for given in [*sys.argv[1:], *("16", "12", "16")[len(sys.argv) - 1 :]])
    found: list[list[float]] = []
    with started_ranks(run_rank, Plan(ranks, rounds, experts, free_port()), ranks, PRELOADED) as (processes, inbox):
        found = [json.loads(finding.text) for finding in arriving(processes, inbox) if finding.kind == "round"]
    by_side = list(zip(*found, strict=True))
    for of, (plain, ours) in (("all threads", by_side[:2]), ("calling thread", by_side[2:])):
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        for name, times in zip((*SIDES, "ratio"), (plain, ours, ratios), strict=True):
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            print(f"{ranks} ranks, {of:14} {name:14} {median:8.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
