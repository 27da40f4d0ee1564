"""Compares whole systems, all training one model: EP16 overlapped and serial, TP8/PP2, three layouts that share experts
beside tensor ranks and stages, DeepSpeed's MoE and AutoEP.

    python -m ds_moe_ep bench systems --out systems.jsonl                       # loopback, real compute, real text
    python -m ds_moe_ep bench systems --device emulated --traffic 0.3 0.6 cluster --out shaped.jsonl   # as root
    python -m ds_moe_ep bench systems --memory --out memory.jsonl

The method is the specification's (section 5.2): 10 warm-ups, 100 measured, the lowest and highest 5 % dropped. All
systems alternate in one run. Ctrl-C ends it; what was measured until then is in the file, which `python -m ds_moe_ep
report` draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.bench.systems.findings import derive, metric, summary_tables
from ds_moe_ep.bench.systems.plan import EMULATED_MODEL, SystemsPlan, link_mbit
from ds_moe_ep.bench.systems.ranks import run_systems_rank
from ds_moe_ep.bench.testbed import Environment, open_testbed
from ds_moe_ep.config.knobs import MODELS
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import MODES, SYSTEMS
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.schedule.spans import span_of, write_spans
from ds_moe_ep.specification.derived import cluster_traffic_ratio

DRAW = "; draw them: python -m ds_moe_ep report {out} -o report/"


@dataclass(frozen=True, kw_only=True)
class SystemsOptions(BenchmarkOptions):
    """Options of the systems benchmark."""

    systems: tuple[str, ...] = option(
        tuple(SYSTEMS), f"of {', '.join(SYSTEMS)}", choices=tuple(SYSTEMS), metavar="SYSTEM"
    )
    modes: tuple[str, ...] = option(tuple(MODES), "what is timed", choices=tuple(MODES))
    device: Literal["cpu", "cuda", "emulated"] = option("cpu", "what computes: emulated ones wait")
    traffic: tuple[str, ...] = option(
        ("0.3", "0.6", "cluster"),
        "emulated: EP16's traffic over its compute, which the links are shaped for; `cluster` takes the ratio of the "
        "specification's cluster, `none` does not shape",
    )
    model: str = option("small", "what is trained, where it is not emulated", choices=tuple(MODELS))
    schedule: Literal["auto", "peers", "chunks"] = option("auto", "of ep16 and of the layouts that share experts")
    compute_s: float = option(8.0, "emulated compute of a training step in seconds", above=0)
    sequences: int = option(0, "of a step (0: 64; emulated 128)", least=0)
    rounds: int = option(100, "measured rounds", least=1)
    warm_ups: int = option(10, "rounds before them", least=1)
    memory: bool = option(False, "a memory breakdown instead of times, in processes of their own")
    seed: int = option(0, "of the first weights and of the text", least=0)


class SystemsBenchmark(Benchmark):
    """Whole training systems in one run."""

    module = ("ds_moe_ep", "bench", "systems")
    options = SystemsOptions
    description = "Compares whole training systems in one run, on the loopback or on shaped links."
    width = 120
    next_step = DRAW

    def __init__(self, options: SystemsOptions) -> None:
        is_emulated = options.device == "emulated"
        if options.memory and is_emulated:
            raise ConfigError(
                "bench.memory with device='emulated': emulated experts have no weights; leave --device out"
            )
        if options.device == "cuda" and (gpus := torch.cuda.device_count()) < SystemsPlan().num_ranks:
            raise ConfigError(
                f"bench.device='cuda': 16 ranks start on this machine, which has {gpus} GPUs; run it on one with 16, "
                "or with --device cpu or emulated"
            )
        plan = SystemsPlan(
            systems=tuple(name for name in SYSTEMS if name in options.systems),
            modes=tuple(mode for mode in MODES if mode in options.modes),
            device=options.device,
            measure="memory" if options.memory else "time",
            model=EMULATED_MODEL if is_emulated else MODELS[options.model],
            schedule=options.schedule,
            num_sequences=options.sequences or (128 if is_emulated else 64),
            step_compute_s=options.compute_s,
            rounds=options.rounds,
            warm_ups=options.warm_ups,
            seed=options.seed,
            port=free_port(),
        )
        if plan.num_sequences % (plan.num_ranks * plan.micro_batches):
            raise ConfigError(
                f"bench.sequences={plan.num_sequences}: {plan.num_ranks} ranks and {plan.micro_batches} micro-batches "
                f"share them; give a multiple of {plan.num_ranks * plan.micro_batches}"
            )
        if is_emulated:
            plan = replace(plan, environments=tuple(read_environment(text, plan) for text in options.traffic))
        self.plan, self.num_ranks = plan, plan.num_ranks
        self.device = "cuda" if plan.device == "cuda" else "cpu"

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        if self.plan.is_emulated and self.plan.environments[0].rate_mbit is not None:
            self.plan = replace(self.plan, testbed=stack.enter_context(open_testbed(self.plan.num_nodes)))
        plan, steps = self.plan, len(self.plan.systems)
        if plan.measure == "time":
            steps = len(plan.environments) * (plan.warm_ups + plan.rounds)
        yield Launch(run=run_systems_rank, plan=plan, num_ranks=plan.num_ranks, steps=steps)

    def metric(self, name: str) -> Metric | None:
        return metric(self.plan, name)

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        return derive(self.plan, found)

    def tables(self, records: Sequence[Record]) -> Iterable[Table]:
        return summary_tables(records)

    def save(self, found: Collector, out: Path | None) -> None:
        super().save(found, out)
        if out is not None and (lines := found.texts.get("span")):
            write_spans(out.with_suffix(".spans.jsonl"), [span_of(line, "span") for line in lines])


def read_environment(text: str, plan: SystemsPlan) -> Environment:
    """The links that one word of --traffic asks for."""
    if text == "none":
        return Environment("unshaped", None)
    if text == "cluster":
        return Environment("cluster", link_mbit(plan, cluster_traffic_ratio()))
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0.01 <= ratio <= 9.99:
        raise ConfigError(f"bench.traffic={text!r}: give a ratio from 0.01 to 9.99, `cluster` or `none`")
    return Environment(f"traffic{round(100 * ratio)}", link_mbit(plan, ratio))


main = partial(run_benchmark, SystemsBenchmark)
