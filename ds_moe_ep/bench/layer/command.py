"""Times one layer, forward and backward: ours serial and overlapped, DeepSpeed's own, the matmuls alone.

    python -m ds_moe_ep.bench.layer [--ranks 4] [--rounds 20] [--out layer.jsonl]

Starts its own ranks on this machine. Ctrl-C ends the run; what was measured until then is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from ds_moe_ep.bench.candidates.cases import CASES, LayerCase
from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.bench.layer.findings import derive, layer_table, metric
from ds_moe_ep.bench.layer.ranks import CANDIDATES, LayerPlan, run_rank
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table

NAMES = tuple(case.name for case in CASES if case.top_k <= 2)
NUM_EXPERTS = CASES[0].num_experts


@dataclass(frozen=True, kw_only=True)
class LayerOptions(BenchmarkOptions):
    """Options of the layer benchmark."""

    ranks: int = option(4, "processes, and the expert-parallel size", least=2)
    experts: int = option(NUM_EXPERTS, "experts of the layer; --ranks divides them", least=2)
    rounds: int = option(20, "measured rounds per case", least=1)
    warm_ups: int = option(3, "rounds before them", least=0)
    cases: tuple[str, ...] = option(NAMES, f"of {', '.join(NAMES)}", choices=NAMES, metavar="CASE")
    sides: tuple[str, ...] = option(CANDIDATES, f"of {', '.join(CANDIDATES)}", choices=CANDIDATES, metavar="SIDE")
    device: Literal["cpu", "cuda"] = option("cpu", "one device per rank")
    no_memory: bool = option(False, "do not measure peak memory")


def _sized(case: LayerCase, num_experts: int) -> LayerCase:
    """The case with as many experts; another number stands in its name, and so in those of its Records."""
    if num_experts == case.num_experts:
        return case
    return replace(case, name=f"{case.name}_of_{num_experts}", num_experts=num_experts)


class LayerBenchmark(Benchmark):
    """One layer against DeepSpeed's own."""

    module = ("ds_moe_ep.bench.layer",)
    options = LayerOptions
    description = "Times one layer, forward and backward, against DeepSpeed's own."
    prints_markdown = True

    def __init__(self, options: LayerOptions) -> None:
        cases = tuple(_sized(case, options.experts) for name in options.cases for case in CASES if case.name == name)
        self.device, self.num_ranks, self._no_memory = options.device, options.ranks, options.no_memory
        if options.experts % options.ranks:
            raise ConfigError(
                f"bench.ranks={options.ranks} must divide bench.experts={options.experts}: use --experts "
                f"{options.ranks} for one expert per rank, or a multiple of it"
            )
        if options.device == "cuda" and (gpus := torch.cuda.device_count()) < options.ranks:
            raise ConfigError(f"bench.device='cuda': {options.ranks} ranks need a GPU each, and torch sees {gpus} here")
        self.plan = LayerPlan(
            cases=cases,
            candidates=tuple(name for name in CANDIDATES if name in options.sides),
            num_ranks=options.ranks,
            rounds=options.rounds,
            warm_ups=options.warm_ups,
            measure="time",
            device=options.device,
            port=free_port(),
        )

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        launch = partial(Launch, run=run_rank, num_ranks=self.num_ranks)
        num_cases = len(self.plan.cases)
        yield launch(plan=self.plan, title="time: ", steps=num_cases * self.plan.rounds)
        if not self._no_memory:
            plan = replace(self.plan, measure="memory", port=free_port())
            yield launch(plan=plan, title="memory: ", steps=num_cases * len(self.plan.layers))

    def metric(self, name: str) -> Metric:
        return metric(name)

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        return derive(self.plan, found)

    def tables(self, records: Sequence[Record]) -> Iterator[Table]:
        yield layer_table(records)


main = partial(run_benchmark, LayerBenchmark)
