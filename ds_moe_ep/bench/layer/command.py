"""Races one layer, forward and backward: ours serial and overlapped, DeepSpeed's own, the matmuls alone.

    python -m ds_moe_ep.bench.layer [--ranks 4] [--rounds 20] [--out layer.jsonl]

Starts its own ranks on this machine. Ctrl-C ends the run; what was measured until then is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.layer.findings import LayerFindings
from ds_moe_ep.bench.layer.ranks import SIDES, LayerPlan, run_rank
from ds_moe_ep.bench.layer.table import markdown_table, terminal_table
from ds_moe_ep.bench.rivals.cases import CASES
from ds_moe_ep.config.command_line import Parser, output_file, whole
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import write_whole

LINE_WIDTH = 110


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 when it ran through, 1 when it failed, 2 when it was refused, 130 after Ctrl-C."""
    return on_console(_run, arguments, LINE_WIDTH)


def _run(words: list[str], console: Console) -> int:
    """The benchmark of a command line, and its tables."""
    parsed = _parser().parse_args(words)
    plan = _plan(parsed)
    machine = hardware(plan.device, plan.num_ranks)
    found = LayerFindings(plan, command("ds_moe_ep.bench.layer", words), commit(), machine)
    status = _race(plan, found, console, parsed.out)
    if status == 0 and not parsed.no_memory:
        status = _race(replace(plan, measure="memory", port=free_port()), found, console, parsed.out)
    records = found.records()
    console.print(terminal_table(records))
    console.print(markdown_table(records), markup=False, highlight=False, soft_wrap=True)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="python -m ds_moe_ep.bench.layer",
        description="Races one layer, forward and backward, against DeepSpeed's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cases = [case.name for case in CASES]
    parser.add_argument("--ranks", type=whole(2), default=4, help="processes, and the expert-parallel size")
    parser.add_argument("--rounds", type=whole(1), default=20, help="measured rounds a case")
    parser.add_argument("--warm-ups", type=whole(0), default=3, help="rounds before them")
    parser.add_argument(
        "--cases", nargs="+", choices=cases, metavar="CASE", default=cases, help=f"of {', '.join(cases)}"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, metavar="SIDE", default=list(SIDES), help=f"of {', '.join(SIDES)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="one device a rank")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=output_file, default=None, help="file for the records, one JSON line each")
    return parser


def _plan(parsed: argparse.Namespace) -> LayerPlan:
    cases = {case.name: case for case in CASES}
    if any(cases[name].num_experts % parsed.ranks for name in parsed.cases):
        raise ConfigError(f"bench.ranks={parsed.ranks} must divide the layer's 16 experts: use 2, 4, 8 or 16")
    if parsed.device == "cuda" and (gpus := torch.cuda.device_count()) < parsed.ranks:
        raise ConfigError(f"bench.device='cuda': {parsed.ranks} ranks need a GPU each, and torch sees {gpus} here")
    return LayerPlan(
        cases=tuple(cases[name] for name in parsed.cases),
        sides=tuple(name for name in SIDES if name in parsed.sides),
        num_ranks=parsed.ranks,
        rounds=parsed.rounds,
        warm_ups=parsed.warm_ups,
        measure="time",
        device=parsed.device,
        port=free_port(),
    )


def _race(plan: LayerPlan, found: LayerFindings, console: Console, out: Path | None) -> int:
    """Follows the ranks to their end, keeping `out` up to date after every case; 130 after Ctrl-C."""
    timed = plan.measure == "time"

    def save() -> None:
        write_whole(found.records(), out)

    def see(finding: Finding, update: Callable[..., None]) -> None:
        if finding.what == "phase":
            update(description=f"{plan.measure}: {finding.case}, {finding.text}")
            save()
        found.add(finding)
        if finding.what == "peak" or (finding.what == "time" and finding.side == plan.sides[-1]):
            update(advance=1)

    total = len(plan.cases) * (plan.rounds if timed else len(plan.sides))
    ranks = started_ranks(run_rank, plan, plan.num_ranks)
    return follow(console, ranks, (f"{plan.measure}: starting the ranks", total), see, save)


if __name__ == "__main__":
    sys.exit(main())
