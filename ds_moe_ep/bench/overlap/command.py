"""Races schedules of one layer, forward and backward, on nodes that are joined by shaped links.

    python -m ds_moe_ep.bench.overlap                                  # emulated devices, traffic 0.3 to 2 x compute
    python -m ds_moe_ep.bench.overlap --device real --links 100mbit 400mbit 2gbit none
    python -m ds_moe_ep.bench.overlap --device real --links none --no-testbed

16 ranks, 4 on each of 4 nodes (`testbed.py`), one expert a rank. Without root it says so and measures nothing; with
--no-testbed it runs over the machine's loopback. Ctrl-C ends the run; what was measured until then is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.overlap.findings import OverlapFindings, link_mbit, markdown_tables
from ds_moe_ep.bench.overlap.ranks import PHASES, SIDES, OverlapPlan, Shaping, run_overlap_rank
from ds_moe_ep.bench.rivals.cases import CASES
from ds_moe_ep.bench.testbed import open_testbed, parse_rate
from ds_moe_ep.config.command_line import Parser, number, output_file, whole
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import write_whole

RATIOS = (0.3, 0.6, 1.0, 2.0)
PORT = 29500  # inside the namespaces, where nobody else listens


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 when it ran through, 1 when it failed, 2 when it was refused, 130 after Ctrl-C."""
    return on_console(_run, arguments, 110)


def _run(words: list[str], console: Console) -> int:
    """The benchmark of a command line, and its tables."""
    parsed = _parser().parse_args(words)
    with ExitStack() as stack:
        plan = _plan(parsed)
        if not parsed.no_testbed:
            plan = replace(plan, bed=stack.enter_context(open_testbed(plan.num_nodes)))
        machine = hardware("cpu", plan.num_ranks)
        found = OverlapFindings(plan, command("ds_moe_ep.bench.overlap", words), commit(), machine)
        status = _race(plan, found, console, parsed.out)
    console.print(markdown_tables(found.records()), markup=False, highlight=False, soft_wrap=True)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="python -m ds_moe_ep.bench.overlap",
        description="Races schedules of one layer on nodes that are joined by shaped links.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("emulated", "real"), default="emulated", help="what computes experts")
    parser.add_argument("--case", default="k1_even", choices=[case.name for case in CASES], help="routing, and top-k")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, metavar="SIDE", default=list(SIDES), help=f"of {', '.join(SIDES)}"
    )
    parser.add_argument(
        "--ratios", nargs="+", type=number(above=0), default=list(RATIOS), help="traffic over emulated compute"
    )
    parser.add_argument("--of", choices=PHASES, default="step", help="the pass that --ratios are of")
    parser.add_argument("--links", nargs="+", type=parse_rate, help="rates instead of ratios, like 100mbit, or none")
    parser.add_argument(
        "--compute-s", type=number(above=0), default=1.0, help="an emulated expert's forward pass in seconds"
    )
    parser.add_argument("--rounds", type=whole(1), default=5, help="measured rounds a shaping")
    parser.add_argument("--warm-ups", type=whole(1), default=1, help="rounds before them, in which 'auto' is chosen")
    parser.add_argument("--nodes", type=whole(1), default=4, help="network namespaces")
    parser.add_argument("--ranks", type=whole(1), default=4, help="ranks of a node")
    parser.add_argument("--no-testbed", action="store_true", help="over the loopback, without namespaces")
    parser.add_argument("--out", type=output_file, default=None, help="file for the records, one JSON line each")
    return parser


def _plan(parsed: argparse.Namespace) -> OverlapPlan:
    case = next(case for case in CASES if case.name == parsed.case)
    if parsed.nodes * parsed.ranks != case.num_experts:
        raise ConfigError(
            f"bench.nodes={parsed.nodes} x ranks={parsed.ranks}: the layer has {case.num_experts} experts, one a rank; "
            f"give numbers whose product is {case.num_experts}"
        )
    if parsed.device == "real" and parsed.links is None:
        raise ConfigError("bench.device='real': --ratios are of emulated compute; give --links 100mbit 400mbit none")
    if parsed.no_testbed and parsed.links != [None]:
        raise ConfigError("bench.no_testbed: nothing shapes the loopback; give --links none")
    plan = OverlapPlan(
        case=case,
        sides=tuple(name for name in SIDES if name in parsed.sides),
        shapings=(),
        device=parsed.device,
        row_us=1e6 * parsed.compute_s / case.num_rows,
        rounds=parsed.rounds,
        warm_ups=parsed.warm_ups,
        num_nodes=parsed.nodes,
        ranks_per_node=parsed.ranks,
        bed=None,
        port=free_port() if parsed.no_testbed else PORT,
    )
    return replace(plan, shapings=tuple(_shapings(parsed, plan)))


def _shapings(parsed: argparse.Namespace, plan: OverlapPlan) -> Iterator[Shaping]:
    if parsed.links is not None:
        yield from (Shaping("unshaped" if rate is None else f"{rate:g} mbit", rate) for rate in parsed.links)
        return
    for ratio in parsed.ratios:
        yield Shaping(f"{ratio:g} of {parsed.of}", link_mbit(plan, ratio, parsed.of))


def _race(plan: OverlapPlan, found: OverlapFindings, console: Console, out: Path | None) -> int:
    """Follows the ranks to their end, keeping `out` up to date after every round; 130 after Ctrl-C."""

    def save() -> None:
        write_whole(found.records(), out)

    def see(finding: Finding, update: Callable[..., None]) -> None:
        if finding.what != "phase":
            found.add(finding)
            return
        update(description=f"{finding.case}: {finding.text}")
        if finding.text.startswith("round"):
            update(advance=1)
            save()

    total = len(plan.shapings) * (plan.warm_ups + plan.rounds)
    ranks = started_ranks(run_overlap_rank, plan, plan.num_ranks)
    return follow(console, ranks, ("starting the ranks", total), see, save)


if __name__ == "__main__":
    sys.exit(main())
