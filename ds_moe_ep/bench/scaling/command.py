"""How one system scales with the ranks that share its experts: EP = 1, 2, 4, 8, 16, and the specification's four laws.

    python -m ds_moe_ep bench scaling --out scaling.jsonl

Each size runs in a world of its own, of as many ranks, 4 on a node: once with the tokens of a rank held constant, once
with the tokens of all of them. Devices are emulated, since ranks that share two cores cannot scale; with --link the
nodes are joined by the links of the specification's cluster. Memory is that of real experts and their optimizer, in
worlds of their own. The laws are fitted to what was measured (section 4.3), whatever comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.bench.systems.plan import EMULATED_MODEL, SystemsPlan, link_mbit
from ds_moe_ep.bench.systems.ranks import run_systems_rank
from ds_moe_ep.bench.testbed import Environment, open_testbed
from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.config.options import option
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import cell
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.specification.derived import cluster_traffic_ratio
from ds_moe_ep.specification.laws import fit, r2_text

SIZES = (1, 2, 4, 8, 16)
RANKS_PER_NODE = 4
SEQUENCES_PER_RANK = 8
SYSTEM = "ep16"
METRICS = {
    "tps": Metric(
        "tokens/s", "emulated device; all tokens of a step over the time of the slowest rank, quartiles", True
    ),
    "tpot": Metric("us", "emulated device; time of the slowest rank over all tokens of a step, quartiles", True),
    "busy": Metric("%", "emulated compute over wall time, mean of the ranks, quartiles", True),
    "memory_per_expert": Metric(
        "bytes", "weights, gradients and optimizer states of the fullest rank, over the experts of a layer"
    ),
}
UNITS = {"tps": "tokens/s", "tpot": "us", "busy": "percent", "memory_per_expert": "bytes"}  # of the table


@dataclass(frozen=True, kw_only=True)
class ScalingPlan(SystemsPlan):
    """One world: what is held constant, and its ranks."""

    systems: tuple[str, ...] = (SYSTEM,)
    modes: tuple[str, ...] = ("training",)
    environments: tuple[Environment, ...] = (Environment("unshaped", None),)
    model: ModelConfig = EMULATED_MODEL
    schedule: str = "peers"
    total: str = "constant_rank"

    def prefix(self, environment: str, mode: str, system: str) -> str:
        return f"scaling.{self.total}.ep{self.ep_size}"


def plan_of(compute_s: float, total: str, size: int, rounds: int = 20, warm_ups: int = 2) -> ScalingPlan:
    """The plan of one world: its ranks, its tokens, and the compute that these take."""
    sequences = SEQUENCES_PER_RANK * (size if total == "constant_rank" else SIZES[-1])
    return ScalingPlan(
        device="emulated",
        total=total,
        ep_size=size,
        num_sequences=sequences,
        step_compute_s=compute_s * sequences / size / SEQUENCES_PER_RANK,
        num_nodes=max(1, size // RANKS_PER_NODE),
        ranks_per_node=min(size, RANKS_PER_NODE),
        rounds=rounds,
        warm_ups=warm_ups,
        port=free_port(),
    )


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(BenchmarkOptions):
    """Options of the scaling benchmark."""

    link: bool = option(False, "join the nodes by shaped links (as root)")
    compute_s: float = option(1.0, "emulated compute of a rank's step, at constant rank", above=0)
    rounds: int = option(20, "measured steps of a world", least=1)
    warm_ups: int = option(2, "steps before them", least=1)
    no_memory: bool = option(False, "leave memory out")


class ScalingBenchmark(Benchmark):
    """One system on 1 to 16 ranks."""

    module = ("ds_moe_ep", "bench", "scaling")
    options = ScalingOptions
    description = "Measures how throughput, latency, busy fraction and memory scale with the ranks of EP."
    num_ranks = SIZES[-1]

    def __init__(self, options: ScalingOptions) -> None:
        self._options = options

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        options = self._options
        for total, title in TOTALS.items():
            for size in SIZES:
                plan = plan_of(options.compute_s, total, size, options.rounds, options.warm_ups)
                launch = partial(Launch, run=run_systems_rank, num_ranks=size)
                with ExitStack() as links:
                    if options.link and plan.num_nodes > 1:
                        widest = plan_of(options.compute_s, "constant_rank", SIZES[-1])
                        link = Environment("cluster", link_mbit(widest, cluster_traffic_ratio()))  # one for all sizes
                        testbed = links.enter_context(open_testbed(plan.num_nodes))
                        plan = replace(plan, testbed=testbed, environments=(link,))
                    yield launch(plan=plan, title=f"{title}, EP={size}: ", steps=options.warm_ups + options.rounds)
                if not options.no_memory:
                    plan = replace(plan, device="cpu", measure="memory", testbed=None, port=free_port())
                    yield launch(plan=plan, title=f"{title}, EP={size}: ", steps=1)

    def metric(self, name: str) -> Metric | None:
        parts = name.split(".")
        if parts[2] != "fit":
            return METRICS.get(".".join(parts[3:]))
        law = METRICS[parts[3]]
        return Metric(law.unit if parts[4] == "coefficient" else "ratio", "", law.is_emulated)

    def derive(self, found: Collector) -> Iterator[DerivedSamples]:
        """Memory per expert, and the laws' fits to the medians."""
        num_experts = plan_of(1.0, "constant_rank", 1).moe(SYSTEM).num_experts
        for total in TOTALS:
            medians: dict[str, dict[int, float]] = {law: {} for law in LAWS}
            for size in SIZES:
                of = f"scaling.{total}.ep{size}"
                held = [found.of(f"{of}.memory.{part}") for part in ("weights", "gradients", "optimizer")]
                of_laws = {law: found.of(f"{of}.{law}") for law in LAWS}
                if all(held):
                    of_laws["memory_per_expert"] = [sum(values[0] for values in held) / num_experts]
                    yield DerivedSamples(f"{of}.memory_per_expert", of_laws["memory_per_expert"])
                for law, values in of_laws.items():
                    if values:
                        medians[law][size] = summarize(values).value
            for law, of_sizes in medians.items():
                if len(of_sizes) > 1:
                    yield from _fit(total, law, of_sizes)

    def tables(self, records: Sequence[Record]) -> Iterator[Table]:
        """A row per size, with the fits below."""
        values = {record.name: record for record in records}
        rows, last = list[tuple[str, ...]](), list[int]()
        for total, title in TOTALS.items():
            for size in SIZES:
                of = f"scaling.{total}.ep{size}"
                rows.append(
                    (title, str(size), *(cell(values.get(f"{of}.{law}"), unit, 1) for law, unit in UNITS.items()))
                )
            fits = (values.get(f"scaling.{total}.fit.{law}.r2") for law in UNITS)
            rows.append(("R2 of the law", "", *(r2_text(None if r2 is None else r2.value, 3) for r2 in fits)))
            last.append(len(rows) - 1)
        found = table("Scaling: median; fits by least squares", ("held constant", "EP", *UNITS), rows, text_columns=1)
        yield replace(found, ruled_rows=frozenset(last))


def _fit(total: str, law: str, values: dict[int, float]) -> Iterator[DerivedSamples]:
    fitted, of = fit(law, values), f"scaling.{total}.fit.{law}"
    note = f"least squares of {LAWS[law]} over the medians at EP = {', '.join(map(str, values))}"
    yield DerivedSamples(f"{of}.coefficient", [fitted.coefficient], note, n=len(values))
    if fitted.r2 is not None:
        yield DerivedSamples(f"{of}.r2", [fitted.r2], note, n=len(values))


main = partial(run_benchmark, ScalingBenchmark)
