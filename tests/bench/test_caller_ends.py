"""Ranks of a benchmark end with the process that asked for them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from ds_moe_ep.bench.harness.processes import Finding, Tell, die_with_parent, live_as_rank, started_ranks

CALLER = "import sys; from tests.bench.test_caller_ends import call; call(sys.argv[1])"
NUM_RANKS = 2


def sleep(tell: Tell) -> None:
    tell(Finding())
    time.sleep(300)


def listening(rank: int, plan: object, findings: Any) -> None:
    live_as_rank(0, findings, sleep)


def deaf(rank: int, plan: object, findings: Any) -> None:
    """The control: it hears of the fork server's end alone."""
    die_with_parent()
    sleep(findings.put)


def call(way: str) -> None:
    """The caller: starts ranks, tells their process ids and waits for ever."""
    preload = () if way == "spawned" else ("json",)
    with started_ranks(deaf if way == "deaf" else listening, None, NUM_RANKS, preload) as (processes, inbox):
        for _ in processes:
            inbox.get()
        print(*(process.pid for process in processes), flush=True)
        time.sleep(300)


def left_behind(way: str, patience_s: float) -> list[int]:
    """Ranks that are alive so long after their caller was killed; they are killed then."""
    with subprocess.Popen([sys.executable, "-c", CALLER, way], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        ranks = [psutil.Process(int(word)) for word in caller.stdout.readline().split()]
        caller.kill()
    _, alive = psutil.wait_procs(ranks, timeout=patience_s)
    for rank in alive:
        os.kill(rank.pid, signal.SIGKILL)
    assert len(ranks) == NUM_RANKS
    return [rank.pid for rank in alive]


@pytest.mark.parametrize("way", ["forked", pytest.param("spawned", marks=pytest.mark.slow)])
def test_ranks_end_with_a_caller_that_is_killed(way: str) -> None:
    assert left_behind(way, 30) == []


def test_ranks_that_hear_of_the_fork_server_alone_stay() -> None:
    assert len(left_behind("deaf", 1)) == NUM_RANKS
