"""The life of a rank of the layer benchmark; rank 0 tells the parent what was found, as it is found."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from typing import Literal

import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.bench.candidates.layers import PLAIN, LayerCandidate, LayerSetup, build
from ds_moe_ep.bench.candidates.matmuls import expert_matmuls
from ds_moe_ep.bench.harness.collective import slowest
from ds_moe_ep.bench.harness.method import Candidate, Ranks, Round, measure
from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank, loopback_environment
from ds_moe_ep.bench.layer.same import check_same, outcome_of
from ds_moe_ep.bench.meters.memory import peak_bytes, return_freed_memory
from ds_moe_ep.bench.meters.traffic import counted

NATIVE, SERIAL, OVERLAPPED, MATMUL = "native", "serial", "overlapped", "matmul"
CANDIDATES = (NATIVE, SERIAL, OVERLAPPED, PLAIN, MATMUL)
AUX_LOSS_WEIGHT = 0.01
START_TIMEOUT_S = 300.0
MEMORY_REPEATS = 3


@dataclass(frozen=True)
class LayerPlan:
    """One run of the benchmark; the same on every rank."""

    cases: tuple[LayerCase, ...]
    candidates: tuple[str, ...]
    num_ranks: int
    rounds: int
    warm_ups: int
    measure: Literal["time", "memory"]  # memory in processes of its own: see memory.py
    device: str
    port: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The candidates that are layers."""
        return tuple(name for name in self.candidates if name != MATMUL)


def run_rank(rank: int, plan: LayerPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    os.environ.update(loopback_environment(rank, plan.num_ranks, plan.port))
    os.environ["DS_ACCELERATOR"] = plan.device
    if plan.measure == "memory" and plan.device == "cpu":
        return_freed_memory()
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: LayerPlan, tell: Tell) -> None:
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR

    device = torch.device(plan.device, rank) if plan.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    native.start_ranks("nccl" if device.type == "cuda" else "gloo", START_TIMEOUT_S)
    bench = _RankBench(rank, plan, device, tell)
    for case in plan.cases:
        (bench.time_case if plan.measure == "time" else bench.memory_of)(case)
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class _RankBench:
    rank: int
    plan: LayerPlan
    device: torch.device
    tell: Tell

    def time_case(self, case: LayerCase) -> None:
        """Compares, counts and times the candidates of a case."""
        self.tell(Finding("phase", f"{case.name}, comparing the results"))
        layers = {name: self.build(name, case) for name in self.plan.layers}
        self._compare(case, layers)
        for name, candidate in layers.items():
            candidate.prepare()
            with counted() as traffic:
                candidate.run()
            rows, rest = self.slowest([float(traffic.row_bytes), float(traffic.collective_bytes)])
            of = f"layer.{case.name}.{name}"
            self.tell(Finding(samples={f"{of}.bytes": (rows,), f"{of}.collective_bytes": (rest,)}))
        self.tell(Finding("phase", f"{case.name}, timing"))
        gc.collect()
        gc.freeze()  # what is alive now need not be looked at in a timed collection
        measure(
            {name: layers[name] if name in layers else self._matmuls(case) for name in self.plan.candidates},
            rounds=self.plan.rounds,
            warm_ups=self.plan.warm_ups,
            ranks=Ranks(dist.barrier, self.slowest),
            on_round=partial(self._tell_round, case.name),
        )
        gc.unfreeze()

    def _matmuls(self, case: LayerCase) -> Candidate:
        return expert_matmuls(case, self.rank, self.plan.num_ranks, self.device)

    def _tell_round(self, case: str, index: int, times: Round) -> None:
        samples = {f"layer.{case}.{name}.time": (1e3 * seconds,) for name, seconds in times.items()}
        self.tell(Finding(samples=samples))
        self.tell(Finding("phase", f"{case}, timing", advance=1))

    def _compare(self, case: LayerCase, layers: dict[str, LayerCandidate]) -> None:
        outcomes = {name: outcome_of(candidate) for name, candidate in layers.items()}
        for name in list(outcomes)[1:]:
            worst = check_same(f"{case.name}.{name}", outcomes[name], next(iter(outcomes.values())))
            samples = {f"layer.{case.name}.{name}.difference": tuple(self.slowest([worst]))}
            self.tell(Finding(samples=samples))

    def memory_of(self, case: LayerCase) -> None:
        """Peak memory of each layer, built afresh after one of its kind has run."""
        self.tell(Finding("phase", f"{case.name}, peak memory"))
        for name in self.plan.layers:
            build = partial(self._fresh_step, name, case)
            peak_bytes(build, self.device)  # the first one warms up
            peaks = [float(peak_bytes(build, self.device)) for _ in range(MEMORY_REPEATS)]
            self.tell(Finding(samples={f"layer.{case.name}.{name}.peak": tuple(self.slowest(peaks))}))
            self.tell(Finding("phase", f"{case.name}, peak memory", advance=1))

    def _fresh_step(self, name: str, case: LayerCase) -> Callable[[], object]:
        candidate = self.build(name, case)

        def step() -> None:
            candidate.prepare()
            candidate.run()

        return step

    def build(self, name: str, case: LayerCase) -> LayerCandidate:
        """The layer `name` with the case's weights and this rank's tokens. Collective."""
        return build(
            name,
            LayerSetup(
                case=case,
                rank=self.rank,
                num_ranks=self.plan.num_ranks,
                device=self.device,
                aux_loss_weight=AUX_LOSS_WEIGHT,
            ),
        )

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks."""
        return slowest(values, self.device)
