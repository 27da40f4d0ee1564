"""`plan --sweep`: simulates a job at every size, prints the curve as a table, and writes it as Records."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console
from rich.progress import Progress

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import TOTALS
from ds_moe_ep.simulate.job.job import Job
from ds_moe_ep.simulate.options import PlanOptions
from ds_moe_ep.simulate.step.source import source_of, write_out
from ds_moe_ep.simulate.sweep.records import sweep_records, sweep_values
from ds_moe_ep.simulate.sweep.sweep import read_sizes, sweep
from ds_moe_ep.simulate.sweep.tables import print_sweep


def run_sweep(options: PlanOptions, job: Job, console: Console) -> int:
    """Prints the sweep of the job that `options.sweep` names, and writes its Records to `options.out`; 0.

    Raises ConfigError or TopologyError for a size that cannot be, and a file that cannot be written.
    """
    assert options.sweep is not None
    cluster = job.setup.cluster
    sizes = read_sizes(options.sweep)
    for name, value in (("compare", options.compare), ("trace", options.trace)):
        if value is not None:
            raise ConfigError(f"{name}={value!r}: a sweep is of one job and has no spans; leave it out")
    with Progress(console=Console(stderr=True), transient=True, disable=options.json) as progress:
        task = progress.add_task("simulating", total=len(TOTALS) * len(sizes.ep) * len(sizes.dp))
        found = sweep(job.setup, sizes, load=options.load, see=lambda *_: progress.advance(task))
    if options.out is not None:
        source = source_of(cluster, options.cluster, options.given)
        source = replace(source, hardware=f"simulated: {cluster.name}, in other numbers of nodes")
        write_out(sweep_records(found, source), options.out)
    if options.json:
        print(json.dumps(sweep_values(found), indent=2, allow_nan=False))
    else:
        print_sweep(found, console)
    return 0
