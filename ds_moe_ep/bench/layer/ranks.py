"""What each rank of the layer benchmark does; rank 0 tells the parent what was found, as it is found."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from multiprocessing.queues import Queue
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.bench.harness.method import Ranks, Round, Side, measure
from ds_moe_ep.bench.harness.processes import Finding, live_as_rank, loopback_environment
from ds_moe_ep.bench.layer.sides import LayerSide, SideOutcome, check_same, layer_side, matmul_side
from ds_moe_ep.bench.meters.memory import peak_bytes, return_freed_memory
from ds_moe_ep.bench.meters.traffic import counted
from ds_moe_ep.bench.rivals.cases import LayerCase
from ds_moe_ep.config.knobs import MoEConfig

NATIVE, SERIAL, OVERLAPPED, MATMUL = "native", "serial", "overlapped", "matmul"
SIDES = (NATIVE, SERIAL, OVERLAPPED, MATMUL)
START_TIMEOUT_S = 300.0
MEMORY_REPEATS = 3


@dataclass(frozen=True)
class LayerPlan:
    """One run of the benchmark; the same on every rank."""

    cases: tuple[LayerCase, ...]
    sides: tuple[str, ...]
    num_ranks: int
    rounds: int
    warm_ups: int
    measure: Literal["time", "memory"]  # memory in processes of its own: see memory.py
    device: str
    port: int


def run_rank(rank: int, plan: LayerPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    os.environ.update(loopback_environment(rank, plan.num_ranks, plan.port))
    os.environ["DS_ACCELERATOR"] = plan.device
    if plan.measure == "memory" and plan.device == "cpu":
        return_freed_memory()
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: LayerPlan, tell: Callable[[Finding], object]) -> None:
    from ds_moe_ep.bench.rivals import native  # imports deepspeed, which reads DS_ACCELERATOR

    device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    native.start_ranks("nccl" if device.type == "cuda" else "gloo", START_TIMEOUT_S)
    bench = _RankBench(rank, plan, device, tell)
    for case in plan.cases:
        if plan.measure == "time":
            bench.time_case(case)
        else:
            bench.memory_of(case)
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class _RankBench:
    rank: int
    plan: LayerPlan
    device: torch.device
    tell: Callable[[Finding], object]

    def time_case(self, case: LayerCase) -> None:
        """Compares, counts and times the sides of a case."""
        self.tell(Finding(case.name, "", "phase", text="comparing the sides' results"))
        layers = {name: self.build(name, case) for name in self.plan.sides if name != MATMUL}
        self._compare(case, layers)
        for name, side in layers.items():
            with counted() as traffic:
                side.step()
            rows, rest = self.slowest([float(traffic.row_bytes), float(traffic.collective_bytes)])
            self.tell(Finding(case.name, name, "bytes", (rows,)))
            self.tell(Finding(case.name, name, "collective_bytes", (rest,)))
        sides: dict[str, Side] = {name: side.side() for name, side in layers.items()}
        if MATMUL in self.plan.sides:
            sides[MATMUL] = matmul_side(case, self.rank, self.plan.num_ranks, self.device)
        self.tell(Finding(case.name, "", "phase", text="timing"))
        gc.collect()
        gc.freeze()  # what is alive now need not be looked at in a timed collection
        measure(
            {name: sides[name] for name in self.plan.sides},
            rounds=self.plan.rounds,
            warm_ups=self.plan.warm_ups,
            ranks=Ranks(dist.barrier, self.slowest),
            on_round=partial(self._tell_round, case.name),
        )
        gc.unfreeze()

    def _tell_round(self, case: str, index: int, times: Round) -> None:
        for name, seconds in times.items():
            self.tell(Finding(case, name, "time", (seconds,)))

    def _compare(self, case: LayerCase, layers: dict[str, LayerSide]) -> None:
        reference: SideOutcome | None = None
        for name, side in layers.items():
            outcome = side.outcome()
            if reference is None:
                reference = outcome
                continue
            worst = check_same(f"{case.name}.{name}", outcome, reference)
            self.tell(Finding(case.name, name, "difference", tuple(self.slowest([worst]))))

    def memory_of(self, case: LayerCase) -> None:
        """Peak memory of each layer, built afresh after one of its kind has run."""
        self.tell(Finding(case.name, "", "phase", text="peak memory"))
        for name in self.plan.sides:
            if name == MATMUL:
                continue
            build = partial(self._fresh_step, name, case)
            peak_bytes(build, self.device)  # the first one warms up
            peaks = [float(peak_bytes(build, self.device)) for _ in range(MEMORY_REPEATS)]
            self.tell(Finding(case.name, name, "peak", tuple(self.slowest(peaks))))

    def _fresh_step(self, name: str, case: LayerCase) -> Callable[[], object]:
        side = self.build(name, case)

        def step() -> None:
            side.clear()
            side.step()

        return step

    def build(self, name: str, case: LayerCase) -> LayerSide:
        """The layer `name` with the case's weights and this rank's tokens. Collective."""
        with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
            layer = _layer(name, case, self.plan.num_ranks)
        return layer_side(layer, case, self.rank, self.plan.num_ranks, self.device)

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks."""
        largest = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [float(value) for value in largest]


def _layer(name: str, case: LayerCase, ep_size: int) -> nn.Module:
    from ds_moe_ep.bench.rivals.native import native_layer

    if name == NATIVE:
        return native_layer(case, ep_size)
    from ds_moe_ep.engine.layer import MoE
    from ds_moe_ep.moe.experts import GeluMLP

    schedule: Literal["serial", "peers"] = "serial" if name == SERIAL else "peers"
    config = MoEConfig(num_experts=case.num_experts, ep_size=ep_size, top_k=case.top_k, schedule=schedule)
    layer = MoE(case.hidden_size, GeluMLP(case.hidden_size, case.width, bias=True), config=config)
    layer.set_deepspeed_parallelism()
    return layer
