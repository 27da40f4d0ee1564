"""Ranks that measure round by round: the mean rank's numbers of each round."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

from ds_moe_ep.bench.harness.collective import mean
from ds_moe_ep.bench.harness.processes import (
    Finding,
    Tell,
    arriving,
    free_port,
    live_as_rank,
    loopback_environment,
    started_ranks,
)

PRELOADED = ("torch", "deepspeed", "ds_moe_ep.bench.candidates.native", "ds_moe_ep.engine.layer")
Measure = Callable[[int], Iterator[Sequence[float]]]  # by rank; it joins the world first


@dataclass(frozen=True)
class _World:
    measure: Measure
    ranks: int
    port: int


def mean_rounds(measure: Measure, ranks: int) -> list[list[float]]:
    """The numbers that `measure` gives in each round, their means over the ranks; it and its plan are pickled."""
    world = _World(measure, ranks, free_port())
    with started_ranks(_run_rank, world, ranks, PRELOADED) as (processes, inbox):
        return [json.loads(finding.text) for finding in arriving(processes, inbox) if finding.kind == "round"]


def _run_rank(rank: int, world: _World, findings: Queue[Finding]) -> None:
    os.environ.update(loopback_environment(rank, world.ranks, world.port))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_tell_rounds, rank, world))


def _tell_rounds(rank: int, world: _World, tell: Tell) -> None:
    for numbers in world.measure(rank):
        tell(Finding("round", json.dumps(mean(numbers))))
    dist.barrier()
    dist.destroy_process_group()
