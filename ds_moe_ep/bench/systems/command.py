"""Compares whole systems: EP16 overlapped and serial, TP8/PP2, DeepSpeed's MoE and AutoEP, all training one model.

    python -m ds_moe_ep bench systems --out systems.jsonl                       # loopback, real compute, real text
    python -m ds_moe_ep bench systems --device emulated --traffic 0.3 0.6 cluster --out shaped.jsonl   # as root
    python -m ds_moe_ep bench systems --memory --out memory.jsonl

The method is the specification's (section 5.2): 10 warm-ups, 100 measured, the lowest and highest 5 % dropped. All
systems take turns in one run. Ctrl-C ends it; what was measured until then is in the file, which `python -m ds_moe_ep
report` draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.systems.findings import SystemFindings
from ds_moe_ep.bench.systems.plan import EMULATED_MODEL, Bed, SystemsPlan, link_mbit
from ds_moe_ep.bench.systems.ranks import run_systems_rank
from ds_moe_ep.bench.systems.table import summary_tables
from ds_moe_ep.bench.testbed import open_testbed
from ds_moe_ep.config.command_line import Parser, number, output_file, whole
from ds_moe_ep.config.knobs import MODELS
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import MODES, SYSTEMS, bed_title
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import write_whole
from ds_moe_ep.schedule.spans import write_spans
from ds_moe_ep.specification.derived import cluster_traffic_ratio

PROGRAM = "ds_moe_ep bench systems"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 when it ran through, 1 when it failed, 2 when it was refused, 130 after Ctrl-C."""
    return on_console(run, arguments, 120)


def run(words: list[str], console: Console) -> int:
    """The benchmark of a command line, and its tables."""
    parsed = make_parser().parse_args(words)
    plan = make_plan(parsed)
    with ExitStack() as stack:
        if plan.is_emulated and plan.beds[0].rate_mbit is not None:
            plan = replace(plan, testbed=stack.enter_context(open_testbed(plan.num_nodes)))
        found = SystemFindings(
            plan,
            command("ds_moe_ep", ["bench", "systems", *words]),
            commit(),
            hardware("cuda" if plan.device == "cuda" else "cpu", plan.num_ranks),
        )
        status = race(plan, found, console, parsed.out)
    for table in summary_tables(found.records()):
        console.print(table)
    if parsed.out is not None:
        console.print(f"records in {parsed.out}; draw them: python -m ds_moe_ep report {parsed.out} -o report/")
    return status


def make_parser() -> Parser:
    """The command line of the benchmark."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description="Compares whole training systems in one run, on the loopback or on shaped links.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=list(SYSTEMS),
        metavar="SYSTEM",
        default=list(SYSTEMS),
        help=f"of {', '.join(SYSTEMS)}",
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="what is timed")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "emulated"), default="cpu", help="what computes: emulated ones wait"
    )
    parser.add_argument(
        "--traffic",
        nargs="+",
        default=["0.3", "0.6", "cluster"],
        help="emulated: EP16's traffic over its compute, which the links are shaped for; `cluster` takes the ratio "
        "of the specification's cluster, `none` does not shape",
    )
    parser.add_argument(
        "--model", default="small", choices=list(MODELS), help="what is trained, where it is not emulated"
    )
    parser.add_argument("--schedule", default="auto", choices=("auto", "peers", "chunks"), help="of the system ep16")
    parser.add_argument(
        "--compute-s", type=number(above=0), default=8.0, help="emulated compute of a training step in seconds"
    )
    parser.add_argument("--sequences", type=whole(0), default=0, help="of a step (0: 64; emulated 128)")
    parser.add_argument("--rounds", type=whole(1), default=100, help="measured rounds")
    parser.add_argument("--warm-ups", type=whole(1), default=10, help="rounds before them")
    parser.add_argument(
        "--memory", action="store_true", help="bytes by kind instead of times, in processes of their own"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of the first weights and of the text")
    parser.add_argument("--out", type=output_file, default=None, help="file for the records; spans go beside it")
    return parser


def make_plan(parsed: argparse.Namespace) -> SystemsPlan:
    """The plan that the command line describes. Raises ConfigError for what cannot be compared."""
    is_emulated = parsed.device == "emulated"
    if parsed.memory and is_emulated:
        raise ConfigError("bench.memory with device='emulated': emulated experts have no weights; leave --device out")
    if parsed.device == "cuda" and (gpus := torch.cuda.device_count()) < SystemsPlan().num_ranks:
        raise ConfigError(
            f"bench.device='cuda': 16 ranks start on this machine, which has {gpus} GPUs; run it on one with 16, or "
            "with --device cpu or emulated"
        )
    plan = SystemsPlan(
        systems=tuple(name for name in SYSTEMS if name in parsed.systems),
        modes=tuple(mode for mode in MODES if mode in parsed.modes),
        device=parsed.device,
        measure="memory" if parsed.memory else "time",
        model=EMULATED_MODEL if is_emulated else MODELS[parsed.model],
        schedule=parsed.schedule,
        num_sequences=parsed.sequences or (128 if is_emulated else 64),
        step_compute_s=parsed.compute_s,
        rounds=parsed.rounds,
        warm_ups=parsed.warm_ups,
        seed=parsed.seed,
        port=free_port(),
    )
    if plan.num_sequences % (plan.num_ranks * plan.micro_batches):
        raise ConfigError(
            f"bench.sequences={plan.num_sequences}: {plan.num_ranks} ranks and {plan.micro_batches} micro-batches "
            f"share them; give a multiple of {plan.num_ranks * plan.micro_batches}"
        )
    return replace(plan, beds=tuple(read_bed(text, plan) for text in parsed.traffic)) if is_emulated else plan


def read_bed(text: str, plan: SystemsPlan) -> Bed:
    """The bed that one word of --traffic asks for."""
    if text == "none":
        return Bed("unshaped", None)
    if text == "cluster":
        return Bed("cluster", link_mbit(plan, cluster_traffic_ratio()))
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0.01 <= ratio <= 9.99:
        raise ConfigError(f"bench.traffic={text!r}: give a ratio from 0.01 to 9.99, `cluster` or `none`")
    return Bed(f"traffic{round(100 * ratio)}", link_mbit(plan, ratio))


def race(plan: SystemsPlan, found: SystemFindings, console: Console, out: Path | None) -> int:
    """Follows the ranks to their end, keeping `out` up to date after every round; 130 after Ctrl-C."""

    def save() -> None:
        write_whole(found.records(), out)
        if out is not None and found.spans:
            write_spans(out.with_suffix(".spans.jsonl"), found.spans)

    def see(finding: Finding, update: Callable[..., Any]) -> None:
        if finding.what != "phase":
            found.add(finding)
            return
        title = bed_title(finding.case) if finding.case else ""
        update(description=f"{title}: {finding.text}" if title else finding.text)
        if finding.text.startswith("round"):
            update(advance=1)
            save()

    total = len(plan.systems) if plan.measure == "memory" else len(plan.beds) * (plan.warm_ups + plan.rounds)
    ranks = started_ranks(run_systems_rank, plan, plan.num_ranks)
    return follow(console, ranks, ("starting the ranks", total), see, save)


if __name__ == "__main__":
    sys.exit(main())
