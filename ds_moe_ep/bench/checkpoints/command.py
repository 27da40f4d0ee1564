"""Times a model on its way in and out: Hugging Face folders, checkpoints, and checkpoints of another ep_size.

    python -m ds_moe_ep.bench.checkpoints [--ranks 4] [--model-mb 2000] [--folder /a/fast/disk]

Beside each stands a plain read or write of the same bytes in every round (`ranks.py` says how). Starts its own ranks on
this machine, and leaves nothing in the folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds_moe_ep.bench.checkpoints.ranks import ACTIONS, CheckpointPlan, run_rank
from ds_moe_ep.bench.harness.benchmark import Benchmark, BenchmarkOptions, Launch, run_benchmark
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric, ratios
from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.config.options import option
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import cell
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table

METRICS = {
    "time": Metric("ms", "slowest rank, nothing in the page cache before; files on disk (fsync) behind a write"),
    "plain": Metric("ms", "the same bytes, read or written plainly by all ranks, under the same conditions"),
    "peak": Metric("bytes", "resident memory above that before the action, mapped files included, fullest rank"),
    "bytes": Metric("bytes", "files that are written, or read"),
    "ratio": Metric("ratio", "time over that of the plain side in the same round"),
}


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(BenchmarkOptions):
    """Options of the benchmark of checkpoints."""

    ranks: int = option(4, "processes, and the expert-parallel size", least=2)
    model_mb: int = option(2000, "bytes of the model's weights in fp32, in MB", least=1)
    rounds: int = option(3, "measured rounds", least=1)
    folder: Path | None = option(None, "where the files lie meanwhile (default: a temporary folder)", metavar="FOLDER")


class CheckpointBenchmark(Benchmark):
    """A model's ways into files and out of them."""

    module = ("ds_moe_ep.bench.checkpoints",)
    options = CheckpointOptions
    description = (
        "Times Hugging Face folders and checkpoints of a model beside plain reads and writes of the same bytes."
    )
    prints_markdown = True

    def __init__(self, options: CheckpointOptions) -> None:
        self.num_ranks, self._options = options.ranks, options
        if options.ranks not in (2, 4, 8):
            raise ConfigError(f"bench.ranks={options.ranks}: the model has 8 experts, and half as many ranks reload it")
        if options.folder is not None and not options.folder.is_dir():
            raise ConfigError(f"--folder={options.folder}: is no folder; make it first")

    def launches(self, stack: ExitStack) -> Iterator[Launch]:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self._options.folder, prefix="ds_moe_ep_bench_"))
        options = self._options
        for number in range(options.rounds):  # ranks of their own: DeepSpeed's engines do not give all memory back
            for reloads in (False, True):
                plan = CheckpointPlan(folder, options.ranks, options.model_mb, number, free_port(), reloads)
                title = f"round {number + 1}: "
                yield Launch(run=run_rank, plan=plan, num_ranks=options.ranks, title=title, steps=plan.num_actions)

    def metric(self, name: str) -> Metric:
        return METRICS[name.rpartition(".")[2]]

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        """Times over those of the plain sides, round by round."""
        for action in ACTIONS:
            mine, plain = (found.of(f"checkpoints.{action}.{what}") for what in ("time", "plain"))
            if len(mine) == len(plain):
                yield DerivedSamples(f"checkpoints.{action}.ratio", ratios(mine, plain))

    def tables(self, records: Sequence[Record]) -> Iterator[Table]:
        of = {record.name.removeprefix("checkpoints."): record for record in records}
        rows = [
            (
                action,
                cell(of.get(f"{action}.bytes"), "MB", 0),
                cell(of.get(f"{action}.time"), "ms", 0, bar=True),
                cell(of.get(f"{action}.plain"), "ms", 0, bar=True),
                cell(of.get(f"{action}.ratio"), "ratio", 2, bar=True),
                cell(of.get(f"{action}.peak"), "MB", 0, bar=True),
            )
            for action in ACTIONS
        ]
        head = ("what", "files, MB", "time, ms", "plain, ms", "plain = 1", "memory above before, MB")
        basis = [f"`{first.command}` at {first.commit} on {first.hardware}." for first in records[:1]]
        yield table("A model's files: median (quartiles) of the slowest and the fullest rank", head, rows, *basis)


main = partial(run_benchmark, CheckpointBenchmark)
