"""`plan --sweep`: simulates a job at every size, prints the curve as a table, and writes it as Records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import Progress

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.evidence import LAWS, SIMULATED, STATED_R2, TOTALS
from ds_moe_ep.record import write_whole
from ds_moe_ep.simulate.cluster import Cluster
from ds_moe_ep.simulate.jobs import Mode, read_job
from ds_moe_ep.simulate.records import Source, slug
from ds_moe_ep.simulate.sweep import Sweep, read_sizes, sweep
from ds_moe_ep.simulate.sweep_records import UNITS, print_sweep, schedule_of, sweep_records


class SweepOptions(Protocol):
    """What a sweep reads of the command line of `plan`."""

    @property
    def config(self) -> str: ...
    @property
    def cluster(self) -> str: ...
    @property
    def command(self) -> str: ...
    @property
    def compare(self) -> str | None: ...
    @property
    def micro_batch(self) -> int | Literal["largest"] | None: ...
    @property
    def load(self) -> str: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def sweep(self) -> str | None: ...
    @property
    def json(self) -> bool: ...
    @property
    def out(self) -> str | None: ...
    @property
    def trace(self) -> str | None: ...


def run_sweep(options: SweepOptions, cluster: Cluster, commit: Callable[[], str]) -> int:
    """Prints the sweep that `options.sweep` names, and writes its Records to `options.out`; 0.

    Raises ConfigError or TopologyError for a job that cannot work, a size that cannot be, and a file that cannot be
    written.
    """
    assert options.sweep is not None
    sizes = read_sizes(options.sweep)
    for name, value in (("compare", options.compare), ("trace", options.trace)):
        if value is not None:
            raise ConfigError(f"{name}={value!r}: a sweep is of one job and has no spans; leave it out")
    job = read_job(options.config, cluster, micro_batch=options.micro_batch, load=options.load, mode=options.mode)
    with Progress(console=Console(stderr=True), transient=True, disable=options.json) as progress:
        task = progress.add_task("simulating", total=len(TOTALS) * len(sizes.ep) * len(sizes.dp))
        found = sweep(job.setup, sizes, load=options.load, see=lambda *_: progress.advance(task))
    if options.out is not None:
        source = Source(
            bed=SIMULATED + slug(Path(options.cluster).stem),
            command=options.command,
            commit=commit(),
            hardware=f"simulated: {cluster.name}, in other numbers of nodes",
        )
        try:
            write_whole(sweep_records(found, source), Path(options.out))
        except OSError as error:
            raise ConfigError(f"out={options.out}: cannot be written ({error}); name a file of your own") from error
    if options.json:
        print(json.dumps(sweep_values(found), indent=2, allow_nan=False))
    else:
        print_sweep(found)
    return 0


def sweep_values(found: Sweep) -> dict[str, Any]:
    """The sweep as plain values, for JSON; a bar is [value, low, high]."""
    points = [
        {
            "held_constant": point.total,
            "ep": point.ep,
            "dp": point.dp,
            "num_nodes": point.setup.cluster.num_nodes,
            "num_experts": point.setup.moe.num_experts,
            "schedule": schedule_of(point),
            "memory_bytes": point.memory.peak,
            "fits": point.fits,
            "hidden_ratio": point.prediction.step.hidden,
            "mfu_ratio": point.prediction.step.mfu,
            **{law: [bar.value, bar.low, bar.high] for law in LAWS for bar in (point.value(law),)},
        }
        for point in found.points
    ]
    fits = [
        {"held_constant": total, **vars(its), "r2_stated": STATED_R2[its.law]}
        for total in TOTALS
        for its in found.fits(total)
    ]
    return {"units": UNITS, "points": points, "fits": fits, "notes": list(found.notes)}
