"""The life of a rank of the overlap benchmark."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from typing import Literal

import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.bench.candidates.layers import (
    AUTOEP,
    HOOKED,
    NATIVE,
    OURS,
    REMEDIES,
    TWO_LEVEL,
    LayerCandidate,
    LayerSetup,
    build,
    dispatcher_of,
)  # fmt: skip
from ds_moe_ep.bench.harness.collective import mean, slowest
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank
from ds_moe_ep.bench.overlap.windows import LayerWindow, MicroBatch, WindowedLoad, run_window
from ds_moe_ep.bench.testbed import Environment, TestBed, take_place
from ds_moe_ep.records.quantity import number
from ds_moe_ep.schedule.shaping import COMPUTES, WIRE, link_rate

CANDIDATES = (*OURS, HOOKED, NATIVE, AUTOEP, WIRE)
ALL_CANDIDATES = (*OURS, *REMEDIES, *TWO_LEVEL, HOOKED, NATIVE, AUTOEP, WIRE)
START_TIMEOUT_S = 300.0

Samples = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class OverlapPlan:
    """One run of the benchmark; the same on every rank."""

    case: LayerCase
    candidates: tuple[str, ...]
    environments: tuple[Environment, ...]
    device: Literal["emulated", "real"]
    row_us: float  # what an emulated expert takes for one row, forward
    rounds: int
    warm_ups: int
    num_nodes: int
    ranks_per_node: int
    testbed: TestBed | None
    port: int
    workloads: tuple[WindowedLoad, ...] = ()  # in place of the case's load

    @property
    def places(self) -> list[str]:
        """Names of everything that is measured on: environments, with each workload where there are some."""
        return [place_of(environment, load) for environment in self.environments for load in self.workloads or (None,)]

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def prefix(self, environment: str, name: str, phase: str) -> str:
        """The beginning of the names of a candidate's Records."""
        return f"overlap.{self.device}.{environment}.{name}.{phase}"

    def compute_ms(self, phase: str) -> float:
        """Milliseconds of emulated experts for the mean rows of a rank."""
        return COMPUTES[phase] * self.case.num_rows * self.row_us / 1e3

    def link_mbit(self, ratio: float, phase: str) -> float:
        """The link over which the traffic of `phase` takes `ratio` times its emulated compute, for even routing."""
        rows = self.case.num_rows * self.ranks_per_node * (self.num_nodes - 1) / self.num_nodes
        exchange_bytes = rows * self.case.hidden_size * 4
        return 8 * link_rate(ratio, phase, exchange_bytes, 1e3 * self.compute_ms("forward"))


def run_overlap_rank(rank: int, plan: OverlapPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    take_place(plan.testbed, rank, plan.num_ranks, plan.ranks_per_node, plan.port)
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: OverlapPlan, tell: Tell) -> None:
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR

    native.start_ranks("gloo", START_TIMEOUT_S)
    setup = LayerSetup(
        case=plan.case,
        rank=rank,
        num_ranks=plan.num_ranks,
        node_size=plan.ranks_per_node,
        row_us=plan.row_us if plan.device == "emulated" else None,
        is_recorded=True,
    )
    candidates = {name: build(name, setup) for name in plan.candidates}
    gc.collect()
    gc.freeze()
    for environment in plan.environments:
        tell(Finding("phase", f"{environment.name}: shaping the links"))
        dist.barrier()
        if rank == 0 and plan.testbed is not None:
            plan.testbed.shape(environment.rate_mbit)
        if "auto" in candidates:
            dispatcher_of(candidates["auto"].layer).forget_choice()
        for load in plan.workloads or (None,):
            _measure(plan, place_of(environment, load), load, candidates, tell)
    dist.barrier()
    dist.destroy_process_group()


def place_of(environment: Environment, load: WindowedLoad | None) -> str:
    """The name of an environment, with the workload where there is one."""
    return environment.name if load is None else f"{environment.name}, {load}"


def _measure(
    plan: OverlapPlan,
    place: str,
    load: WindowedLoad | None,
    candidates: Mapping[str, LayerCandidate],
    tell: Tell,
) -> None:
    """All rounds of one environment and workload. Collective."""
    windows = {name: LayerWindow(load.micro_batches if load is not None else 1) for name in candidates}
    for index in range(plan.warm_ups + plan.rounds):
        samples: Samples = {}
        order = rotation(plan.candidates, index)
        batches = load.batches(plan.case, dist.get_rank(), plan.num_ranks, index) if load is not None else []
        for name in order[::-1] if index % 2 else order:  # so that few rounds have different neighbours, too
            if load is None:
                found = _sampled(plan, place, name, candidates[name])
            else:
                found = _windowed(plan, place, name, candidates[name], batches, windows[name])
            samples |= found
            kind = f"round {index + 1 - plan.warm_ups}" if index >= plan.warm_ups else "warm-up"
            (step_ms,) = found[f"{plan.prefix(place, name, 'step')}.time"]
            tell(Finding("line", f"{place}, {kind}: {name} {number(step_ms, 0)} ms"))
        if index >= plan.warm_ups:
            tell(Finding(samples=samples))
        tell(Finding("phase", f"{place}: round {index + 1 - plan.warm_ups} of {plan.rounds}", advance=1))


def _windowed(
    plan: OverlapPlan,
    place: str,
    name: str,
    candidate: LayerCandidate,
    batches: Sequence[MicroBatch],
    window: LayerWindow,
) -> Samples:
    """One window: the time of the slowest rank, over all micro-batches. Collective."""
    candidate.prepare()
    dist.barrier()
    seconds = run_window(candidate, batches, window)
    times_s = zip(seconds, slowest(list(seconds.values())), strict=True)
    return {f"{plan.prefix(place, name, phase)}.time": (1e3 * each_s,) for phase, each_s in times_s}


def _sampled(plan: OverlapPlan, environment: str, name: str, candidate: LayerCandidate) -> Samples:
    """One step: times of the slowest rank, the mean rank's transfers and what was hidden of them. Collective."""
    candidate.prepare()
    dist.barrier()
    candidate.run()
    traffic = list(candidate.traffic())
    times_s = zip(candidate.seconds, slowest(list(candidate.seconds.values())), strict=True)
    found: Samples = {f"{plan.prefix(environment, name, phase)}.time": (1e3 * seconds,) for phase, seconds in times_s}
    summed = iter(mean([seconds for _, *both in traffic for seconds in both]))
    for phase, *_ in traffic:
        found |= dict(_traffic(plan, environment, name, phase, next(summed), next(summed)))
    return found


def _traffic(
    plan: OverlapPlan, environment: str, name: str, phase: str, total_s: float, exposed_s: float
) -> Iterator[tuple[str, tuple[float, ...]]]:
    of = plan.prefix(environment, name, phase)
    if name != WIRE:
        if total_s:
            yield f"{of}.hidden", (100 * (1 - exposed_s / total_s),)
        return
    yield f"{of}.traffic", (1e3 * total_s,)
    if plan.device == "emulated":
        yield f"{of}.traffic_ratio", (1e3 * total_s / plan.compute_ms(phase),)
