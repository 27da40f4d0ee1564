"""Causes that the watch tells where several ranks fail at once: those of the ranks that somebody waits for.

Looks at the store are planted one after the other, and the clock moves with them: no process, no real time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ds_moe_ep.health import watch as watch_module
from ds_moe_ep.health.diagnosis import View, explain
from ds_moe_ep.health.processes import ProcessStatus
from ds_moe_ep.health.watch import PATIENCE_S, RankWatch
from tests.health.test_diagnosis import FAULT, heartbeat, view
from tests.planted_clock import PlantedClock

SUSPECT, OTHER = 1, 3  # the rank that is waited for, and one of another group
GONE = ProcessStatus.GONE


class PlantedLooks:
    """A rank's state whose looks are given: each new look shows the next view, and the last one stays."""

    def __init__(self, looks: Sequence[View]) -> None:
        self._looks, self.num_asked = looks, 0
        self.heartbeats = SimpleNamespace(interval_s=0.5, ask=self._ask)

    def _ask(self, timeout_s: float) -> bool:
        self.num_asked += 1
        return True

    def view(self) -> View:
        return self._looks[min(max(self.num_asked - 1, 0), len(self._looks) - 1)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> PlantedClock:
    planted = PlantedClock()
    monkeypatch.setattr(watch_module, "time", planted)
    return planted


def told(looks: Sequence[View], suspects: Sequence[int] = (SUSPECT,)) -> tuple[str, int]:
    """The explanation of a rank that sees these looks, and how many of them it took."""
    watch: Any = object.__new__(RankWatch)
    watch._state = PlantedLooks(looks)
    return watch.explain(suspects), watch._state.num_asked


def look(beat: int = 0, statuses: dict[int, ProcessStatus] | None = None, **words: Any) -> View:
    """Rank 0's view of ranks 1 to 3; the suspect's heartbeat has that number and these words."""
    return view(heartbeat(SUSPECT, beat=beat, **words), heartbeat(2), heartbeat(OTHER), statuses=statuses)


def test_a_rank_that_died_in_another_group_is_no_cause_before_the_suspects_own_end_is_seen(clock: PlantedClock) -> None:
    """A killed process has closed its connections and is not gone yet, when another one's end is seen already."""
    text, num_looks = told([look(statuses={OTHER: GONE})] * 3 + [look(statuses={OTHER: GONE, SUSPECT: GONE})])
    assert f"rank {SUSPECT} (pid 101 on n0) is gone" in text and f"rank {OTHER} (pid 103 on n1) is gone" in text
    assert num_looks == 4


def test_the_same_look_alone_names_only_the_other_rank() -> None:
    """The control: an explanation at the first look would blame a stranger."""
    assert f"rank {SUSPECT} " not in explain(look(statuses={OTHER: GONE}), [SUSPECT])


def test_a_suspect_that_lives_waits_for_the_other_rank_which_is_told_as_soon_as_it_shows_life(
    clock: PlantedClock,
) -> None:
    text, num_looks = told([look(beat, {OTHER: GONE}) for beat in (5, 5, 6)])
    assert text == "rank 3 (pid 103 on n1) is gone, last seen in layers.1.moe: forward dispatch"
    assert num_looks == 3


def test_a_suspect_that_lives_is_told_with_its_place_at_the_second_look_that_shows_life(clock: PlantedClock) -> None:
    text, num_looks = told([look(beat) for beat in (5, 5, 6)])
    assert text == "rank 1 is in layers.1.moe: forward dispatch" and num_looks == 3
    assert clock.now_s < 0.5


def test_a_suspect_elsewhere_is_told_once_it_is_silent_for_three_seconds(clock: PlantedClock) -> None:
    silent = [view(heartbeat(SUSPECT), silent={SUSPECT: seconds}) for seconds in (1.0, 2.9, 3.1, 9.0)]
    text, num_looks = told(silent)
    assert text.startswith("rank 1 (pid 101 on n0) has given no sign of life for 3 s") and num_looks == 3


def test_a_suspect_that_failed_for_another_rank_has_said_so_and_nobody_waits_for_more(clock: PlantedClock) -> None:
    echo = replace(FAULT, is_secondary=True, text="rank 3 did not answer")
    text, num_looks = told([look(fault=echo, statuses={OTHER: GONE})])
    assert text.startswith("rank 3 (pid 103 on n1) is gone") and num_looks == 1


def test_a_suspect_of_which_nothing_is_ever_seen_is_waited_for_no_longer_than_five_seconds(clock: PlantedClock) -> None:
    text, _ = told([look(statuses={OTHER: GONE})])
    assert text.startswith("rank 3 (pid 103 on n1) is gone")
    assert PATIENCE_S <= clock.now_s < PATIENCE_S + 0.2


def test_one_of_several_suspects_that_is_gone_is_enough(clock: PlantedClock) -> None:
    text, num_looks = told([look(statuses={SUSPECT: GONE})], (SUSPECT, 2, OTHER))
    assert text.startswith(f"rank {SUSPECT} (pid 101 on n0) is gone") and num_looks == 1


def test_a_suspects_own_error_is_told_behind_an_earlier_one_of_another_group(clock: PlantedClock) -> None:
    own = replace(FAULT, text="its own", at_s=FAULT.at_s + 1)
    first = view(heartbeat(SUSPECT), heartbeat(OTHER, fault=FAULT))
    text, num_looks = told([first, view(heartbeat(SUSPECT, fault=own), heartbeat(OTHER, fault=FAULT))])
    assert text == (
        "first error: rank 3: ValueError: bad luck (in layers.1.moe: backward pass); "
        "rank 1 failed too: ValueError: its own (in layers.1.moe: backward pass)"
    )
    assert num_looks == 2


def test_of_many_ranks_in_trouble_the_suspect_and_the_first_to_fall_silent_are_named() -> None:
    silent = {rank: 10.0 - rank for rank in range(1, 9)}
    seen = view(*map(heartbeat, range(9)), silent=silent, statuses=dict.fromkeys(silent, GONE))
    text = explain(seen, [8])
    assert "rank 1 (pid 101" in text and "rank 8 (pid 108" in text and "rank 4 (pid" not in text
    assert text.endswith("; 4 more ranks are in trouble")
    assert "rank 8 (pid" not in explain(seen, [])
