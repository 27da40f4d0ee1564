"""Diagnoses from signs of life: pure functions of what one rank has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ds_moe_ep.errors import EngineError, PeerError
from ds_moe_ep.health.diagnosis import View, explain, failed_ranks, is_deadlocked, ranks_named, slow_step, unhealthy
from ds_moe_ep.health.heartbeat import Fault, Heartbeat, Identity, Place, fault_of
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.store import Seen
from ds_moe_ep.schedule.spans import Tags

PLACE = "layers.1.moe: forward dispatch"


def heartbeat(rank: int, **words: Any) -> Heartbeat:
    return Heartbeat(rank, Identity(f"n{rank // 2}", "", 100 + rank, 0), **({"place": PLACE} | words))


def view(
    *signs: Heartbeat, silent: dict[int, float] | None = None, statuses: dict[int, ProcessStatus] | None = None
) -> View:
    """Rank 0's of these signs."""
    seen = {s.rank: Seen(s, 100.0 - (silent or {}).get(s.rank, 0.0), 100.0) for s in signs}
    return View(0, seen, statuses or {}, 0.0, 3.0)


FAULT = Fault("ValueError", "bad luck", "layers.1.moe: backward pass", at_s=5.0)


def test_signs_survive_the_store() -> None:
    for one in (heartbeat(3, waits_for=(1, 2), fault=FAULT, step=7, has_left=True), heartbeat(0)):
        assert Heartbeat.unpack(one.pack()) == one


def test_a_rank_that_is_gone_stopped_or_silent_is_named_with_pid_host_and_last_place() -> None:
    seen = view(*map(heartbeat, range(4)), silent={3: 6.0}, statuses={1: ProcessStatus.GONE, 2: ProcessStatus.STOPPED})
    assert explain(seen, [1]) == (
        "rank 1 (pid 101 on n0) is gone, last seen in layers.1.moe: forward dispatch; "
        "rank 2 (pid 102 on n1) is stopped, last seen in layers.1.moe: forward dispatch; "
        "rank 3 (pid 103 on n1) has given no sign of life for 6 s, last seen in layers.1.moe: forward dispatch"
    )


def test_the_cause_is_named_and_not_the_neighbour_that_failed_for_it() -> None:
    echo = replace(FAULT, type_name="PeerError", text="rank 2 did not answer", is_secondary=True, at_s=1.0)
    seen = view(
        heartbeat(0),
        heartbeat(1, fault=echo),
        heartbeat(2, fault=FAULT),
        statuses={1: ProcessStatus.GONE, 2: ProcessStatus.GONE},
    )
    assert explain(seen, [1]) == "first error: rank 2: ValueError: bad luck (in layers.1.moe: backward pass)"


def test_the_culprits_are_those_in_trouble_and_those_that_failed_by_themselves() -> None:
    echo = replace(FAULT, is_secondary=True)
    seen = view(
        heartbeat(1),
        heartbeat(2, fault=FAULT),
        heartbeat(3, fault=echo),
        heartbeat(4),
        statuses={4: ProcessStatus.STOPPED},
    )
    assert failed_ranks(seen, [1, 2, 3, 4]) == [2, 4] and failed_ranks(seen, [1, 3]) == []


def test_the_first_of_several_faults_is_named() -> None:
    later = replace(FAULT, text="later", at_s=6.0)
    assert "first error: rank 2: ValueError: bad luck" in explain(
        view(heartbeat(1, fault=later), heartbeat(2, fault=FAULT)), [1]
    )


def test_an_echo_is_better_than_nothing() -> None:
    echo = replace(FAULT, text="rank 9 did not answer", is_secondary=True)
    assert "first error: rank 1: ValueError: rank 9 did not answer" in explain(view(heartbeat(1, fault=echo)), [1])


def test_where_all_live_the_suspects_whereabouts_are_told() -> None:
    elsewhere = replace(heartbeat(2), place="layers.0.moe: backward combine", waits_for=(0,))
    assert explain(view(heartbeat(1), elsewhere, heartbeat(3)), [1, 2, 3]) == (
        "ranks 1, 3 are in layers.1.moe: forward dispatch; "
        "rank 2 is in layers.0.moe: backward combine, waiting for rank 0"
    )


def test_a_store_that_does_not_answer_is_told_with_the_rank_that_serves_it() -> None:
    seen = replace(view(heartbeat(1, serves_store=True)), store_silent_s=9.0)
    assert explain(seen, [1]) == "the ranks' store, on rank 1 (pid 101 on n0), does not answer"


def test_a_goodbye_is_no_trouble_of_a_rank_that_lives_but_names_one_that_ended_early() -> None:
    assert unhealthy(view(heartbeat(1))) == {}
    assert unhealthy(view(heartbeat(1, has_left=True)))[1].startswith("rank 1 (pid 101 on n0) has ended, last seen")


def test_many_ranks_in_trouble_are_counted() -> None:
    seen = view(*map(heartbeat, range(16)), statuses=dict.fromkeys(range(1, 16), ProcessStatus.GONE))
    assert explain(seen, [3]).endswith("; 11 more ranks are in trouble")


def test_of_many_ranks_in_trouble_the_first_to_fall_silent_are_named() -> None:
    silent = {**dict.fromkeys(range(1, 8), 0.3), 6: 0.8}
    seen = view(*map(heartbeat, range(8)), silent=silent, statuses=dict.fromkeys(silent, ProcessStatus.GONE))
    assert "rank 6 (pid 106" in explain(seen, [1]) and "rank 5" not in explain(seen, [1])


def test_the_line_about_a_slow_step_groups_the_ranks_by_place() -> None:
    waiting = [replace(heartbeat(rank), waits_for=(3,)) for rank in (0, 1, 2, 4, 5)]
    seen = view(*waiting[1:], heartbeat(3), statuses={3: ProcessStatus.STOPPED})
    assert slow_step(seen, replace(waiting[0], step=412), 31.0, 3.1) == (
        "step 412 has taken 31.0 s, 10 times the median of 3.1 s: ranks 0-2, 4, 5 are in layers.1.moe: forward "
        "dispatch, waiting for rank 3; rank 3 (pid 103 on n1) is stopped, last seen in layers.1.moe: forward dispatch"
    )


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([2, 1, 0, 4], "ranks 0-2, 4"), ([1, 2], "ranks 1, 2"), ([0, 2, 3, 4, 5], "ranks 0, 2-5")],
)
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    assert ranks_named(ranks) == text


def test_places_and_faults_read_as_text() -> None:
    assert str(Place(Tags("layers.3", "backward", "far"), "combine", 0.0)) == "layers.3: backward combine"
    assert str(Place(Tags(), "dispatch", 0.0)) == "MoE layer: dispatch"
    assert str(fault_of(ValueError("one\ntwo"), "a pass")) == "ValueError: one (in a pass)"
    assert fault_of(ValueError("x" * 1000), "").text == "x" * 400 + "..."
    assert str(fault_of(KeyError(), "")) == "KeyError: no message"


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (PeerError("rank 3 did not answer"), True),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:5525"), True),  # of DeepSpeed's all-reduce
        (RuntimeError("CUDA error"), False),
        (ValueError("Connection closed by peer"), False),
        (BrokenPipeError(32, "Broken pipe"), False),  # of a data loader's, say
        (EngineError("layers.1.moe: rank 3 refused its input: its own error says why"), True),
    ],
)
def test_an_error_of_somebody_elses_collective_is_an_echo_too(error: Exception, echo: bool) -> None:
    assert fault_of(error, "").is_secondary is echo


def waiting(rank: int, place: str, blocked_s: float) -> Heartbeat:
    return heartbeat(rank, place=place, blocked_s=blocked_s)


@pytest.mark.parametrize(
    ("own", "others", "is_so"),
    [
        (("all_reduce", 9.0), [("barrier", 8.0), ("all_reduce", 8.0)], True),
        (("all_reduce", 9.0), [("all_reduce", 9.0), ("all_reduce", 8.0)], False),  # a collective that is slow
        (("all_reduce", 9.0), [("barrier", 8.0), ("compute", 0.0)], False),  # who computes may come
        (("all_reduce", 9.0), [("barrier", 8.0), ("backward combine", 2.0)], False),  # who has just moved, too
    ],
)
def test_only_ranks_that_all_wait_and_in_different_places_are_deadlocked(
    own: tuple[str, float], others: list[tuple[str, float]], is_so: bool
) -> None:
    signs = [waiting(rank, *words) for rank, words in enumerate(others, start=1)]
    assert is_deadlocked(view(*signs), waiting(0, *own), 3.0) is is_so
    left = replace(waiting(9, "compute", 0.0), has_left=True)
    assert is_deadlocked(view(*signs, left), waiting(0, *own), 3.0) is is_so
