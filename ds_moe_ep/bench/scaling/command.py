"""How one system scales with the ranks that share its experts: EP = 1, 2, 4, 8, 16, and the specification's four laws.

    python -m ds_moe_ep bench scaling --out scaling.jsonl

Each size runs in a world of its own, of as many ranks, 4 on a node: once with the tokens of a rank held constant, once
with the tokens of all of them. Devices are emulated, since ranks that share two cores cannot scale; with --link the
nodes are joined by the links of the specification's cluster. Memory is that of real experts and their optimizer, in
worlds of their own. The laws are fitted to what was measured (section 4.3), whatever comes out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import Finding, follow, free_port, on_console, started_ranks
from ds_moe_ep.bench.systems.plan import EMULATED_MODEL, Bed, SystemsPlan, link_mbit
from ds_moe_ep.bench.systems.ranks import run_systems_rank
from ds_moe_ep.bench.testbed import open_testbed
from ds_moe_ep.config.command_line import Parser, number, output_file, whole
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.provenance import command, commit, hardware
from ds_moe_ep.records.record import Record, write_whole
from ds_moe_ep.specification.derived import cluster_traffic_ratio
from ds_moe_ep.specification.laws import fit, r2_text

PROGRAM = "ds_moe_ep bench scaling"
SIZES = (1, 2, 4, 8, 16)
RANKS_PER_NODE = 4
SEQUENCES_PER_RANK = 8
SYSTEM = "ep16"
UNITS = {"tps": "tokens/s", "tpot": "us", "busy": "%", "memory_per_expert": "bytes"}
NOTES = {
    "tps": "emulated device; all tokens of a step over the time of the slowest rank, quartiles",
    "tpot": "emulated device; time of the slowest rank over all tokens of a step, quartiles",
    "busy": "emulated compute over wall time, mean of the ranks, quartiles",
    "memory_per_expert": "weights, gradients and optimizer states of the fullest rank, over the experts of a layer",
}


@dataclass(frozen=True)
class ScalingPoint:
    """One world: what is held constant, and its ranks."""

    total: str
    size: int


class Scaling:
    """What was measured so far, and the Records that follow."""

    def __init__(self, plan: SystemsPlan, command: str, commit: str) -> None:
        self._plan, self._source = plan, {"command": command, "commit": commit, "hardware": hardware("cpu", SIZES[-1])}
        self.values: dict[tuple[ScalingPoint, str], list[float]] = {}

    def add(self, point: ScalingPoint, finding: Finding) -> None:
        self.values.setdefault((point, finding.what), []).extend(finding.values)

    def records(self) -> list[Record]:
        """Every record that can be made now: points first, then the laws' fits to their medians."""
        found = [record for total in TOTALS for size in SIZES for record in self._point(ScalingPoint(total, size))]
        medians: dict[tuple[str, str], dict[int, float]] = {}
        for record in found:
            _, total, size, what = record.name.split(".")
            medians.setdefault((total, what), {})[int(size.removeprefix("ep"))] = record.value
        for (total, what), values in medians.items():
            if len(values) > 1:
                found += self._fit(total, what, values)
        return found

    def _point(self, point: ScalingPoint) -> Iterator[Record]:
        name, seconds = f"scaling.{point.total}.ep{point.size}", self.values.get((point, "time"), [])
        if seconds:
            tokens = plan_of(self._plan, point).tokens_of_step
            columns = (self.values.get((point, what), []) for what in ("busy", "step"))
            yield self._record(f"{name}.tps", [tokens / s for s in seconds])
            yield self._record(f"{name}.tpot", [1e6 * s / tokens for s in seconds])
            # An interruption may have cut the last row of them.
            if percents := [100 * busy_s / s for busy_s, s in zip(*columns, strict=False)]:
                yield self._record(f"{name}.busy", percents)
        held = [self.values.get((point, f"memory.{kind}")) for kind in ("weights", "gradients", "optimizer")]
        if all(held):
            per_expert = sum(values[0] for values in held if values) / self._plan.moe(SYSTEM).num_experts
            yield self._record(f"{name}.memory_per_expert", [per_expert])

    def _fit(self, total: str, law: str, values: dict[int, float]) -> Iterator[Record]:
        fitted = fit(law, values)
        note = f"least squares of {LAWS[law]} over the medians at EP = {', '.join(map(str, values))}"
        yield self._record(
            f"scaling.{total}.fit.{law}.coefficient", [fitted.coefficient], UNITS[law], note, len(values)
        )
        if fitted.r2 is not None:
            yield self._record(f"scaling.{total}.fit.{law}.r2", [fitted.r2], "ratio", note, len(values))

    def _record(self, name: str, values: Sequence[float], unit: str = "", notes: str = "", n: int = 0) -> Record:
        summary, what = summarize(values), name.rsplit(".", 1)[1]
        return Record(
            name=name,
            value=summary.median,
            unit=unit or UNITS[what],
            spread=(summary.low, summary.high),
            n=n or summary.n,
            emulated="memory_per_expert" not in name,
            notes=notes or NOTES[what],
            **self._source,
        )


def plan_of(plan: SystemsPlan, point: ScalingPoint) -> SystemsPlan:
    """The plan of one world: its ranks, its tokens, and the compute that these take."""
    sequences = SEQUENCES_PER_RANK * (point.size if point.total == "constant_rank" else SIZES[-1])
    of_rank = sequences / point.size / SEQUENCES_PER_RANK
    return replace(
        plan,
        ep_size=point.size,
        num_sequences=sequences,
        step_compute_s=plan.step_compute_s * of_rank,
        num_nodes=max(1, point.size // RANKS_PER_NODE),
        ranks_per_node=min(point.size, RANKS_PER_NODE),
        port=free_port(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0 when it ran through, 1 when it failed, 2 when it was refused, 130 after Ctrl-C."""
    return on_console(run, arguments, 110)


def run(words: list[str], console: Console) -> int:
    """The benchmark of a command line, and its tables."""
    parsed = make_parser().parse_args(words)
    plan = SystemsPlan(
        systems=(SYSTEM,),
        modes=("training",),
        beds=(Bed("unshaped", None),),
        device="emulated",
        model=EMULATED_MODEL,
        schedule="peers",
        step_compute_s=parsed.compute_s,
        rounds=parsed.rounds,
        warm_ups=parsed.warm_ups,
    )
    found = Scaling(plan, command("ds_moe_ep", ["bench", "scaling", *words]), commit())
    status = run_all(plan, found, console, parsed)
    console.print(table_of(found.records()))
    return status


def make_parser() -> Parser:
    """The command line of the benchmark."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description="Measures how throughput, latency, busy fraction and memory scale with the ranks of EP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--link", action="store_true", help="join the nodes by shaped links (as root)")
    parser.add_argument(
        "--compute-s", type=number(above=0), default=1.0, help="emulated compute of a rank's step, at constant rank"
    )
    parser.add_argument("--rounds", type=whole(1), default=20, help="measured steps of a world")
    parser.add_argument("--warm-ups", type=whole(1), default=2, help="steps before them")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--out", type=output_file, default=None, help="file for the records, one JSON line each")
    return parser


def run_all(plan: SystemsPlan, found: Scaling, console: Console, parsed: argparse.Namespace) -> int:
    """Runs world after world; 130 after Ctrl-C."""
    for total in TOTALS:
        for size in SIZES:
            point = ScalingPoint(total, size)
            worlds = [plan_of(plan, point)]
            if not parsed.no_memory:
                worlds.append(replace(worlds[0], device="cpu", measure="memory", port=free_port()))
            for world in worlds:
                if status := run_world(world, point, found, console, parsed):
                    return status
    return 0


def run_world(
    plan: SystemsPlan, point: ScalingPoint, found: Scaling, console: Console, parsed: argparse.Namespace
) -> int:
    """Follows the ranks of one world to their end, keeping the file up to date; 130 after Ctrl-C."""

    def see(finding: Finding, update: Callable[..., Any]) -> None:
        if finding.what not in ("phase", "span"):
            found.add(point, finding)
        elif finding.text.startswith("round"):
            update(advance=1)

    with ExitStack() as stack:
        if parsed.link and plan.num_nodes > 1 and plan.measure == "time":
            widest = plan_of(plan, ScalingPoint("constant_rank", SIZES[-1]))
            of_rank = replace(widest, step_compute_s=parsed.compute_s)
            rate = link_mbit(of_rank, cluster_traffic_ratio())  # one link for all sizes
            plan = replace(
                plan, testbed=stack.enter_context(open_testbed(plan.num_nodes)), beds=(Bed("cluster", rate),)
            )
        title = f"{TOTALS[point.total]}, EP={point.size}: {'time' if plan.measure == 'time' else 'memory'}"
        steps = plan.warm_ups + plan.rounds if plan.measure == "time" else 1
        ranks = started_ranks(run_systems_rank, plan, plan.num_ranks)
        return follow(console, ranks, (title, steps), see, partial(save, found, parsed.out))


def save(found: Scaling, out: Path | None) -> None:
    """Replaces the file by the records of now."""
    write_whole(found.records(), out)


def table_of(records: Sequence[Record]) -> Table:
    """What was measured and fitted, a row a size."""
    table = Table(title="Scaling: median; fits by least squares")
    for column in ("held constant", "EP", *UNITS):
        table.add_column(column, justify="right")
    values = {record.name: record for record in records}
    for total, title in TOTALS.items():
        for size in SIZES:
            cells = [values.get(f"scaling.{total}.ep{size}.{what}") for what in UNITS]
            table.add_row(title, str(size), *("-" if cell is None else f"{cell.value:,.1f}" for cell in cells))
        fits = [values.get(f"scaling.{total}.fit.{what}.r2") for what in UNITS]
        table.add_row(
            "R2 of the law", "", *(r2_text(None if r2 is None else r2.value, 3) for r2 in fits), end_section=True
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
