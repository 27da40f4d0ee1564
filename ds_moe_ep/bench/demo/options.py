"""The options of the command `demo`. No torch: the command line reads them for each command."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.bench.demo.plan import NUM_RANKS, STEP_BYTES
from ds_moe_ep.config.command_line import number, output_file
from ds_moe_ep.config.options import option

LONGEST_S = 20.0  # that the traffic of one step may take


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


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """An emulated link, how long is measured, and what is shown."""

    link: float = option(
        "100mbit",
        "rate of each node's link: 100mbit, 2gbit, or bytes per second",
        type=link_rate,
        metavar="RATE",
    )
    compute_ms: float = option(
        280.0,
        "emulated time of a rank's experts in a forward pass; twice that in a backward pass",
        least=1,
        most=10_000,
        metavar="MS",
    )
    rounds: int = option(5, "measured steps of each schedule", least=1, most=1000)
    trace: Path | None = option(
        None, "write the shown steps of all ranks, for Perfetto", type=output_file, metavar="FILE"
    )
    kill: int | None = option(
        None,
        "instead, end this rank in the middle of a pass, and print what each of the others says",
        least=0,
        most=NUM_RANKS - 1,
        metavar="RANK",
    )
    json: bool = option(False, "print JSON instead of timelines")
