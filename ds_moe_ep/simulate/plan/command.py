"""The command `plan`: makes what is asked for, prints it, and writes the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from rich.console import Console

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.audit.audit import audit
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.options import PlanOptions
from ds_moe_ep.simulate.plan.plan import Comparison, Plan, compare, make_plan
from ds_moe_ep.simulate.plan.records import comparison_records, plan_records, write_plan, write_trace
from ds_moe_ep.simulate.plan.tables import print_comparison, print_plan
from ds_moe_ep.simulate.plan.values import comparison_values, plan_values
from ds_moe_ep.simulate.step.source import source_of
from ds_moe_ep.simulate.sweep.command import run_sweep


def run(options: PlanOptions, commit: Callable[[], str], console: Console) -> int:
    """Prints and writes; 0. `commit` tells the revision of the sources, and is asked where Records are written.

    Raises ConfigError or TopologyError for a job that cannot work or does not fit, and for a file that it cannot write.
    """
    cluster = _cluster(options)
    if options.sweep is not None:
        return run_sweep(options, cluster, commit, console)
    plan = make_plan(options.config, cluster, micro_batch=options.micro_batch, load=options.load, mode=options.mode)
    comparison = _comparison(options, plan, cluster) if options.compare else None
    figures = audit(cluster) if plan.stated else ()
    if options.json:
        values: dict[str, Any] = comparison_values(comparison) if comparison else plan_values(plan)
        values["figures"] = [{"figure": row.figure.name, "verdict": row.verdict} for row in figures]
        print(json.dumps(values, indent=2, allow_nan=False))
    else:
        print_comparison(comparison, figures, console) if comparison else print_plan(plan, figures, console)
    try:
        _write(options, plan, comparison, commit)
    except OSError as error:
        raise ConfigError(
            f"out={options.out}, trace={options.trace}: cannot be written ({error}); name files of your own"
        ) from error
    return 0


def _cluster(options: PlanOptions) -> Cluster:
    cluster = load_cluster(options.cluster)
    if options.nodes is None:
        return cluster
    if options.nodes < 1:
        raise ConfigError(f"nodes={options.nodes}: a cluster has one node or more; give a number of at least 1")
    return cluster.with_nodes(options.nodes)


def _comparison(options: PlanOptions, plan: Plan, cluster: Cluster) -> Comparison:
    assert options.compare is not None
    micro_batch: Literal["largest"] | None = "largest" if options.micro_batch == "largest" else None
    theirs = make_plan(options.compare, cluster, micro_batch=micro_batch, load=options.load, mode=options.mode)
    return compare(plan, theirs)


def _write(options: PlanOptions, plan: Plan, comparison: Comparison | None, commit: Callable[[], str]) -> None:
    if options.trace is not None:
        write_trace(options.trace, plan)
    if options.out is not None:
        cluster = plan.job.setup.cluster
        source = source_of(cluster, options.cluster, options.nodes, options.command, commit())
        records = comparison_records(comparison, source) if comparison else plan_records(plan, source)
        write_plan(options.out, list(records), plan)
