"""`plan --search`: the layouts of a job that fit a cluster, best first, with what bounds each; or by ratio."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.layouts.by_traffic import AtRatio, layout_records, ratio_values, search_by_traffic
from ds_moe_ep.simulate.layouts.read import read_searched_job
from ds_moe_ep.simulate.layouts.search import search_layouts
from ds_moe_ep.simulate.layouts.tables import print_by_traffic, print_search, search_values
from ds_moe_ep.simulate.options import PlanOptions
from ds_moe_ep.simulate.step.source import source_of, write_out


def run_search(options: PlanOptions, cluster: Cluster, console: Console) -> int:
    """Prints the layouts; 0. Raises ConfigError or TopologyError for a job that cannot work."""
    for name in ("compare", "trace", *(() if options.traffic else ("out",)), "sweep", "micro_batch", "replicas"):
        if (value := getattr(options, name)) is not None:
            raise ConfigError(
                f"{name}={value!r}: a search simulates one job in many layouts, with micro-batches of its own and even "
                "loads; leave it out"
            )
    job = read_searched_job(options.config, cluster, mode=options.mode, tensor_ranks=options.tensor_ranks)
    with Progress(console=Console(stderr=True), transient=True, disable=options.json) as progress:
        task = progress.add_task("simulating")

        def see(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        if options.traffic:
            return _by_traffic(options, search_by_traffic(job, options.traffic, see), console)
        found = search_layouts(job, see=see)
    if options.json:
        print(json.dumps(search_values(found), indent=2, allow_nan=False))
    else:
        print_search(found, console)
    return 0


def _by_traffic(options: PlanOptions, found: Sequence[AtRatio], console: Console) -> int:
    if options.out is not None:
        source = source_of(found[0].cluster, options.cluster, options.given, options.nodes)
        write_out(layout_records(found, source), options.out)
    if options.json:
        print(json.dumps(ratio_values(found), indent=2, allow_nan=False))
    else:
        print_by_traffic(found, console)
    return 0
