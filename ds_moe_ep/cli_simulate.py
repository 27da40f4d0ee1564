"""The commands that simulate; they print and write what the wing `simulate` finds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ds_moe_ep.errors import ConfigError

SPECIFIED_CLUSTER = "ds_configs/clusters/h100_4x4.json"


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `plan`."""
    plan = commands.add_parser(
        "plan",
        help="tell what a ds_config will do on a cluster, before anybody rents it",
        description=(
            "Simulates a step of the job on a cluster that a file describes, and prints: does it fit, the largest "
            "micro-batch, tokens a second, what is hidden, utilization, the schedule that auto would choose, and what "
            "bounds it. Nothing is started and nothing measured; every number has a bar, from the ranges of the "
            "cluster's numbers. Exits with 2 where the job cannot work or does not fit, with the way out."
        ),
        epilog="example: python -m ds_moe_ep plan --config ds_configs/ep16.json --cluster "
        "ds_configs/clusters/h100_4x4.json --compare ds_configs/tp8_pp2.json",
    )
    plan.add_argument("--config", metavar="DS_CONFIG", required=True, help="the job: a ds_config that names its model")
    plan.add_argument("--cluster", metavar="FILE", required=True, help="the cluster (JSON; see ds_configs/clusters)")
    plan.add_argument("--compare", metavar="DS_CONFIG", help="another job on the same cluster, side by side")
    plan.add_argument(
        "--micro-batch",
        type=_micro_batch,
        metavar="N|largest",
        help="sequences of a micro-batch of --config, or in both jobs the largest that fits; the batch stays, "
        "accumulation adapts (default: as the files say)",
    )
    plan.add_argument(
        "--load",
        default="even",
        metavar="LOAD",
        help="how rows fall on experts: even, zipf:<exponent>, or a file of rows or of Records (default: even)",
    )
    plan.add_argument("--forward", action="store_true", help="forward passes alone instead of training")
    plan.add_argument(
        "--nodes", type=int, metavar="N", help="as many nodes as this (default: as the cluster's file says)"
    )
    plan.add_argument(
        "--sweep", metavar="ep=1..1024", help="scale out instead: the curve and the fits of the four laws"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--out", metavar="FILE", help="write Records, and spans beside them, for `report`")
    plan.add_argument("--trace", metavar="FILE", help="write a Chrome trace of one micro-batch of --config")
    plan.set_defaults(run=run_plan)


def _micro_batch(text: str) -> int | str:
    """An argument of --micro-batch."""
    if text == "largest":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of sequences, or largest")
    return int(text)


def add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command `audit`."""
    audit = commands.add_parser(
        "audit",
        help="print the specification's figures: stated, derived, simulated on a cluster, and the verdict",
        description=(
            "Prints every figure of the specification as it is stated, as its shapes and links imply it, and as its "
            "jobs are simulated on a cluster of 16 devices, with a bar from the ranges of the cluster's numbers. The "
            "verdict is computed from these numbers. Nothing is measured."
        ),
        epilog="example: python -m ds_moe_ep audit --markdown",
    )
    audit.add_argument(
        "--cluster",
        metavar="FILE",
        default=SPECIFIED_CLUSTER,
        help=f"the cluster (JSON; default: the specification's, {SPECIFIED_CLUSTER})",
    )
    form = audit.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with the numbers behind each text")
    audit.add_argument("--out", metavar="FILE", help="write every number as a Record")
    audit.set_defaults(run=run_audit)


def run_plan(parsed: argparse.Namespace) -> int:
    """Prints the plan of `parsed.config`, beside that of `parsed.compare`, and writes what is asked for."""
    from ds_moe_ep.bench.provenance import command, commit
    from ds_moe_ep.simulate.plan_command import PlanOptions, run

    options = PlanOptions(
        config=parsed.config,
        cluster=parsed.cluster,
        compare=parsed.compare,
        micro_batch=parsed.micro_batch,
        load=parsed.load,
        mode="forward" if parsed.forward else "training",
        nodes=parsed.nodes,
        sweep=parsed.sweep,
        json=parsed.json,
        out=parsed.out,
        trace=parsed.trace,
        command=command("ds_moe_ep", parsed.given),
    )
    code = run(options, commit)
    if parsed.sweep is not None and parsed.out is not None:
        from ds_moe_ep.report.sections_sweep import draw_curves

        for path in draw_curves(Path(parsed.out)):
            print(path, file=sys.stderr)
    return code


def run_audit(parsed: argparse.Namespace) -> int:
    """Prints the audit on the cluster of `parsed.cluster`, and writes its Records where asked; 0."""
    from ds_moe_ep.simulate.audit import audit
    from ds_moe_ep.simulate.audit_records import audit_records, audit_values
    from ds_moe_ep.simulate.cluster import load_cluster
    from ds_moe_ep.tables import audit_table, print_audit

    cluster = load_cluster(parsed.cluster)
    rows = audit(cluster)
    if parsed.out is not None:
        from ds_moe_ep.bench.provenance import command, commit
        from ds_moe_ep.evidence import SIMULATED
        from ds_moe_ep.record import write_whole
        from ds_moe_ep.simulate.records import Source, slug

        source = Source(
            bed=SIMULATED + slug(Path(parsed.cluster).stem),
            command=command("ds_moe_ep", parsed.given),
            commit=commit(),
            hardware=f"simulated: {cluster.name} ({cluster.num_nodes} x {cluster.node_size} devices)",
        )
        try:
            write_whole(audit_records(rows, source), Path(parsed.out))
        except OSError as error:
            raise ConfigError(f"out={parsed.out}: cannot be written ({error}); name a file of your own") from error
    if parsed.json:
        print(json.dumps(audit_values(rows), indent=2, ensure_ascii=False, allow_nan=False))
    elif parsed.markdown:
        print(audit_table(rows))
    else:
        print_audit(rows, cluster.name)
    return 0
