"""Times schedules of one layer, forward and backward, on nodes that are joined by shaped links.

    python -m ds_moe_ep.bench.overlap                                  # emulated devices, traffic 0.3 to 2 x compute
    python -m ds_moe_ep.bench.overlap --device real --links 100mbit 400mbit 2gbit none
    python -m ds_moe_ep.bench.overlap --device real --links none --no-testbed
    python -m ds_moe_ep.bench.overlap --workload W0 W1 W3 --micro-batches 4 16  # unequal loads, in windows

16 ranks, 4 on each of 4 nodes (`testbed.py`), one expert per rank. Without root it says so and measures nothing; with
--no-testbed it runs over the machine's loopback. Each side's time is told as it comes. Ctrl-C ends the run; what was
measured until then is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ds_moe_ep.bench.candidates.cases import CASES
from ds_moe_ep.bench.candidates.layers import AUTOEP, BIAS, NATIVE, NO_REMEDY, PHASES, REPLICAS
from ds_moe_ep.bench.candidates.workloads import TITLES
from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.bench.overlap.findings import derive, metric, overlap_tables
from ds_moe_ep.bench.overlap.ranks import ALL_CANDIDATES, CANDIDATES, OverlapPlan, run_overlap_rank
from ds_moe_ep.bench.overlap.windows import WindowedLoad
from ds_moe_ep.bench.testbed import Environment, open_testbed, parse_rate
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table

OF_WORKLOADS = (NO_REMEDY, REPLICAS, BIAS, NATIVE, AUTOEP)
LOADS = ", ".join(f"{name} {title}" for name, title in TITLES.items())
RATIOS = (0.3, 0.6, 1.0, 2.0)
PRELOAD = ("ds_moe_ep.bench.overlap.preload",)
PORT = 29500  # inside the namespaces, where nobody else listens


@dataclass(frozen=True, kw_only=True)
class OverlapOptions(BenchmarkOptions):
    """Options of the overlap benchmark."""

    device: Literal["emulated", "real"] = option("emulated", "what computes experts")
    case: str = option("k1_even", "routing, and top-k", choices=tuple(case.name for case in CASES))
    sides: tuple[str, ...] = option(
        (),
        f"of {', '.join(ALL_CANDIDATES)} (default: all without a workload, else {', '.join(OF_WORKLOADS)})",
        choices=ALL_CANDIDATES,
        metavar="SIDE",
    )
    ratios: tuple[float, ...] = option(RATIOS, "traffic over emulated compute", above=0)
    of: str = option("step", "the pass that --ratios are of", choices=PHASES)
    links: tuple[float | None, ...] = option((), "rates instead of ratios, like 100mbit, or none", type=parse_rate)
    compute_s: float = option(1.0, "an emulated expert's forward pass in seconds", above=0)
    workload: tuple[str, ...] = option(
        (), f"loads of their own instead of the case's: {LOADS}", choices=tuple(TITLES), metavar="W0..W7"
    )
    micro_batches: tuple[int, ...] = option(
        (1,), "of a window of a --workload: weights change behind them", least=1, metavar="N"
    )
    seed: int = option(0, "of the --workload", least=0)
    rounds: int = option(5, "measured rounds per environment", least=1)
    warm_ups: int = option(1, "rounds before them, in which 'auto' is chosen and copies are first placed", least=0)
    nodes: int = option(4, "network namespaces", least=1)
    ranks: int = option(4, "ranks of a node", least=1)
    no_testbed: bool = option(False, "over the loopback, without namespaces")


class OverlapBenchmark(Benchmark):
    """Schedules of one layer on shaped links."""

    module = ("ds_moe_ep.bench.overlap",)
    options = OverlapOptions
    description = "Times schedules of one layer on nodes that are joined by shaped links."
    prints_markdown = True

    def __init__(self, options: OverlapOptions) -> None:
        case = next(case for case in CASES if case.name == options.case)
        if options.nodes * options.ranks != case.num_experts:
            raise ConfigError(
                f"bench.nodes={options.nodes} x ranks={options.ranks}: the layer has {case.num_experts} experts, one "
                f"per rank; give numbers whose product is {case.num_experts}"
            )
        if options.device == "real" and not options.links:
            raise ConfigError(
                "bench.device='real': --ratios are of emulated compute; give --links 100mbit 400mbit none"
            )
        if options.no_testbed and options.links != (None,):
            raise ConfigError("bench.no_testbed: nothing shapes the loopback; give --links none")
        sides = options.sides or (OF_WORKLOADS if options.workload else CANDIDATES)
        self._has_testbed = not options.no_testbed
        plan = OverlapPlan(
            case=case,
            candidates=tuple(name for name in ALL_CANDIDATES if name in sides),
            environments=(),
            device=options.device,
            row_us=1e6 * options.compute_s / case.num_rows,
            rounds=options.rounds,
            warm_ups=options.warm_ups,
            num_nodes=options.nodes,
            ranks_per_node=options.ranks,
            testbed=None,
            port=free_port() if options.no_testbed else PORT,
            workloads=tuple(
                WindowedLoad(name, number, options.seed)
                for number in options.micro_batches
                for name in options.workload
            ),
        )
        self.plan = replace(plan, environments=tuple(_environments(options, plan)))
        self.num_ranks = plan.num_ranks

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        if self._has_testbed:
            self.plan = replace(self.plan, testbed=stack.enter_context(open_testbed(self.plan.num_nodes)))
        steps = len(self.plan.places) * (self.plan.warm_ups + self.plan.rounds)
        yield Launch(run=run_overlap_rank, plan=self.plan, num_ranks=self.num_ranks, steps=steps, preload=PRELOAD)

    def metric(self, name: str) -> Metric:
        return metric(self.plan, name)

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        return derive(self.plan, found)

    def tables(self, records: Sequence[Record]) -> Iterable[Table]:
        return overlap_tables(records)


def _environments(options: OverlapOptions, plan: OverlapPlan) -> Iterator[Environment]:
    for rate in options.links:
        yield Environment("unshaped" if rate is None else f"{rate:g} mbit", rate)
    for ratio in () if options.links else options.ratios:
        yield Environment(f"{ratio:g} of {options.of}", plan.link_mbit(ratio, options.of))


main = partial(run_benchmark, OverlapBenchmark)
