"""Probes a device and its links in about two minutes: what `calibrate` makes a cluster of.

    python -m ds_moe_ep bench probe --out probe.jsonl                               # ranks of this machine
    deepspeed --hostfile hosts --module ds_moe_ep bench probe --out probe.jsonl     # ranks of a job, rank 0 writes
    python -m ds_moe_ep calibrate probe.jsonl --cluster ds_configs/clusters/h100_4x4.json --out mine.json

Products by precision and rows, causal attention, memory, launches, exchanges by size on near and far links, and on a
CPU the core time of messages. Ctrl-C ends it; what was measured until then is in the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.probe.clock import ProbePlan
from ds_moe_ep.bench.probe.findings import ProbeFindings, probe_table
from ds_moe_ep.bench.probe.ranks import run_probe, run_probe_rank
from ds_moe_ep.comm.launcher import World, launched
from ds_moe_ep.config.command_line import Parser, number, whole, writable_file
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import write_whole

LINE_WIDTH = 110
CPU_RANKS = 2
# Widths of the layer benchmark on a CPU, of the specification's model on a GPU, and a sequence that fits beside them.
SIZES = {
    "cpu": {"hidden_size": 256, "expert_width": 1024, "num_heads": 8, "sequence_length": 512},
    "cuda": {"hidden_size": 8192, "expert_width": 32768, "num_heads": 16, "sequence_length": 4096},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the probe; 0 when it ran through, 1 when it failed, 2 when it was refused, 130 after Ctrl-C."""
    return on_console(run, arguments, LINE_WIDTH)


def run(words: list[str], console: Console) -> int:
    """The probe of a command line. In a job every rank runs it, and rank 0 prints and writes."""
    parsed = make_parser().parse_args(words)
    world = launched(os.environ)
    plan = make_plan(parsed, world)
    if world is not None and world.rank > 0:
        run_probe(plan, world.rank, world.local_rank, _silent)
        return 0
    if parsed.out is not None:  # rank 0's own: the others may have no such folder
        writable_file(parsed.out, "--out")
    found = ProbeFindings(
        command("ds_moe_ep", ["bench", "probe", *words]),
        commit(),
        hardware(plan.device, plan.num_ranks),
        is_shaped=parsed.shaped,
    )

    def save() -> None:
        write_whole(found.records(), parsed.out)

    status = _follow(plan, found, console, save) if world is None else _take_part(plan, world, found, console, save)
    console.print(probe_table(found.records()))
    if parsed.out is not None:
        console.print(f"records in {parsed.out}; make a cluster of them: python -m ds_moe_ep calibrate --help")
    return status


def make_parser() -> Parser:
    """The command line of the probe."""
    parser = Parser(
        prog="python -m ds_moe_ep bench probe",
        description="Measures products, memory and links, for `python -m ds_moe_ep calibrate`. In a job of a launcher "
        "(deepspeed --module, torchrun -m, mpirun) the job's ranks are taken.",
    )
    parser.add_argument(
        "--seconds",
        type=number(above=0, most=3600),
        default=120.0,
        help="time that all of it takes, about (default: 120)",
    )
    parser.add_argument(
        "--ranks",
        type=whole(0),
        default=0,
        metavar="N",
        help="ranks started here (default: one on each GPU, two on a CPU)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what a rank computes on (default: auto, a GPU where there is one)",
    )
    parser.add_argument(
        "--node-size", type=whole(0), default=0, metavar="N", help="ranks of a node (default: by the hosts' names)"
    )
    parser.add_argument(
        "--hidden-size",
        type=whole(0),
        default=0,
        metavar="N",
        help="width of a token (default: 256 on a CPU, 8192 on a GPU)",
    )
    parser.add_argument(
        "--expert-width",
        type=whole(0),
        default=0,
        metavar="N",
        help="inner width of an expert (default: 1024 on a CPU, 32768 on a GPU)",
    )
    parser.add_argument("--shaped", action="store_true", help="say in the records that the links were shaped")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="file for the records, one JSON line each (default: none)",
    )
    return parser


def make_plan(parsed: argparse.Namespace, world: World | None) -> ProbePlan:
    """The plan that the command line describes. Raises ConfigError for what cannot be measured here."""
    device = _device(parsed.device, world)
    num_ranks = world.size if world is not None else _num_ranks(parsed.ranks, device)
    sizes = dict(SIZES[device])
    sizes |= {name: value for name in ("hidden_size", "expert_width") if (value := getattr(parsed, name))}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ConfigError(
            f"bench.hidden_size={sizes['hidden_size']}: shared by {sizes['num_heads']} heads; give a multiple of that"
        )
    if parsed.node_size and num_ranks % parsed.node_size:
        raise ConfigError(f"bench.node_size={parsed.node_size} does not divide {num_ranks} ranks; leave it out")
    return ProbePlan(
        device=device,
        num_ranks=num_ranks,
        node_size=parsed.node_size,
        seconds=parsed.seconds,
        port=free_port() if world is None else 0,
        **sizes,
    )


def _device(asked: str, world: World | None) -> Literal["cpu", "cuda"]:
    """What is probed. `auto` is alike on all ranks of a job only where all hosts are."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ConfigError("bench.device='cuda': torch sees no GPU here; leave --device out, or see doctor")
    wants_gpu = world is None or world.wants_gpu
    return "cuda" if asked == "cuda" or (asked == "auto" and has_gpu and wants_gpu) else "cpu"


def _num_ranks(asked: int, device: str) -> int:
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if device == "cuda" and asked > gpus:
        raise ConfigError(f"bench.ranks={asked}: this machine has {gpus} GPUs, and each rank needs its own; give fewer")
    return asked or gpus or CPU_RANKS


def _silent(finding: Finding) -> None:
    return None


def _follow(plan: ProbePlan, found: ProbeFindings, console: Console, save: Callable[[], None]) -> int:
    """Starts ranks here and follows them to their end behind a progress bar."""

    def see(finding: Finding, update: Callable[..., None]) -> None:
        if finding.what == "phase":
            update(description=finding.text, advance=1)
            save()
        else:
            found.add(finding)

    ranks = started_ranks(run_probe_rank, plan, plan.num_ranks)
    return follow(console, ranks, ("starting the ranks", _num_phases(plan)), see, save)


def _take_part(plan: ProbePlan, world: World, found: ProbeFindings, console: Console, save: Callable[[], None]) -> int:
    """Runs rank 0 of a job in this process, with a line for each thing that is measured."""
    try:
        run_probe(plan, world.rank, world.local_rank, partial(_hear, found, console))
    except KeyboardInterrupt:
        console.print("interrupted: the records hold what was measured until now")
        return 130
    finally:
        save()
    return 0


def _hear(found: ProbeFindings, console: Console, finding: Finding) -> None:
    if finding.what == "phase":
        console.print(f"measuring {finding.text}")
    else:
        found.add(finding)


def _num_phases(plan: ProbePlan) -> int:
    """About how many things are measured: precisions, attention, memory, launches or the host, two ways of links."""
    return len(plan.precisions) + 3 + 2 * (plan.num_ranks > 1)


if __name__ == "__main__":
    sys.exit(main())
