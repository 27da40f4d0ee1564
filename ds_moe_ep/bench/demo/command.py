"""Shows what overlap hides, on an emulated link, and what ranks say when one dies.

python -m ds_moe_ep demo
python -m ds_moe_ep demo --kill 2
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ds_moe_ep.bench.demo.death import Death, show_death, watch_death
from ds_moe_ep.bench.demo.options import DemoOptions
from ds_moe_ep.bench.demo.plan import NUM_RANKS, DemoPlan
from ds_moe_ep.bench.demo.results import Results
from ds_moe_ep.bench.demo.show import show
from ds_moe_ep.bench.harness.benchmark import FAILED
from ds_moe_ep.bench.harness.processes import arriving, free_port, started_ranks
from ds_moe_ep.config.command_line import refused
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.schedule.spans import write_trace

PRELOAD = ("ds_moe_ep.bench.demo.command", "ds_moe_ep.bench.demo.ranks")
WIDTH = 80  # where there is no terminal
ENVIRONMENT = {  # of the ranks; torch reads it when it is imported
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # a host's name may lead nowhere
}


def run(options: DemoOptions) -> int:
    """Runs the demo and prints what it found; 0, or 1 where it failed or a survivor did not name who died."""
    if options.kill is not None and options.trace is not None:
        raise ConfigError(f"--trace={options.trace}: a pass with a death in it has none; leave out --kill or --trace")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    os.environ |= ENVIRONMENT
    try:
        with tempfile.TemporaryDirectory() as folder:
            plan = DemoPlan(options.link, options.compute_ms, options.rounds, free_port(), folder, options.kill)
            return _show_overlap(plan, options, console) if plan.victim is None else _show_death(plan, options, console)
    except EngineError as error:
        refused(error, as_json=options.json)
        return FAILED


def _show_overlap(plan: DemoPlan, options: DemoOptions, console: Console) -> int:
    results = measure(plan)
    if options.trace is not None:
        write_trace(options.trace, (span for spans in results.shown().values() for span in spans))
    if options.json:
        print(json.dumps(results.to_dict(), indent=2))
        return 0
    show(results, console)
    if options.trace is not None:
        console.print(
            f"emulated trace of both steps, for ui.perfetto.dev: {options.trace}", soft_wrap=True, highlight=False
        )
    return 0


def _show_death(plan: DemoPlan, options: DemoOptions, console: Console) -> int:
    death = kill(plan)
    if options.json:
        print(json.dumps(death.to_dict(), indent=2))
    else:
        show_death(death, console)
    return 0 if death.is_named_by_all else FAILED


def measure(plan: DemoPlan) -> Results:
    """Starts the ranks and collects what they measure."""
    with _progress() as progress, started_ranks(run_rank, plan, NUM_RANKS, PRELOAD) as (processes, inbox):
        task = progress.task_ids[0]
        findings = []
        for finding in arriving(processes, inbox):
            if finding.kind == "phase":
                progress.update(task, description=f"emulated: {finding.text}")
            findings.append(finding)
    return Results(plan, findings)


def kill(plan: DemoPlan) -> Death:
    """Starts the ranks, of which one dies, and collects what the others say."""
    with _progress(), started_ranks(run_rank, plan, NUM_RANKS, PRELOAD) as (processes, inbox):
        return watch_death(plan, processes, inbox)


def run_rank(rank: int, plan: DemoPlan, findings: Any) -> None:
    """The life of one rank. torch is imported here, so that whoever starts ranks needs none."""
    from ds_moe_ep.bench.demo.ranks import live

    live(rank, plan, findings)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A line on stderr about what the demo does now; nothing is left of it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task("importing torch for all ranks")
        yield progress
