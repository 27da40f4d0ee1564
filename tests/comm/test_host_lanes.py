"""The lanes of the host: transfers in order on threads while the caller computes, errors that reach who waits."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from ds_moe_ep.comm.lanes import IN_FLIGHT, Event, HostLanes
from ds_moe_ep.comm.transport import Done
from ds_moe_ep.errors import EngineError

SOON_S = 10.0  # longest wait for what must happen
QUIET_S = 0.05  # how long to watch that something does not


class FakeTransfer:
    """A transfer that starts when its lane gets to it, and ends when the test says so."""

    def __init__(self, error: Exception | None = None, error_at_start: Exception | None = None) -> None:
        self.has_started, self.may_end = threading.Event(), threading.Event()
        self.num_waits = 0
        self._error, self._error_at_start = error, error_at_start

    def start(self) -> Event:
        self.has_started.set()
        if self._error_at_start:
            raise self._error_at_start
        return self

    def wait(self) -> None:
        assert self.may_end.wait(SOON_S)
        self.num_waits += 1
        if self._error:
            raise self._error

    def starts(self) -> bool:
        return self.has_started.wait(SOON_S)

    def stays_unstarted(self) -> bool:
        return not self.has_started.wait(QUIET_S)


def issue(lanes: HostLanes, lane: str, work: Callable[[], Event | None], after: Sequence[Event] = ()) -> Event:
    return lanes.issue(lane, after, work, nullcontext())


def is_passed(event: Event) -> bool:
    thread = threading.Thread(target=event.wait, daemon=True)
    thread.start()
    thread.join(QUIET_S)
    return not thread.is_alive()


def vanishes(reference: weakref.ref[Any]) -> bool:
    """True where the object goes once the lanes' threads have come to their next wait."""
    deadline_s = time.monotonic() + SOON_S
    while time.monotonic() < deadline_s:
        gc.collect()
        if reference() is None:
            return True
        time.sleep(QUIET_S / 10)
    return False


def end_all(transfers: Sequence[FakeTransfer]) -> None:
    for transfer in transfers:
        transfer.may_end.set()


def lane_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ds_moe_ep ")}


@pytest.fixture
def lanes() -> HostLanes:
    return HostLanes()


def test_a_lane_starts_transfers_in_issue_order_with_two_in_flight(lanes: HostLanes) -> None:
    transfers = [FakeTransfer() for _ in range(5)]
    order: list[int] = []

    def start(index: int) -> Event:
        order.append(index)
        return transfers[index].start()

    events = [issue(lanes, "dispatch", lambda index=index: start(index)) for index in range(5)]
    assert IN_FLIGHT == 2
    for ends in range(4):
        assert transfers[min(ends + 1, 4)].starts()
        assert ends + 2 > 4 or transfers[ends + 2].stays_unstarted()
        assert not is_passed(events[ends])
        transfers[ends].may_end.set()
        events[ends].wait()
    transfers[4].may_end.set()
    lanes.leave(events)
    assert order == [0, 1, 2, 3, 4]
    assert [transfer.num_waits for transfer in transfers] == [1] * 5


def test_a_later_transfer_that_ends_first_gives_no_place_away(lanes: HostLanes) -> None:
    transfers = [FakeTransfer() for _ in range(3)]
    events = [issue(lanes, "dispatch", transfer.start) for transfer in transfers]
    transfers[1].may_end.set()
    assert transfers[2].stays_unstarted()
    assert not is_passed(events[1])
    end_all(transfers)
    lanes.leave(events)


def test_the_caller_computes_while_a_transfer_is_under_way(lanes: HostLanes) -> None:
    transfer, computed_on = FakeTransfer(), []
    event = issue(lanes, "dispatch", transfer.start)
    assert transfer.starts()
    issue(lanes, "compute", lambda: computed_on.append(threading.current_thread()))
    assert computed_on == [threading.current_thread()]
    assert not is_passed(event)
    transfer.may_end.set()
    lanes.leave([event])


def test_a_full_lane_holds_neither_the_other_lane_nor_the_caller(lanes: HostLanes) -> None:
    full, other = [FakeTransfer() for _ in range(6)], FakeTransfer()
    events = [issue(lanes, "dispatch", transfer.start) for transfer in full]
    other.may_end.set()
    issue(lanes, "combine", other.start).wait()
    end_all(full)
    lanes.leave(events)


@pytest.mark.parametrize("lane", ["compute", "combine"])
def test_an_op_begins_behind_the_marks_that_it_is_given(lanes: HostLanes, lane: str) -> None:
    transfer, has_begun = FakeTransfer(), threading.Event()
    behind = issue(lanes, "dispatch", transfer.start)

    def begin() -> Event:
        assert transfer.num_waits == 1
        has_begun.set()
        return Done()

    threading.Timer(QUIET_S, transfer.may_end.set).start()
    event = issue(lanes, lane, begin, [lanes.entry(), behind])
    event.wait()
    assert has_begun.is_set()


def test_blocking_lanes_finish_every_op_where_it_is_issued() -> None:
    blocking, transfer = HostLanes().blocking(), FakeTransfer()
    threads = lane_threads()
    transfer.may_end.set()
    blocking.issue("dispatch", [blocking.entry()], transfer.start, nullcontext())
    assert transfer.num_waits == 1
    assert lane_threads() <= threads
    assert blocking.blocking() is blocking


def test_a_scope_is_open_from_the_start_of_a_transfer_to_its_end(lanes: HostLanes) -> None:
    transfer, events = FakeTransfer(), []

    @contextmanager
    def scope() -> Iterator[None]:
        events.append(("open", transfer.has_started.is_set()))
        yield
        events.append(("close", transfer.num_waits == 1))

    event = lanes.issue("dispatch", (), transfer.start, scope())
    assert transfer.starts()
    assert events == [("open", False)]
    transfer.may_end.set()
    event.wait()
    assert events == [("open", False), ("close", True)]


@pytest.mark.parametrize("where", ["start", "wait"])
def test_an_error_reaches_every_op_that_waits_for_it_and_the_caller(lanes: HostLanes, where: str) -> None:
    error, started = EngineError("a peer ended"), []
    failing = FakeTransfer(error) if where == "wait" else FakeTransfer(error_at_start=error)
    failing.may_end.set()
    event = issue(lanes, "dispatch", failing.start)
    behind = issue(lanes, "combine", lambda: started.append("combine"), [event])
    for call in (
        event.wait,
        behind.wait,
        lambda: lanes.leave([event]),
        lambda: issue(lanes, "compute", lambda: started.append("compute"), [event]),
    ):
        with pytest.raises(EngineError) as found:
            call()
        assert found.value is error
    assert started == []


@pytest.mark.parametrize("other", ["dispatch", "combine"])
def test_what_is_issued_behind_a_failed_transfer_never_starts_and_raises_its_error(
    lanes: HostLanes, other: str
) -> None:
    """Started, it would meet the transfer before on the peers."""
    error, behind = EngineError("no rows"), FakeTransfer()
    failed = issue(lanes, "dispatch", FakeTransfer(error_at_start=error).start)
    with pytest.raises(EngineError):
        failed.wait()
    late = issue(lanes, other, behind.start)
    with pytest.raises(EngineError) as found:
        late.wait()
    assert found.value is error and not behind.has_started.is_set()


def test_the_next_pass_runs_after_an_error(lanes: HostLanes) -> None:
    failing, fine = FakeTransfer(EngineError("a peer ended")), [FakeTransfer() for _ in range(2 * IN_FLIGHT)]
    end_all([failing, *fine])
    failed = issue(lanes, "dispatch", failing.start)
    lanes.entry()
    events = [issue(lanes, "dispatch", transfer.start) for transfer in fine]
    lanes.leave(events)
    assert [transfer.num_waits for transfer in fine] == [1] * len(fine)
    with pytest.raises(EngineError):
        failed.wait()


def test_an_abandoned_pass_starts_nothing_more_and_the_next_pass_runs(lanes: HostLanes) -> None:
    under_way, queued, later = ([FakeTransfer() for _ in range(n)] for n in (IN_FLIGHT, 3, 2))
    for transfer in [*under_way, *queued]:
        issue(lanes, "dispatch", transfer.start)
    assert all(transfer.starts() for transfer in under_way)
    lanes.abandon(())
    events = [issue(lanes, "dispatch", transfer.start) for transfer in later]
    end_all([*under_way, *queued, *later])
    lanes.leave(events)
    assert [transfer.num_waits for transfer in under_way] == [1] * IN_FLIGHT
    assert not any(transfer.has_started.is_set() for transfer in queued)


def test_an_op_that_waited_when_its_pass_was_abandoned_is_not_started(lanes: HostLanes) -> None:
    first, behind = FakeTransfer(), FakeTransfer()
    event = issue(lanes, "dispatch", first.start)
    late = issue(lanes, "combine", behind.start, [event])
    assert first.starts()
    assert behind.stays_unstarted()  # the lane's thread has taken it, and waits for the event
    lanes.abandon(())
    end_all([first, behind])
    late.wait()
    assert not behind.has_started.is_set()


def test_threads_end_with_their_lanes() -> None:
    before = lane_threads()
    lanes = HostLanes()
    for lane in ("dispatch", "combine"):
        lanes.leave([issue(lanes, lane, Done) for _ in range(3)])
    threads = lane_threads() - before
    assert len(threads) == 4
    gone = weakref.ref(lanes)
    del lanes
    assert vanishes(gone), "a thread holds its lanes"
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()


def test_threads_start_with_the_first_transfer() -> None:
    before = lane_threads()
    lanes = HostLanes()
    issue(lanes, "compute", lambda: None)
    assert lane_threads() <= before
    issue(lanes, "dispatch", Done).wait()
    assert len(lane_threads() - before) == 2


def test_a_copy_has_lanes_of_its_own(lanes: HostLanes) -> None:
    stuck, free = FakeTransfer(), FakeTransfer()
    event = issue(lanes, "dispatch", stuck.start)
    copied = copy.deepcopy(lanes)
    assert isinstance(copied, HostLanes)
    copied.abandon(())  # the pass of the original is not meant
    free.may_end.set()
    issue(copied, "dispatch", free.start).wait()
    stuck.may_end.set()
    event.wait()
    assert stuck.num_waits == 1


class Rows:
    """Stands for the tensors of a pass."""


@pytest.mark.parametrize("outcome", ["done", "fails to start", "fails", "dropped"])
def test_what_an_op_holds_is_released_once_it_is_done(lanes: HostLanes, outcome: str) -> None:
    rows = Rows()
    error = EngineError("a peer ended")
    transfer = FakeTransfer(
        error=error if outcome == "fails" else None, error_at_start=error if outcome == "fails to start" else None
    )
    transfer.may_end.set()
    blocker = FakeTransfer()
    behind = issue(lanes, "combine", blocker.start)

    def work(held: Rows = rows, start: Callable[[], Event] = transfer.start) -> Event:
        return start()

    event = issue(lanes, "dispatch", work, [behind])
    if outcome == "dropped":
        lanes.abandon(())
    blocker.may_end.set()
    try:
        event.wait()
        assert outcome in ("done", "dropped")
    except EngineError:
        assert outcome.startswith("fails")
    released = weakref.ref(rows)
    del error, transfer, work, rows
    if outcome.startswith("fails"):
        del event  # it carries the error, whose traceback has the frames of the work
    assert vanishes(released)


def caller_modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_transfer_runs_in_the_grad_mode_of_the_caller(lanes: HostLanes, mode: Callable[[], object]) -> None:
    found = []

    class Asks(FakeTransfer):
        def wait(self) -> None:
            found.append(caller_modes())

    def start() -> Event:
        found.append(caller_modes())
        return Asks()

    with mode():  # type: ignore[attr-defined]
        expected = caller_modes()
        issue(lanes, "dispatch", start).wait()
    assert found == [expected, expected]
