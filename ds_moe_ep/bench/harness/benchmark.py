"""One frame around every benchmark: its options, its ranks, a bar, a file that is always up to date, and its tables."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric
from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import Finding, RunRank, Tell, arriving, silent, started_ranks
from ds_moe_ep.config.command_line import INTERRUPTED, refused, writable_file
from ds_moe_ep.config.options import option, parse
from ds_moe_ep.errors import EngineError, MoEError
from ds_moe_ep.records.provenance import Provenance, command, commit, hardware
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.record import Record, write_whole
from ds_moe_ep.records.render import print_tables, to_markdown
from ds_moe_ep.records.table import Table

FAILED = 1  # the exit code of a benchmark that did not come to its end
SAVE_EVERY_S = 1.0
MISSED = 3  # that of one whose verdicts do not all hold


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Ranks that run together, and how the bar tells it."""

    run: RunRank
    plan: Any
    num_ranks: int
    title: str = ""
    steps: int
    here: Callable[[Tell], object] | None = None  # in place of ranks: this process is one of a launcher's
    preload: Sequence[str] = ()  # modules that one process imports, of which the ranks are forks


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Options of every benchmark."""

    out: Path | None = option(None, "file for the records, one JSON line each", metavar="FILE")


class Benchmark(ABC):
    """One run of a benchmark."""

    module: ClassVar[Sequence[str]]  # words of the command behind `python -m`
    options: ClassVar[type[BenchmarkOptions]]
    description: ClassVar[str]
    width: ClassVar[int] = 110  # columns where there is no terminal
    next_step: ClassVar[str] = ""  # what the records are for, behind "records in FILE"
    prints_markdown: ClassVar[bool] = False  # the tables again, for a page

    device: str = "cpu"
    num_ranks: int
    is_heard: bool = True  # in a job of a launcher rank 0 alone prints and writes

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """A run as the options describe it. Raises ConfigError for what cannot be measured."""

    @abstractmethod
    def launches(self, stack: ExitStack) -> Iterable[Launch]:
        """Ranks to start, one launch after the other; the stack closes when all have ended."""

    @abstractmethod
    def metric(self, name: str) -> Metric | None:
        """How samples of a name are recorded; None where they are not."""

    def derive(self, found: Collector) -> Iterable[DerivedSamples]:
        """Ratios and verdicts."""
        return ()

    def summary(self, values: Sequence[float]) -> Quantity:
        """The value of a Record, and its spread."""
        return summarize(values)

    @abstractmethod
    def tables(self, records: Sequence[Record]) -> Iterable[Table]:
        """The results for people."""

    def save(self, found: Collector, out: Path | None) -> None:
        """Replaces the file by the Records of now."""
        write_whole(found.records(), out)

    def status(self, records: Sequence[Record]) -> int:
        """The exit code of a run that came to its end."""
        return 0


def run_benchmark(benchmark: type[Benchmark], arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark of a command line, sys.argv's by default, and prints its tables.

    0 when it ran through, 1 when it failed, 2 when it was refused before any rank started, 3 where a verdict does not
    hold, 130 after Ctrl-C: what was measured until then is in the file. An error is told on stderr. The console is as
    wide as the terminal, and `width` columns where there is none.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else benchmark.width)
    try:
        return _run(benchmark, words, console)
    except EngineError as error:
        refused(error)
        return FAILED
    except MoEError as error:
        return refused(error)


def _run(benchmark: type[Benchmark], words: list[str], console: Console) -> int:
    module, *more = benchmark.module
    prog = " ".join(("python -m", *benchmark.module))
    options = parse(benchmark.options, words, prog=prog, description=benchmark.description)
    run = benchmark(options)
    with ExitStack() as stack:
        if not run.is_heard:
            for launch in run.launches(stack):
                if launch.here is not None:
                    launch.here(silent)
            return 0
        if options.out is not None:
            writable_file(options.out, "--out")
        machine = hardware(run.device, run.num_ranks)
        provenance = Provenance(command=command(module, [*more, *words]), commit=commit(), hardware=machine)
        found = Collector(provenance, run.metric, run.derive, run.summary)
        save = partial(run.save, found, options.out)
        status = 0
        for launch in run.launches(stack):
            if status := follow(launch, found, save, console):
                break
    records = found.records()
    tables = list(run.tables(records))
    print_tables(tables, console)
    for table in tables if run.prints_markdown else ():
        console.print(to_markdown(table), markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        console.print(f"records in {options.out}{run.next_step.format(out=options.out)}", soft_wrap=True)
    return status or run.status(records)


def follow(launch: Launch, found: Collector, save: Callable[[], object], console: Console) -> int:
    """Follows started ranks to their end behind a progress bar, and keeps the file up to date; 130 after Ctrl-C."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    saved_s = 0.0

    def hear(finding: Finding) -> None:
        nonlocal saved_s
        if finding.kind == "line":
            console.print(finding.text, soft_wrap=True, highlight=False, markup=False)
            return
        if finding.kind != "phase":
            found.add(finding)
            return
        if launch.here is not None:
            console.print(f"measuring {finding.text}")
        progress.update(task, description=f"{launch.title}{finding.text}", advance=finding.advance)
        if time.monotonic() > saved_s + SAVE_EVERY_S:
            save()
            saved_s = time.monotonic()

    try:
        with Progress(*columns, console=console, disable=launch.here is not None) as progress:
            task = progress.add_task(f"{launch.title}starting the ranks", total=launch.steps)
            if launch.here is not None:
                launch.here(hear)
            else:
                ranks = started_ranks(launch.run, launch.plan, launch.num_ranks, launch.preload)
                with ranks as (processes, inbox):
                    for finding in arriving(processes, inbox):
                        hear(finding)
            progress.update(task, completed=launch.steps)
    except KeyboardInterrupt:
        console.print("interrupted: the records hold what was measured until now")
        return INTERRUPTED
    finally:
        save()
    return 0
