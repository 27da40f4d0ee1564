"""What each rank of the overlap benchmark does, and the sides that it compares."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from multiprocessing.queues import Queue
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, live_as_rank
from ds_moe_ep.bench.rivals.cases import LayerCase, expert_weights, gate_weight, output_gradient, tokens
from ds_moe_ep.bench.rivals.emulated import EmulatedExpert, EmulatedExperts
from ds_moe_ep.bench.testbed import TestBed, take_place
from ds_moe_ep.comm.recorder import HostRecorder
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.schedule.shaping import SCHEDULES, WIRE
from ds_moe_ep.schedule.spans import overlap

OURS: Mapping[str, Mapping[str, Any]] = {"auto": {"schedule": "auto"}, **SCHEDULES}
HOOKED = "hooked native"  # DeepSpeed's own layer with the hooks, on the schedule "peers, 2 cuts"
NATIVE, AUTOEP = "native", "autoep"
SIDES = (*OURS, HOOKED, NATIVE, AUTOEP, WIRE)
PHASES = ("forward", "backward", "step")
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Shaping:
    """A rate of every node's link in Mbit/s; None for no limit."""

    name: str
    rate_mbit: float | None


@dataclass(frozen=True)
class OverlapPlan:
    """One run of the benchmark; the same on every rank."""

    case: LayerCase
    sides: tuple[str, ...]
    shapings: tuple[Shaping, ...]
    device: Literal["emulated", "real"]
    row_us: float  # what an emulated expert takes for one row, forward
    rounds: int
    warm_ups: int
    num_nodes: int
    ranks_per_node: int
    bed: TestBed | None
    port: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass
class Contender:
    """One side on this rank: a layer with its tokens, and what a recorder saw of it."""

    layer: nn.Module
    x_TD: Tensor
    dy_TD: Tensor
    recorder: HostRecorder | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self) -> None:
        """One forward and backward; leaves the seconds of both in `seconds`."""
        self.x_TD.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        dist.barrier()
        start = time.perf_counter()
        y_TD, l_aux, _ = self.layer(self.x_TD)
        middle = time.perf_counter()
        torch.autograd.backward((y_TD, l_aux), (self.dy_TD, torch.zeros_like(l_aux)))
        stop = time.perf_counter()
        self.seconds = {"forward": middle - start, "backward": stop - middle, "step": stop - start}

    def traffic(self) -> Iterator[tuple[str, float, float]]:
        """(pass, total and exposed seconds of its transfers) of the last step, where they were recorded."""
        spans = self.recorder.spans() if self.recorder is not None else []
        for phase in PHASES if spans else ():
            found = overlap(span for span in spans if phase in ("step", span.tags.phase))
            yield phase, 1e-6 * found.total_us, 1e-6 * found.exposed_us


def run_overlap_rank(rank: int, plan: OverlapPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    take_place(plan.bed, rank, plan.num_ranks, plan.ranks_per_node, plan.port)
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: OverlapPlan, tell: Callable[[Finding], object]) -> None:
    from ds_moe_ep.bench.rivals import native  # imports deepspeed, which reads DS_ACCELERATOR

    native.start_ranks("gloo", START_TIMEOUT_S)
    sides = {name: contender(name, plan, rank) for name in plan.sides}
    gc.collect()
    gc.freeze()
    for shaping in plan.shapings:
        tell(Finding(shaping.name, "", "phase", text="shaping the links"))
        dist.barrier()
        if rank == 0 and plan.bed is not None:
            plan.bed.shape(shaping.rate_mbit)
        if "auto" in sides:
            sides["auto"].layer.get_submodule("deepspeed_moe").dispatcher.forget_choice()  # type: ignore[union-attr, operator]
        for index in range(plan.warm_ups + plan.rounds):
            order = rotation(plan.sides, index)
            for name in order[::-1] if index % 2 else order:  # so that few rounds have different neighbours, too
                sides[name].step()
                found = _findings(shaping.name, name, sides[name])
                if index >= plan.warm_ups:
                    for finding in found:
                        tell(finding)
            tell(Finding(shaping.name, "", "phase", text=f"round {index + 1 - plan.warm_ups} of {plan.rounds}"))
    dist.barrier()
    dist.destroy_process_group()


def _findings(shaping: str, name: str, side: Contender) -> list[Finding]:
    """Seconds of the slowest rank, and total and exposed communication of the mean rank. Collective."""
    traffic = list(side.traffic())
    longest = torch.tensor(list(side.seconds.values()), dtype=torch.float64)
    summed = torch.tensor([seconds for _, *both in traffic for seconds in both], dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    dist.all_reduce(summed)
    found = [Finding(shaping, name, phase, (float(s),)) for phase, s in zip(side.seconds, longest, strict=True)]
    whats = [f"{phase}.{what}" for phase, *_ in traffic for what in ("total", "exposed")]
    mean = summed / dist.get_world_size()
    return found + [Finding(shaping, name, what, (float(s),)) for what, s in zip(whats, mean, strict=True)]


def contender(name: str, plan: OverlapPlan, rank: int) -> Contender:
    """The side `name` with the case's weights and this rank's tokens. Collective."""
    case = plan.case
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        layer = _layer(name, plan)
    x_TD = tokens(case, rank).requires_grad_()
    recorder = None
    if name in (*OURS, HOOKED, WIRE):
        recorder = HostRecorder(rank)
        inner: Any = layer.get_submodule("deepspeed_moe")
        (inner.overlap if name == HOOKED else inner).dispatcher.record(recorder)
    if name != AUTOEP:
        with torch.no_grad():
            layer.get_submodule("deepspeed_moe.gate.wg").weight.copy_(gate_weight(case))  # type: ignore[operator]
        if plan.device == "real" and name != WIRE:
            _load_experts(layer, case, rank, plan.num_ranks)
    return Contender(layer, x_TD, output_gradient(case, rank), recorder)


def _layer(name: str, plan: OverlapPlan) -> nn.Module:
    case, row_us = plan.case, 0.0 if name == WIRE else plan.row_us
    is_emulated = plan.device == "emulated" or name == WIRE
    if name in (NATIVE, HOOKED):
        from ds_moe_ep.bench.rivals.native import native_layer
        from ds_moe_ep.engine.hooks.attach import attach_overlap

        layer = native_layer(case, plan.num_ranks, EmulatedExpert(row_us) if is_emulated else None)
        if name == HOOKED:
            attach_overlap(layer, {**OURS["peers, 2 cuts"], "node_size": plan.ranks_per_node})
        return layer
    if name == AUTOEP:
        from ds_moe_ep.bench.rivals.autoep import autoep_layer, emulate_experts

        layer = autoep_layer(case, plan.num_ranks)
        if is_emulated:
            emulate_experts(layer, EmulatedExpert(row_us))
        return layer
    from ds_moe_ep.engine.layer import MoE
    from ds_moe_ep.moe.experts import GeluMLP

    config = MoEConfig(
        num_experts=case.num_experts, ep_size=plan.num_ranks, node_size=plan.ranks_per_node, top_k=case.top_k
    )
    layer = MoE(
        case.hidden_size,
        GeluMLP(case.hidden_size, case.width, bias=True),
        config=replace(config, **OURS.get(name, OURS["serial"])),
    )
    layer.set_deepspeed_parallelism()
    if is_emulated:
        layer.deepspeed_moe.experts = EmulatedExperts(config.num_local_experts, row_us)
    return layer


def _load_experts(layer: nn.Module, case: LayerCase, rank: int, num_ranks: int) -> None:
    experts = layer.get_submodule("deepspeed_moe.experts.deepspeed_experts")
    num_local = case.num_experts // num_ranks
    with torch.no_grad():
        for index, expert in enumerate(experts.children()):
            values = expert_weights(case, rank * num_local + index).tensors()
            for parameter, value in zip(expert.parameters(), values, strict=True):
                parameter.copy_(value)
