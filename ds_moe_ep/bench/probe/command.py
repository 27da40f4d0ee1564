"""Probes a device and its links in about two minutes: what `calibrate` makes a cluster of.

    python -m ds_moe_ep bench probe --out probe.jsonl                               # ranks of this machine
    deepspeed --hostfile hosts --module ds_moe_ep bench probe --out probe.jsonl     # ranks of a job, rank 0 writes
    python -m ds_moe_ep calibrate probe.jsonl --cluster ds_configs/clusters/h100_4x4.json --out mine.json

Products by precision and rows, causal attention, memory, launches, exchanges by size on near and far links, and on a
CPU the core time of messages. Ctrl-C ends it; what was measured until then is in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Metric
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.bench.probe.clock import ProbePlan
from ds_moe_ep.bench.probe.findings import metric
from ds_moe_ep.bench.probe.ranks import run_probe, run_probe_rank
from ds_moe_ep.comm.launcher import World, launched
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import number as written
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table

CPU_RANKS = 2
# Widths of the layer benchmark on a CPU, of the specification's model on a GPU, and a sequence that fits beside them.
SIZES = {
    "cpu": {"hidden_size": 256, "expert_width": 1024, "num_heads": 8, "sequence_length": 512},
    "cuda": {"hidden_size": 8192, "expert_width": 32768, "num_heads": 16, "sequence_length": 4096},
}


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(BenchmarkOptions):
    """Options of the probe."""

    seconds: float = option(120.0, "time that all of it takes, about", above=0, most=3600)
    ranks: int = option(0, "ranks started here (0: one on each GPU, two on a CPU)", least=0, metavar="N")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "what a rank computes on (auto: a GPU where there is one)")
    node_size: int = option(0, "ranks of a node (0: by the hosts' names)", least=0, metavar="N")
    hidden_size: int = option(0, "width of a token (0: 256 on a CPU, 8192 on a GPU)", least=0, metavar="N")
    expert_width: int = option(0, "inner width of an expert (0: 1024 on a CPU, 32768 on a GPU)", least=0, metavar="N")
    shaped: bool = option(False, "say in the records that the links were shaped")


class Probe(Benchmark):
    """A device and its links. In a job every rank runs it, and rank 0 prints and writes."""

    module = ("ds_moe_ep", "bench", "probe")
    options = ProbeOptions
    description = (
        "Measures products, memory and links, for `python -m ds_moe_ep calibrate`. In a job of a launcher (deepspeed "
        "--module, torchrun -m, mpirun) the job's ranks are taken."
    )
    next_step = "; make a cluster of them: python -m ds_moe_ep calibrate --help"

    def __init__(self, options: ProbeOptions, world: World | None = None) -> None:
        self._world = world = world or launched(os.environ)
        self.plan, self._is_shaped = make_plan(options, world), options.shaped
        self.device, self.num_ranks = self.plan.device, self.plan.num_ranks
        self.is_heard = world is None or world.rank == 0

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        plan, world = self.plan, self._world
        here = None if world is None else partial(run_probe, plan, world.rank, world.local_rank)
        # About as many things are measured: precisions, attention, memory, launches or the host, two ways of links.
        steps = len(plan.precisions) + 3 + 2 * (plan.num_ranks > 1)
        yield Launch(run=run_probe_rank, plan=plan, num_ranks=plan.num_ranks, steps=steps, here=here)

    def metric(self, name: str) -> Metric:
        return metric(name, is_shaped=self._is_shaped)

    def tables(self, records: Sequence[Record]) -> Iterator[Table]:
        """All Records, a line each."""
        rows = (
            (record.name.removeprefix("probe."), *_written(record), record.unit, str(record.n)) for record in records
        )
        head = ("what", "value", "quartiles", "unit", "samples")
        yield table("One device and its links: median (quartiles)", head, rows)


def _written(record: Record) -> tuple[str, str]:
    """Value and quartiles; no quartiles where the value was counted."""
    low, high = record.spread
    return written(record.value), f"{written(low)} to {written(high)}" if low < high else ""


def make_plan(options: ProbeOptions, world: World | None) -> ProbePlan:
    """The plan that the options describe. Raises ConfigError for what cannot be measured here."""
    device = _device(options.device, world)
    num_ranks = world.size if world is not None else _num_ranks(options.ranks, device)
    sizes = dict(SIZES[device])
    sizes |= {name: value for name in ("hidden_size", "expert_width") if (value := getattr(options, name))}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ConfigError(
            f"bench.hidden_size={sizes['hidden_size']}: shared by {sizes['num_heads']} heads; give a multiple of that"
        )
    if options.node_size and num_ranks % options.node_size:
        raise ConfigError(f"bench.node_size={options.node_size} does not divide {num_ranks} ranks; leave it out")
    return ProbePlan(
        device=device,
        num_ranks=num_ranks,
        node_size=options.node_size,
        seconds=options.seconds,
        port=free_port() if world is None else 0,
        **sizes,
    )


def _device(asked: str, world: World | None) -> Literal["cpu", "cuda"]:
    """The device to probe. `auto` is alike on all ranks of a job only where all hosts are."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ConfigError("bench.device='cuda': torch sees no GPU here; leave --device out, or see doctor")
    wants_gpu = world is None or world.wants_gpu
    return "cuda" if asked == "cuda" or (asked == "auto" and has_gpu and wants_gpu) else "cpu"


def _num_ranks(asked: int, device: str) -> int:
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and asked > gpus:
        raise ConfigError(f"bench.ranks={asked}: this machine has {gpus} GPUs, and each rank needs its own; give fewer")
    return asked or gpus or CPU_RANKS


main = partial(run_benchmark, Probe)
