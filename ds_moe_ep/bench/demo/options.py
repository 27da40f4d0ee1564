"""The options of the command `demo`. No torch: the command line reads them for each command."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ds_moe_ep.bench.demo.plan import NUM_RANKS, STEP_BYTES
from ds_moe_ep.config.command_line import number, output_file, whole

if TYPE_CHECKING:
    from ds_moe_ep.config.command_line import Parser

LONGEST_S = 20.0  # that the traffic of one step may take


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command `demo`."""
    demo = commands.add_parser(
        "demo",
        help="show in a minute what overlap hides, on an emulated link, and what ranks say when one dies",
        description=(
            f"Starts {NUM_RANKS} ranks as 2 nominal nodes on this machine and runs one expert-parallel layer forward "
            "and backward, serial beside overlapped. Experts are emulated (a wait per row), and so is the link between "
            "the nodes (real messages, let out at a rate); the layer, its schedules and its transfers are the real "
            "ones. Prints two timelines, the step times, and how much of the communication was hidden. Needs no root."
        ),
        epilog="example: python -m ds_moe_ep demo --link 50mbit --trace demo.json",
    )
    demo.add_argument(
        "--link",
        type=link_rate,
        default="100mbit",
        metavar="RATE",
        help="rate of each node's link: 100mbit, 2gbit, or bytes per second (default: 100mbit)",
    )
    demo.add_argument(
        "--compute-ms",
        type=number(1, 10_000),
        default=280.0,
        metavar="MS",
        help="emulated time of a rank's experts in a forward pass; twice that in a backward pass (default: 280)",
    )
    demo.add_argument("--rounds", type=whole(1, 1000), default=5, help="measured steps of each schedule (default: 5)")
    demo.add_argument(
        "--trace", type=output_file, metavar="FILE", help="write the shown steps of all ranks, for Perfetto"
    )
    demo.add_argument(
        "--kill",
        type=whole(0, NUM_RANKS - 1),
        metavar="RANK",
        help="instead, end this rank in the middle of a pass, and print what each of the others says",
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of timelines")
    demo.set_defaults(run=_run)


def link_rate(text: str) -> float:
    """Bytes per second of a rate like 100mbit, 2gbit or 12500000."""
    from ds_moe_ep.bench.testbed import parse_rate

    if text[-1:].isalpha():
        rate_mbit = parse_rate(text)
        if rate_mbit is None:
            raise argparse.ArgumentTypeError(f"={text}: the demo's link has a rate; write one like 100mbit or 2gbit")
        bytes_per_s = 1e6 / 8 * rate_mbit
    else:
        bytes_per_s = number(above=0)(text)
    if STEP_BYTES / bytes_per_s > LONGEST_S:
        took_s, least_mbit = STEP_BYTES / bytes_per_s, 8e-6 * STEP_BYTES / LONGEST_S
        raise argparse.ArgumentTypeError(
            f"={text}: the traffic of one step would take {number(took_s, 0)} s; give {math.ceil(least_mbit)}mbit or "
            "more"
        )
    return bytes_per_s


def _run(parsed: argparse.Namespace) -> int:
    from ds_moe_ep.bench.demo.command import run

    return run(parsed)
