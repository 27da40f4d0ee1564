"""The commands that simulate; they print and write what the wing `simulate` finds."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ds_moe_ep.config.command_line import Parser, number, output_file, whole
from ds_moe_ep.config.shipped import shipped_clusters, shipped_ds_configs

if TYPE_CHECKING:
    from rich.console import Console

PAPER_WIDTH = 120  # columns
SPECIFIED_CLUSTER = "h100_4x4"
CLUSTERS = f"these ship: {', '.join(shipped_clusters())}"


def add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
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
        epilog="example: python -m ds_moe_ep plan --config ep16 --cluster h100_4x4 --compare tp8_pp2",
    )
    job = f"the job: a ds_config that names its model; these ship: {', '.join(shipped_ds_configs())}"
    plan.add_argument("--config", metavar="DS_CONFIG", required=True, help=job)
    plan.add_argument("--cluster", metavar="FILE", required=True, help=f"the cluster (JSON; {CLUSTERS})")
    plan.add_argument("--compare", metavar="DS_CONFIG", help="another job on the same cluster, side by side")
    plan.add_argument(
        "--micro-batch",
        type=_micro_batch,
        metavar="N|largest",
        help="sequences of a micro-batch of --config; with `largest` as many as fit, in the job of --compare too. The "
        "batch stays, accumulation adapts (default: as the files say)",
    )
    plan.add_argument(
        "--load",
        default="even",
        metavar="LOAD",
        help="how rows fall on experts: even, zipf:<exponent>, or a file of rows or of Records (default: even)",
    )
    plan.add_argument("--forward", action="store_true", help="forward passes alone instead of training")
    plan.add_argument(
        "--nodes", type=whole(1), metavar="N", help="as many nodes as this (default: as the cluster's file says)"
    )
    plan.add_argument(
        "--sweep",
        metavar="SIZES",
        help="scale out instead: ep=1..1024 (doubling), ep=1,4,16, or 'ep=16 dp=1..64' (copies of the experts). Prints "
        "the curve and how well the specification's four laws fit it; with --out also draws it",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument(
        "--out", type=output_file, metavar="FILE", help="write Records for `report`, and spans or pictures beside them"
    )
    plan.add_argument(
        "--trace", type=output_file, metavar="FILE", help="write a Chrome trace of one micro-batch of --config"
    )
    plan.set_defaults(run=run_plan)


def _micro_batch(text: str) -> int | str:
    """An argument of --micro-batch."""
    if text == "largest":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"={text}: give a number of sequences, or largest")
    return int(text)


def add_audit(commands: argparse._SubParsersAction[Parser]) -> None:
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
        help=f"the cluster (JSON; {CLUSTERS}; default: the specification's, {SPECIFIED_CLUSTER})",
    )
    form = audit.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with the numbers behind each text")
    audit.add_argument("--out", type=output_file, metavar="FILE", help="write every number as a Record")
    audit.set_defaults(run=run_audit)


def add_calibrate(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command `calibrate`."""
    calibrate = commands.add_parser(
        "calibrate",
        help="fit a cluster's numbers to Records of runs",
        description=(
            "Fits the numbers of a cluster to Records of `bench probe`, of `bench overlap`, or of both, and prints "
            "what it fitted and the error on the runs that it held out. What was not measured stays as the file has it."
        ),
        epilog="example: python -m ds_moe_ep calibrate probe.jsonl --cluster h100_4x4 --out mine.json",
    )
    calibrate.add_argument("records", metavar="RECORDS", nargs="+", help="files of Records, one line of JSON each")
    calibrate.add_argument(
        "--cluster", metavar="FILE", required=True, help=f"the cluster to begin with (JSON; {CLUSTERS})"
    )
    calibrate.add_argument(
        "--out", type=output_file, metavar="FILE", help="where to write the calibrated cluster (default: nowhere)"
    )
    calibrate.add_argument(
        "--hold-out",
        type=number(0, 1),
        default=0.5,
        metavar="SHARE",
        help="share of the runs that stays out of the fit and tells its error (default: 0.5)",
    )
    calibrate.add_argument(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        help="precision whose products tell the efficiency (default: the fastest one's)",
    )
    calibrate.set_defaults(run=run_calibrate)


def run_plan(parsed: argparse.Namespace) -> int:
    """Prints the plan of `parsed.config`, beside that of `parsed.compare`, and writes what is asked for; 0."""
    from ds_moe_ep.records.provenance import command, commit
    from ds_moe_ep.simulate.job.options import PlanOptions
    from ds_moe_ep.simulate.plan.command import run

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
    code = run(options, commit, _console())
    if parsed.sweep is not None and parsed.out is not None:
        from ds_moe_ep.report.sections.sweep import draw_curves

        for path in draw_curves(parsed.out):
            print(path, file=sys.stderr)
    return code


def run_audit(parsed: argparse.Namespace) -> int:
    """Prints the audit on the cluster of `parsed.cluster`, and writes its Records where asked; 0."""
    from ds_moe_ep.cli.tables import markdown
    from ds_moe_ep.simulate.audit.audit import HEAD, audit
    from ds_moe_ep.simulate.audit.records import audit_records, audit_values
    from ds_moe_ep.simulate.audit.tables import print_audit
    from ds_moe_ep.simulate.cluster.cluster import load_cluster

    cluster = load_cluster(parsed.cluster)
    rows = audit(cluster)
    if parsed.out is not None:
        from ds_moe_ep.records.provenance import command, commit
        from ds_moe_ep.simulate.step.source import source_of, write_out

        source = source_of(cluster, parsed.cluster, None, command("ds_moe_ep", parsed.given), commit())
        write_out(audit_records(rows, source), parsed.out)
    if parsed.json:
        print(json.dumps(audit_values(rows), indent=2, ensure_ascii=False, allow_nan=False))
    elif parsed.markdown:
        print(markdown(HEAD, [row.cells for row in rows]))
    else:
        print_audit(rows, cluster.name, _console())
    return 0


def run_calibrate(parsed: argparse.Namespace) -> int:
    """Prints the calibration, and writes its cluster where that is asked for; 0."""
    from ds_moe_ep.simulate.calibrate.calibrate import calibrate_files
    from ds_moe_ep.simulate.calibrate.tables import print_calibration

    found = calibrate_files(
        parsed.records, parsed.cluster, parsed.out, hold_out=parsed.hold_out, precision=parsed.precision
    )
    print_calibration(found, _console())
    if parsed.out:
        print(f"cluster in {parsed.out}; plan on it: python -m ds_moe_ep plan --config ... --cluster {parsed.out}")
    return 0


def _console() -> Console:
    """The terminal as wide as it is; PAPER_WIDTH columns where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PAPER_WIDTH)
