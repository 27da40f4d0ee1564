"""The recorder stamps ends that the host would miss, and hands errors to whoever waits."""

from __future__ import annotations

import time

import pytest

from ds_moe_ep.recorder import HostRecorder, Off
from ds_moe_ep.timeline import overlap


class Sleep:
    """A transfer that takes a while on its own."""

    def __init__(self, seconds: float) -> None:
        self.end_s = time.perf_counter() + seconds

    def wait(self) -> None:
        time.sleep(max(0.0, self.end_s - time.perf_counter()))


class Broken:
    def wait(self) -> None:
        raise ConnectionError("peer 3 has gone")


def test_a_transfer_under_compute_is_hidden_and_a_blocking_one_is_not() -> None:
    recorder = HostRecorder(rank=0)
    with recorder.scope("dispatch", "dispatch 0") as scope:
        hidden = scope.follow(Sleep(0.02))
    with recorder.scope("compute", "compute 0"):
        time.sleep(0.08)
    hidden.wait()
    assert (overlap(recorder.spans()).hidden_percent or 0) > 90
    with recorder.scope("dispatch", "dispatch 0") as scope:
        scope.follow(Sleep(0.02)).wait()
    with recorder.scope("compute", "compute 0"):
        time.sleep(0.02)
    blocking = overlap(recorder.spans())
    assert blocking.hidden_percent is not None and blocking.hidden_percent < 10
    assert recorder.spans() == []


def test_the_error_of_a_watched_transfer_reaches_the_waiter() -> None:
    with HostRecorder(rank=0).scope("combine", "combine 2") as scope:
        work = scope.follow(Broken())
    with pytest.raises(ConnectionError, match="peer 3"):
        work.wait()


def test_off_records_nothing_and_changes_nothing() -> None:
    work = Sleep(0)
    with Off().scope("dispatch", "dispatch 0") as scope:
        assert scope.follow(work) is work
    assert Off().spans() == []
