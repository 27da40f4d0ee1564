"""Soaks the whole system: many steps whose routing drifts and bursts; memory flat, no open handles, the same bits.

    python -m tests.soak --ranks 16 --steps 1000 --runs 3 --out soak.jsonl

Each run starts ranks of its own, makes a DeepSpeed engine around two MoE layers on the overlapping schedule "peers",
and takes one optimizer step after the other. Tokens share a direction that turns, so that the busiest expert changes;
in bursts all of them visit one expert; batches differ in size, and some are empty. Ctrl-C ends the run; what was
measured until then is in the file, which `python -m ds_moe_ep report` draws.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from ds_moe_ep.bench.harness.benchmark import MISSED, Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import SOAK_VERDICTS
from ds_moe_ep.records.quantity import NONE, Quantity
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table
from tests.soak.findings import derive, extremes, metric
from tests.soak.plan import SoakPlan
from tests.soak.ranks import run_soak_rank

PLAN = SoakPlan()


@dataclass(frozen=True, kw_only=True)
class SoakOptions(BenchmarkOptions):
    """Options of the soak."""

    ranks: int = option(PLAN.num_ranks, "processes, and the expert-parallel size", least=2)
    steps: int = option(PLAN.steps, "optimizer steps of a run", least=1)
    runs: int = option(3, "runs with the same seed, each in processes of its own", least=1)
    sample_every: int = option(PLAN.sample_every, "steps between looks at processes", least=1)
    hash_every: int = option(PLAN.hash_every, "steps between hashes", least=1)
    tokens: int = option(PLAN.num_tokens, "tokens of the mean rank in a step", least=1)
    no_caches: bool = option(False, "switch off torch's two caches that fill up in the first hundreds of steps")
    seed: int = option(PLAN.seed, "of weights, tokens, drift and bursts", least=0)


class Soak(Benchmark):
    """Thousands of steps, and what they leave behind."""

    module = ("tests.soak",)
    options = SoakOptions
    description = "Trains many steps under routing that drifts and bursts; judges memory, handles and determinism."
    width = 120
    next_step = "; draw them: python -m ds_moe_ep report {out} -o report/"

    def __init__(self, options: SoakOptions) -> None:
        if options.steps < 4 * options.sample_every:
            raise ConfigError(
                f"bench.steps={options.steps} with sample_every={options.sample_every}: memory is judged by three "
                f"samples after a quarter of the run; take {4 * options.sample_every} steps, or look more often"
            )
        self.plan = SoakPlan(
            num_ranks=options.ranks,
            steps=options.steps,
            sample_every=options.sample_every,
            hash_every=options.hash_every,
            num_tokens=options.tokens,
            has_caches=not options.no_caches,
            seed=options.seed,
        )
        self.num_ranks, self.num_runs = options.ranks, options.runs

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        for run in range(1, self.num_runs + 1):
            plan = replace(self.plan, run=run, port=free_port())
            title = f"run {run} of {self.num_runs}: "
            yield Launch(run=run_soak_rank, plan=plan, num_ranks=plan.num_ranks, title=title, steps=plan.steps)

    def metric(self, name: str) -> Metric | None:
        return metric(name)

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        return derive(self.plan, self.num_runs, found)

    def summary(self, values: Sequence[float]) -> Quantity:
        return extremes(values)

    def tables(self, records: Sequence[Record]) -> Iterator[Table]:
        """The verdicts, each with its reason."""
        verdicts = [(title, _verdict(records, what)) for what, title in SOAK_VERDICTS.items()]
        rows = (
            (title, NONE if record is None else "yes" if record.value else "NO", record.notes if record else "")
            for title, record in verdicts
        )
        yield table("Soak: verdicts", ("verdict", "holds", "found"), rows, text_columns=3)

    def status(self, records: Sequence[Record]) -> int:
        verdicts = (_verdict(records, what) for what in SOAK_VERDICTS)
        return 0 if all(record.value for record in verdicts if record is not None) else MISSED


def _verdict(records: Sequence[Record], what: str) -> Record | None:
    return next((record for record in records if record.name == f"soak.verdict.{what}"), None)


main = partial(run_benchmark, Soak)

if __name__ == "__main__":
    sys.exit(main())
