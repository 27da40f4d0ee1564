"""Waiting: with a limit on the host that counts from the start, without one on CUDA, where it would make NCCL poll."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch

from ds_moe_ep.comm import group_transport
from ds_moe_ep.comm.group_transport import Bytes, GroupTransport
from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.pairwise import Works
from ds_moe_ep.comm.transport import Loopback, Message
from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.watch import Unwatched
from ds_moe_ep.schedule.spans import Tags
from tests.planted_clock import PlantedClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> PlantedClock:
    """The clock of transports."""
    planted = PlantedClock()
    monkeypatch.setattr(group_transport, "time", planted)
    return planted


class FakeWork:
    def __init__(self, error: Exception | None = None, takes_s: float = 0.0, clock: PlantedClock | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error, self.takes_s, self.clock = error, takes_s, clock

    def wait(self, *limit: Any) -> None:
        self.calls.append(limit)
        if self.clock is not None:
            self.clock.now_s += self.takes_s
        if self.error:
            raise self.error


class CudaRows:
    """Rows that say that they are on a GPU."""

    is_cuda, shape = True, (4, 2)

    def element_size(self) -> int:
        return 4


class Watching(Unwatched):
    """A watch that knows of trouble with some ranks."""

    def __init__(self, *failed_ranks: int) -> None:
        self.known = list(failed_ranks)

    def failed_ranks(self, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in self.known if rank in ranks]

    def knows_failure(self) -> bool:
        return bool(self.known)


def transport(timeout_s: float = 5.0, ranks: tuple[int, ...] = (4, 7), *failed_ranks: int) -> GroupTransport:
    """Rank 4 of the world, the first of a group of two."""
    return GroupTransport(LaneGroups(0, ranks, {}, AbortGuard(0, ranks, ()), Watching(*failed_ranks)), timeout_s)


def failure(over: GroupTransport, owed: Bytes, error: str = "reset", waited_s: float = 0.0) -> PeerError:
    place = over.begin(Tags("layers.2.moe", "forward"), "dispatch")
    return over.failure(replace(place, since_s=place.since_s - waited_s), RuntimeError(error), owed)


def works(over: GroupTransport, rows_RD: Any, *each: FakeWork) -> Works:
    place = over.begin(Tags("layers.2.moe", "forward"), "dispatch")
    receives = [Message(1, rows_RD, 0, 3) for _ in each]
    return Works(over, place, each, receives, [], is_on_host=not rows_RD.is_cuda)  # type: ignore[arg-type]


def test_the_limit_counts_from_the_start_of_the_transfer_and_not_from_each_wait(clock: PlantedClock) -> None:
    slow, next_one = FakeWork(takes_s=0.5, clock=clock), FakeWork()
    works(transport(), torch.zeros(4, 2), slow, next_one).wait()
    assert [each.calls for each in (slow, next_one)] == [[(timedelta(seconds=5),)], [(timedelta(seconds=4.5),)]]


def test_rows_on_cuda_are_waited_for_without_a_limit() -> None:
    work = FakeWork()
    works(transport(), CudaRows(), work).wait()
    assert work.calls == [()]


def test_a_failed_wait_names_layer_pass_peer_bytes_and_the_limit() -> None:
    over = transport()
    with pytest.raises(PeerError) as caught:
        works(over, torch.zeros(4, 2), FakeWork(RuntimeError("[a/b.cc:12] reset by peer. Long story"))).wait()
    assert str(caught.value) == (
        "layers.2.moe: forward dispatch: rank 7 did not answer rank 4: reset by peer "
        "(24 bytes expected, 0 bytes to send)"
    )


def test_a_late_peer_is_told_from_one_that_broke(clock: PlantedClock) -> None:
    with pytest.raises(PeerError, match=r"rank 7 did not answer rank 4 within 0\.1 s \(24 bytes expected"):
        works(transport(0.1), torch.zeros(4, 2), FakeWork(RuntimeError("Timed out"), 0.1, clock)).wait()


def test_after_a_failure_no_op_starts_and_the_error_names_the_first_failure() -> None:
    over = transport()
    with pytest.raises(PeerError):
        works(over, torch.zeros(4, 2), FakeWork(RuntimeError("reset"))).wait()
    with pytest.raises(
        PeerError, match=r"layers\.0: forward combine: the lanes of ranks 4, 7 are closed.*2\.moe.*reset"
    ):
        over.begin(Tags("layers.0", "forward"), "combine")


@pytest.mark.parametrize(
    ("is_joint", "failed_ranks", "named"),
    [
        (False, (), "ranks 7, 9 did not"),
        (False, (9,), "ranks 7, 9 did not"),
        (True, (), "one of ranks 7, 9 did"),
        (True, (9,), "rank 9 did"),
    ],
)
def test_a_joint_transfer_names_the_culprit_or_says_that_it_was_one_of_them(
    is_joint: bool, failed_ranks: tuple[int, ...], named: str
) -> None:
    error = failure(transport(5.0, (4, 7, 9), *failed_ranks), Bytes((1, 2), 8, 8, is_joint))
    assert str(error).startswith(f"layers.2.moe: forward dispatch: {named} ")


def test_a_peer_that_is_late_while_nobody_is_in_trouble_is_no_echo_of_another_failure() -> None:
    owed = Bytes((1,), 8, 8)
    assert failure(transport(), owed).is_secondary, "it broke: its own error says why"
    assert not failure(transport(), owed, waited_s=9.0).is_secondary
    assert failure(transport(5.0, (4, 7), 3), owed, waited_s=9.0).is_secondary, "another rank is in trouble"
    over = transport()
    place = over.begin(Tags(), "dispatch")
    late = replace(place, since_s=place.since_s - 9.0)
    assert not over.failure(late, RuntimeError("Timed out"), owed).is_secondary
    assert over.failure(late, RuntimeError("Timed out"), owed).is_secondary, "the lanes had failed before"


def test_of_a_communicators_error_the_first_sentence_is_told_at_most_two_hundred_letters_of_it() -> None:
    text = str(failure(transport(), Bytes((1,), 8, 8), "[a/b.cc:12] " + 300 * "z"))
    assert text.count("z") == 200


def test_a_group_of_one_is_rank_zero_of_itself() -> None:
    alone = Loopback()
    assert (alone.rank, alone.size, tuple(alone.ranks)) == (0, 1, (0,))
