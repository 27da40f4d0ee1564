"""The command `plan`: makes what is asked for, prints it, and writes the files."""

from __future__ import annotations

import json
from typing import Any, Literal

from rich.console import Console

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.schedule.spans import write_trace
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.job import read_job
from ds_moe_ep.simulate.layouts.command import run_search
from ds_moe_ep.simulate.options import PlanOptions
from ds_moe_ep.simulate.plan.plan import Comparison, Plan, compare, make_plan, plan_of
from ds_moe_ep.simulate.plan.records import comparison_records, plan_records, write_plan
from ds_moe_ep.simulate.plan.tables import print_all, print_comparison, print_plan
from ds_moe_ep.simulate.plan.values import comparison_values, plan_values
from ds_moe_ep.simulate.step.source import source_of
from ds_moe_ep.simulate.sweep.command import run_sweep


def run(options: PlanOptions, console: Console) -> int:
    """Prints and writes; 0.

    Raises ConfigError or TopologyError for a job that cannot work or does not fit, and for a file that it cannot write.
    """
    cluster = load_cluster(options.cluster)
    if options.nodes is not None:
        cluster = cluster.with_nodes(options.nodes)
    if options.traffic and not options.search:
        raise ConfigError(f"traffic={options.traffic}: of the search for layouts; give --search too, or leave it out")
    if options.search:
        return run_search(options, cluster, console)
    job = read_job(
        options.config,
        cluster,
        micro_batch=options.micro_batch,
        load=options.load,
        mode=options.mode,
        replicas=options.replicas,
        tensor_ranks=options.tensor_ranks,
    )
    if options.sweep is not None:
        return run_sweep(options, job, console)
    plan = plan_of(job, options.load)
    comparison = _comparison(options, plan, cluster) if options.compare else None
    plans = (comparison.ours, comparison.theirs) if comparison else (plan,)
    if options.json:
        values: dict[str, Any] = comparison_values(comparison) if comparison else plan_values(plan)
        print(json.dumps(values, indent=2, allow_nan=False))
    elif options.verbose:
        print_all(plans, comparison, console)
    else:
        print_comparison(comparison, console) if comparison else print_plan(plan, console)
    try:
        _write(options, plan, comparison)
    except OSError as error:
        raise ConfigError(
            f"out={options.out}, trace={options.trace}: cannot be written ({error}); name files of your own"
        ) from error
    return 0


def _comparison(options: PlanOptions, plan: Plan, cluster: Cluster) -> Comparison:
    assert options.compare is not None
    micro_batch: Literal["largest"] | None = "largest" if options.micro_batch == "largest" else None
    theirs = make_plan(options.compare, cluster, micro_batch=micro_batch, load=options.load, mode=options.mode)
    return compare(plan, theirs)


def _write(options: PlanOptions, plan: Plan, comparison: Comparison | None) -> None:
    if options.trace is not None:
        write_trace(options.trace, plan.prediction.step.spans)  # a micro-batch, and what the step does once behind it
    if options.out is not None:
        source = source_of(plan.job.setup.cluster, options.cluster, options.given, options.nodes)
        records = comparison_records(comparison, source) if comparison else plan_records(plan, source)
        write_plan(options.out, list(records), plan)
