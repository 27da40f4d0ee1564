"""Soaks the whole system: many steps whose routing drifts and bursts; memory flat, no open handles, the same bits.

    python -m ds_moe_ep bench soak --ranks 16 --steps 1000 --runs 3 --out soak.jsonl

Each run starts ranks of its own, makes a DeepSpeed engine around two MoE layers on the overlapping schedule "peers",
and takes an optimizer step a time. Tokens share a direction that turns, so that the busiest expert changes; in bursts
all of them visit one expert; batches differ in size, and some are empty. Ctrl-C ends the run; what was measured until
then is in the file, which `python -m ds_moe_ep report` draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.soak.findings import SoakFindings
from ds_moe_ep.bench.soak.plan import SoakPlan
from ds_moe_ep.bench.soak.ranks import run_soak_rank
from ds_moe_ep.config.command_line import Parser, output_file, whole
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import SOAK_VERDICTS
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import Record, write_whole

PROGRAM = "ds_moe_ep bench soak"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak; 0 when every verdict holds, 3 when one does not; else as the other benchmarks."""
    return on_console(run, arguments, 120)


def run(words: list[str], console: Console) -> int:
    """The soak of a command line, and its verdicts."""
    parsed = make_parser().parse_args(words)
    plan = make_plan(parsed)
    machine = hardware("cpu", plan.num_ranks)
    found = SoakFindings(plan, parsed.runs, command("ds_moe_ep", ["bench", "soak", *words]), commit(), machine)
    status = soak_all(plan, parsed.runs, found, console, parsed.out)
    records = {record.name: record for record in found.records()}
    console.print(table_of(records))
    if parsed.out is not None:
        console.print(f"records in {parsed.out}; draw them: python -m ds_moe_ep report {parsed.out} -o report/")
    all_hold = all(record.value for name, record in records.items() if name.startswith("soak.verdict."))
    return status or (0 if all_hold else 3)


def make_parser() -> Parser:
    """The command line of the soak."""
    plan = SoakPlan()
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description="Trains many steps under routing that drifts and bursts; judges memory, handles and determinism.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=whole(2), default=plan.num_ranks, help="processes, and the expert-parallel size"
    )
    parser.add_argument("--steps", type=whole(1), default=plan.steps, help="optimizer steps of a run")
    parser.add_argument(
        "--runs", type=whole(1), default=3, help="runs with the same seed, each in processes of its own"
    )
    parser.add_argument(
        "--sample-every", type=whole(1), default=plan.sample_every, help="steps between looks at processes"
    )
    parser.add_argument("--hash-every", type=whole(1), default=plan.hash_every, help="steps between hashes")
    parser.add_argument("--tokens", type=whole(1), default=plan.num_tokens, help="tokens of the mean rank in a step")
    parser.add_argument(
        "--no-caches",
        action="store_true",
        help="switch off torch's two caches that fill up in the first hundreds of steps",
    )
    parser.add_argument("--seed", type=whole(0), default=plan.seed, help="of weights, tokens, drift and bursts")
    parser.add_argument("--out", type=output_file, default=None, help="file for the records, one JSON line each")
    return parser


def make_plan(parsed: argparse.Namespace) -> SoakPlan:
    """The plan that the command line describes. Raises ConfigError for what cannot be judged."""
    if parsed.steps < 4 * parsed.sample_every:
        raise ConfigError(
            f"bench.steps={parsed.steps} with sample_every={parsed.sample_every}: memory is judged by three samples "
            f"after a quarter of the run; take {4 * parsed.sample_every} steps, or look more often"
        )
    return SoakPlan(
        num_ranks=parsed.ranks,
        steps=parsed.steps,
        sample_every=parsed.sample_every,
        hash_every=parsed.hash_every,
        num_tokens=parsed.tokens,
        has_caches=not parsed.no_caches,
        seed=parsed.seed,
    )


def soak_all(plan: SoakPlan, num_runs: int, found: SoakFindings, console: Console, out: Path | None) -> int:
    """Runs one after the other; 130 after Ctrl-C."""
    for run in range(1, num_runs + 1):
        its_plan = replace(plan, run=run, port=free_port())
        title = f"run {run} of {num_runs}"
        ranks = started_ranks(run_soak_rank, its_plan, its_plan.num_ranks)
        see = partial(see_finding, found, title, out)
        if status := follow(
            console, ranks, (f"{title}: starting the ranks", plan.steps), see, partial(save, found, out)
        ):
            return status
    return 0


def see_finding(
    found: SoakFindings, title: str, out: Path | None, finding: Finding, update: Callable[..., Any]
) -> None:
    """Takes in a finding: a phase moves the bar, and the file is kept up to date at every hash."""
    if finding.what != "phase":
        found.add(finding)
        if finding.what.startswith("hash."):
            save(found, out)
        return
    update(description=f"{title}: {finding.text}")
    if finding.text.startswith("step "):
        update(advance=1)


def save(found: SoakFindings, out: Path | None) -> None:
    """Replaces the file by the records of now."""
    write_whole(found.records(), out)


def table_of(records: dict[str, Record]) -> Table:
    """The verdicts, each with what it rests on."""
    table = Table(title="Soak: verdicts")
    for column in ("verdict", "holds", "found"):
        table.add_column(column)
    for what, title in SOAK_VERDICTS.items():
        record = records.get(f"soak.verdict.{what}")
        table.add_row(title, "-" if record is None else "yes" if record.value else "NO", record.notes if record else "")
    return table


if __name__ == "__main__":
    sys.exit(main())
