"""Prints the host time of a pass of the reference job's layer, then and now: python -m tests.account.host_time [rounds]

Before is the revision that the account was made at. 16 experts on 4 nodes of 4, one per rank, fp16; the sides run in
turns, each in a process of its own (`host_pass.py`), and each round gives a ratio. Processor time of the thread.
Operations are plain torch, each a call where Triton would have one for several; lanes are not CUDA's, whose 12 events
and 12 waits per pass, 16, 30 and 60 records of tensors before, come on top.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

BEFORE = "7855be2"
PASSES, ROUNDS = 100, 7
SCHEDULES = ("serial", "peers")
REPOSITORY = Path(__file__).resolve().parents[2]

Side = dict[str, dict[str, list[float]]]


def main() -> None:
    """The figures of both sides by schedule and pass: time, ratio, calls and operations."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", BEFORE, "ds_moe_ep"], cwd=REPOSITORY, check=True, capture_output=True
        ).stdout
        (Path(folder) / "before.tar").write_bytes(archive)
        with tarfile.open(Path(folder) / "before.tar") as packed:
            packed.extractall(folder, filter="data")
        trees = [Path(folder), REPOSITORY]
        told: list[tuple[Side, Side]] = []
        for index in range(rounds):
            order = (0, 1) if index % 2 else (1, 0)
            sides = {which: measured(trees[which]) for which in order}
            told.append((sides[0], sides[1]))
    for schedule in SCHEDULES:
        for place, phase in enumerate(("forward", "backward")):
            before, now = ([sides[which][schedule][phase][1] for sides in told] for which in (0, 1))
            ratios = [b / a for a, b in zip(before, now, strict=True)]
            counted = [
                f"{what} {told[-1][0][schedule][what][place]:,.0f} -> {told[-1][1][schedule][what][place]:,.0f}"
                for what in ("calls", "operations")
            ]
            times = f"{shown(before)} -> {shown(now)} ms, ratio {shown(ratios)}"
            print(f"{schedule:7} {phase:9} {times}; {'; '.join(counted)}")


def measured(tree: Path) -> Side:
    """A side's figures, from a process that imports this tree's package."""
    command = [sys.executable, str(Path(__file__).with_name("host_pass.py")), str(PASSES), *SCHEDULES]
    path = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(command, env=path, cwd=tree, check=True, capture_output=True, text=True).stdout
    side: Side = json.loads(lines.splitlines()[-1])
    return side


def shown(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
