"""Prints the costs that the pages tell in a sentence: python -m tests.account.small_costs [meter] [watch] [checksums]

meter      processor time of a layer's forward and backward while it is recorded, over that without, in turns (4 ranks)
watch      processor time of a rank that watches and is watched, less that of one that only sleeps (16 ranks)
checksums  seconds per GB for the CRC-32 of a checkpoint's file, beside torch.load of it (one process)

Each is the median (quartiles) of its rounds, on the mean rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import CASES
from ds_moe_ep.bench.candidates.layers import LayerSetup, build
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.engine.checkpoint.convert.read import check_undamaged
from ds_moe_ep.health.watch import open_watch
from tests.account.rounds import mean_rounds

UNITS = {"meter": "times", "watch": "% of a core", "checksums": "s per GB", "torch.load": "s per GB"}


@dataclass(frozen=True)
class Plan:
    """One measurement; the same on every rank. `size`: seconds of a round of the watch, MB of the file."""

    what: str
    ranks: int
    rounds: int
    size: float = 0.0


PLANS = (
    Plan(what="meter", ranks=4, rounds=40),
    Plan(what="watch", ranks=16, rounds=5, size=10.0),
    Plan(what="checksums", ranks=1, rounds=5, size=1000.0),
)


def meter_rounds(plan: Plan, rank: int) -> Iterator[list[float]]:
    """The processor time of a recorded pass over that of one that is not, round by round."""
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR

    native.start_ranks("gloo", 300.0)
    setups = [LayerSetup(case=CASES[0], rank=rank, num_ranks=plan.ranks, is_recorded=recorded) for recorded in (0, 1)]
    layers = [build("peers", setup) for setup in setups]
    for index in range(2 + plan.rounds):
        took = [0.0, 0.0]
        for which in rotation((0, 1), index):
            layers[which].prepare()
            dist.barrier()
            start_s = time.process_time()
            layers[which].run()
            [*layers[which].traffic()]  # spans are read as the meter reads them, and do not pile up
            took[which] = time.process_time() - start_s
        if index >= 2:
            yield [took[1] / took[0]]


def watch_rounds(plan: Plan, rank: int) -> Iterator[list[float]]:
    """Percent of a core that a watched rank takes, less what it takes without, round by round."""
    dist.init_process_group("gloo")
    for _ in range(plan.rounds):
        shares = []
        for is_watched in (False, True):
            watch = open_watch(600.0) if is_watched else None
            dist.barrier()
            time.sleep(2.0)  # the ranks have met
            start_s = time.process_time()
            time.sleep(plan.size)
            shares.append(100 * (time.process_time() - start_s) / plan.size)
            dist.barrier()
            if watch is not None:
                watch.end()
        yield [shares[1] - shares[0]]


def checksum_rounds(plan: Plan) -> dict[str, list[float]]:
    """Seconds per GB of the checksums of a file, and of torch.load of it, round by round."""
    found: dict[str, list[float]] = {"checksums": [], "torch.load": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        torch.save({str(part): torch.rand(int(plan.size * 1e6 / 40)) for part in range(10)}, path)
        gigabytes = path.stat().st_size / 1e9
        for _ in range(plan.rounds):
            for name, read in (("checksums", check_undamaged), ("torch.load", torch.load)):
                start_s = time.perf_counter()
                read(path)
                found[name].append((time.perf_counter() - start_s) / gigabytes)
    return found


def measured(plan: Plan) -> dict[str, list[float]]:
    """The rounds of a measurement, by name."""
    if plan.what == "checksums":
        return checksum_rounds(plan)
    rounds_of = {"meter": meter_rounds, "watch": watch_rounds}[plan.what]
    return {plan.what: [value for (value,) in mean_rounds(partial(rounds_of, plan), plan.ranks)]}


def line(name: str, rounds: Sequence[float]) -> str:
    """The median (quartiles) of the rounds, with its unit."""
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return f"{name:10} {median:.4g} ({low:.4g} to {high:.4g}) {UNITS[name]}, {len(rounds)} rounds"


def main() -> None:
    """Measures what is named, by default all."""
    parser = argparse.ArgumentParser(prog="python -m tests.account.small_costs")
    parser.add_argument("what", nargs="*", choices=[[], *(plan.what for plan in PLANS)], metavar="WHAT")
    wanted = parser.parse_args().what
    for plan in PLANS:
        if not wanted or plan.what in wanted:
            for name, rounds in measured(plan).items():
                print(line(name, rounds), flush=True)


if __name__ == "__main__":
    main()
