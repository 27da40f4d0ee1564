"""Starts ranks on this machine, which try the links between them, and hears what they found."""

from __future__ import annotations

import os
import queue
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from ds_moe_ep.bench.harness.processes import Finding, end_with_caller, free_port, loopback_environment, started_ranks
from ds_moe_ep.comm.launcher import launched
from ds_moe_ep.doctor.links.outcome import LinksOutcome, LinkTrial, Presence, outcome_from

POLL_S = 0.2


@dataclass(frozen=True)
class LocalPlan:
    """The plan that every rank of a local trial gets."""

    trial: LinkTrial
    num_ranks: int
    port: int


class Ended(Exception):
    """Leaves the block of the started ranks without waiting for them: they are ended at once."""


def run_rank(rank: int, plan: LocalPlan, inbox: Any) -> None:
    """The whole life of one rank; rank 0 hands over the outcome."""
    end_with_caller()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ.update(loopback_environment(rank, plan.num_ranks, plan.port))
    from ds_moe_ep.doctor.links.ranks import try_links

    inbox.put(Finding("up", rank=rank))
    world = launched(os.environ)
    assert world is not None
    outcome = try_links(world, plan.trial)
    if rank == 0:
        inbox.put(Finding("outcome", outcome.to_json()))
    inbox.close()
    inbox.join_thread()
    os._exit(0)  # a transfer may hang in a thread


def try_local_links(num_ranks: int, trial: LinkTrial) -> LinksOutcome:
    """Outcome of `num_ranks` ranks of this machine; in bounded time, and no rank is left behind."""
    plan = LocalPlan(trial, num_ranks, free_port())
    begin, up = time.monotonic(), set[int]()
    heard: list[LinksOutcome] = []
    try:
        with started_ranks(run_rank, plan, num_ranks) as (processes, inbox):
            deadline = begin + 3 * trial.start_s + trial.limit_s
            while not heard and time.monotonic() < deadline and not _ended_early(processes, up):
                try:
                    finding = inbox.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if finding.kind == "up":
                    up.add(finding.rank)
                else:
                    heard.append(outcome_from(finding.text))
            codes = {rank: process.exitcode for rank, process in enumerate(processes)}
            raise Ended
    except Ended:
        pass
    if heard:
        return heard[0]
    failed = {rank: f"its process ended with {code}" for rank, code in codes.items() if rank not in up and code}
    return LinksOutcome(
        backend="gloo",
        world_size=num_ranks,
        up={rank: Presence() for rank in up},
        waited_s=time.monotonic() - begin,
        failed=failed,
        silent=tuple(sorted(up)),
    )


def _ended_early(processes: list[BaseProcess], up: set[int]) -> bool:
    """True where a rank ended before it was up: nobody needs to wait for it any longer."""
    return any(process.exitcode for rank, process in enumerate(processes) if rank not in up)
