"""The real layer at EP=16 on one GPU, without DeepSpeed: does it equal the dense expert, and what does it cost?

    python -m tests.gpu.one_gpu [check] [sync] [kernels] [speed] [memory] [parts]     (all by default)

Prints one line per finding and a verdict; writes Records with --out. The exit code is 1 where something does not hold.
On a CPU the same script runs small: the equality, and the flow of the rest. See mirror.py for how 16 ranks become one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ds_moe_ep.records.provenance import command, commit
from ds_moe_ep.records.record import Record, write_whole
from tests.gpu.kernels import kernels
from tests.gpu.layers import Sizes, sizes
from tests.gpu.parts import parts
from tests.gpu.sections import Finding, check, memory, speed, sync

Section = Callable[[Sizes, int], Iterator[Finding]]
SECTIONS: dict[str, Section] = {
    "check": lambda of, _: check(of),
    "sync": lambda of, _: sync(of),
    "kernels": kernels,
    "speed": speed,
    "memory": lambda of, _: memory(of),
    "parts": parts,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections; 0 where all that can fail holds."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.one_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each side")
    parser.add_argument("--out", type=Path, help="file for the Records, one JSON line each")
    parsed = parser.parse_args(words)
    if unknown := [name for name in parsed.sections if name not in SECTIONS]:
        parser.error(f"section={unknown[0]!r}: unknown; of {', '.join(SECTIONS)}")
    of = sizes(parsed.small)
    print(f"{hardware(of)}; {of.num_tokens} tokens, D={of.hidden_size}, F={of.width}, {of.dtype}", flush=True)
    found: list[Finding] = []
    for name in parsed.sections or SECTIONS:
        start_s = time.monotonic()
        if name == "speed":
            print(SPEED_HEAD)
        for finding in SECTIONS[name](of, parsed.rounds):
            found.append(finding)
            if name != "speed":
                print(line(finding), flush=True)
            elif finding.name.endswith(".peak"):
                print(speed_row(found), flush=True)
        print(f"-- {name}: {time.monotonic() - start_s:.0f} s", flush=True)
    write_whole(records(found, of, words), parsed.out)
    failed = [finding.name for finding in found if finding.holds is False]
    judged = sum(finding.holds is not None for finding in found)
    print(f"{judged - len(failed)} of {judged} checks hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def line(finding: Finding) -> str:
    """One line of the table."""
    mark = {True: "ok", False: "FAILED", None: ""}[finding.holds]
    spread = "" if finding.low is None else f" ({finding.low:.4g} to {finding.high:.4g}, n={finding.n})"
    return f"{finding.name:48s} {finding.value:10.4g} {finding.unit}{spread} {mark} {finding.note}".rstrip()


SPEED_HEAD = (
    f"{'links, schedule':24s} {'dense':>8s} {'forward':>8s} {'step':>8s} {'host':>7s} {'blocked':>8s} {'saved':>8s} "
    f"{'traffic':>8s} {'hidden':>7s} {'of dense':>8s} {'peak GB':>8s}   (ms; a step is forward and backward)"
)


def speed_row(found: list[Finding]) -> str:
    """The last schedule's figures as one row of the table."""
    prefix = found[-1].name.removesuffix(".peak")
    of = {each.name.removeprefix(f"{prefix}."): each.value for each in found if each.name.startswith(f"{prefix}.")}
    _, link, schedule = prefix.split(".", 2)
    return (
        f"{link + ' ' + schedule:24s} {of['dense']:8.2f} {of['forward']:8.2f} {of['step']:8.2f} {of['step.host']:7.2f} "
        f"{of['blocked']:8.2f} {of['saved']:8.2f} {of['traffic']:8.2f} {of['hidden']:6.0f}% {of['of_dense']:8.3f} "
        f"{of['peak']:8.2f}"
    )


def records(found: list[Finding], of: Sizes, words: list[str]) -> list[Record]:
    """The findings as Records."""
    shared = {
        "command": command("tests.gpu.one_gpu", words), "commit": commit(), "hardware": hardware(of), "emulated": True,
    }  # fmt: skip
    return [
        Record(
            name=f"gpu.{each.name}".replace(" ", "_").replace(",", ""),
            value=each.value,
            unit=each.unit,
            spread=(each.value if each.low is None else each.low, each.value if each.high is None else each.high),
            n=each.n,
            notes=each.note or "15 peers are mirrored on one device",
            **shared,  # type: ignore[arg-type]
        )
        for each in found
        if abs(each.value) != float("inf")
    ]


def hardware(of: Sizes) -> str:
    """The device and what runs on it."""
    name = torch.cuda.get_device_name() if of.is_cuda else platform.processor() or platform.machine()
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset")
    return f"{name}, torch {torch.__version__}, CUDA_DEVICE_MAX_CONNECTIONS {queues}"


if __name__ == "__main__":
    sys.exit(main())
