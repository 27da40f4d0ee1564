"""Seconds without the machine's load: waits count in full, whatever the machine does; waits for a processor do not."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tests import load_clock
from tests.load_clock import Stopwatch, Took, held_up_s, without_load

WAITS_S = 0.05


def test_what_held_one_rank_up_most_is_taken_off_the_longest_and_waits_for_each_other_are_not() -> None:
    assert without_load([Took(7.0, 0.5), Took(6.5, 1.5)]) == 5.5
    assert without_load([Took(7.0, 0.0), Took(6.5, 0.0)]) == 7.0


def test_the_system_tells_nanoseconds_of_a_main_thread_or_nothing_is_taken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_clock, "PROCESSES", tmp_path)
    own = tmp_path / "self"
    own.mkdir()
    (own / "schedstat").write_text("5000000000 250000000 17\n")
    watch = Stopwatch()
    (own / "schedstat").write_text("9000000000 1250000000 99\n")
    assert watch.read().held_up_s == 1.0
    assert held_up_s(7) == 0.0
    (own / "schedstat").write_text("")
    assert held_up_s() == 0.0


def burn(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    while True:
        pass


@pytest.mark.slow
@pytest.mark.skipif(held_up_s() == 0.0, reason="this system does not tell for how long a thread had no processor")
def test_a_wait_counts_in_full_on_a_busy_processor_and_a_wait_for_the_processor_does_not() -> None:
    """Others burn the one processor that this process may use: it is held up where it computes, not where it waits."""
    before = os.sched_getaffinity(0)
    core = {min(before)}
    burning = [multiprocessing.get_context("fork").Process(target=burn, args=(core,), daemon=True) for _ in range(2)]
    try:
        os.sched_setaffinity(0, core)
        for process in burning:
            process.start()
        waiting = Stopwatch()
        time.sleep(WAITS_S)
        waited = waiting.read()
        computing, end_s = Stopwatch(), time.thread_time() + WAITS_S
        while time.thread_time() < end_s:
            pass
        computed = computing.read()
    finally:
        os.sched_setaffinity(0, before)
        for process in burning:
            process.kill()
            process.join()
    # Of a wait only the moment between its end and the next run is taken off; the rest of both is the thread's own.
    assert without_load([waited]) >= WAITS_S - 0.001
    assert computed.seconds > without_load([computed]) >= WAITS_S - 0.001
