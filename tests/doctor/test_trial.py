"""The links of real ranks that a test starts: all well, or one that never comes, dies, raises or hangs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from ds_moe_ep.bench.harness.processes import free_port
from ds_moe_ep.comm.launcher import World
from ds_moe_ep.doctor.links.outcome import LinksOutcome, LinkTrial
from ds_moe_ep.doctor.links.verdicts import judge_links
from tests.doctor.machines import named
from tests.ranks import _fork_server

PATIENCE_S = 6.0


def live(
    rank: int, size: int, port: int, fault: str, start_s: float, pipe: Any, patience_s: float = PATIENCE_S
) -> None:
    """The life of one rank; `fault` is what it does instead of following in a pair."""
    from ds_moe_ep.doctor.links import ranks as link_ranks

    faults = {"dies": lambda *_: os._exit(9), "raises": lambda *_: 1 / 0, "hangs": lambda *_: time.sleep(1000)}
    if fault in faults:
        link_ranks._follow = faults[fault]  # type: ignore[assignment]
    world = World(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        address="127.0.0.1",
        port=port,
        serves_store=rank == 0,
        wants_gpu=False,
    )
    everyone = (tuple(range(size)),)
    trial = LinkTrial(groups=everyone, node_size=0, seconds=0.5, start_s=start_s, patience_s=patience_s)
    pipe.send(link_ranks.try_links(world, trial))
    os._exit(0)


def outcome_of(
    faults: Mapping[int, str], size: int, start_s: float = 60.0, patience_s: float = PATIENCE_S
) -> LinksOutcome:
    """Knowledge of rank 0 at the end of a world of `size`, in which only the ranks of `faults` are started."""
    context, port = _fork_server(), free_port()
    here, there = context.Pipe()
    unheard = context.Pipe()[1]
    processes = [
        context.Process(
            target=live,
            args=(rank, size, port, fault, start_s, there if rank == 0 else unheard, patience_s),
            daemon=True,
        )
        for rank, fault in faults.items()
    ]
    try:
        for process in processes:
            process.start()
        assert here.poll(200), "rank 0 gave no outcome"
        known: LinksOutcome = here.recv()
        return known
    finally:
        for process in processes:
            process.kill()
            process.join()


def transfers(outcome: LinksOutcome) -> str:
    return named(judge_links(outcome, [range(outcome.world_size)], 0), "transfers").found


def test_all_pairs_of_three_ranks_are_measured() -> None:
    outcome = outcome_of(dict.fromkeys(range(3), "none"), 3, patience_s=90.0)  # where all is well nobody waits for it
    assert (outcome.backend, outcome.missing, outcome.silent, outcome.stuck) == ("gloo", [], (), False)
    assert outcome.failed == {}
    assert [(link.low, link.high) for link in outcome.links] == [(0, 1), (0, 2), (1, 2)]
    assert all(1 < link.latency_us < 1e6 and 1e-4 < link.gb_per_s < 1e3 for link in outcome.links)
    assert outcome.up[1].versions["torch"]


def test_a_rank_that_does_not_come_up_is_known_in_bounded_time() -> None:
    for _ in range(4):  # a busy machine may let it wait for a processor, too
        outcome = outcome_of({0: "none"}, 2, start_s=3.0)
        assert outcome.missing == [1]
        assert outcome.waited_s >= 3.0
        if outcome.waited_s < 10.0:
            break
    assert outcome.waited_s < 10.0


def test_a_rank_that_dies_in_a_transfer_is_named() -> None:
    outcome = outcome_of({0: "none", 1: "dies"}, 2)
    assert outcome.silent == (1,)
    assert transfers(outcome).startswith("rank 1 ended or stopped without a word; rank 0 failed:")


def test_a_rank_that_raises_in_a_transfer_is_named_with_its_error() -> None:
    outcome = outcome_of({0: "none", 1: "raises"}, 2)
    assert transfers(outcome) == "rank 1 failed: ZeroDivisionError: division by zero"


def test_a_pair_that_hangs_is_named_in_bounded_time() -> None:
    start = time.monotonic()
    outcome = outcome_of({0: "none", 1: "hangs"}, 2)
    assert time.monotonic() - start < 100
    assert 1 in outcome.silent
    assert outcome.hung == (0, 1)
    assert "rank 1 ended or stopped" in transfers(outcome) or "between ranks 0 and 1" in transfers(outcome)


def test_a_world_without_rank_0_ends_for_the_others_too() -> None:
    context, port = _fork_server(), free_port()
    here, there = context.Pipe()
    process = context.Process(target=live, args=(1, 2, port, "none", 2.0, there), daemon=True)
    process.start()
    try:
        assert here.poll(100), "rank 1 waits for ever"
        outcome = here.recv()
    finally:
        process.kill()
        process.join()
    assert list(outcome.failed) == [1]
    assert outcome.missing == [0, 1]
