"""Base of the transports over process groups: the small collectives, time limits, and the errors of failed waits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.transport import Answer, Message
from ds_moe_ep.errors import PeerError
from ds_moe_ep.health.diagnosis import ranks_named
from ds_moe_ep.health.heartbeat import Place
from ds_moe_ep.schedule.spans import NO_TAGS, Tags

SHORT = timedelta(milliseconds=1)
CLOCK_S = 0.05  # by how much a wait may end before its limit


@dataclass(frozen=True)
class Bytes:
    """Bytes that a transfer still owes, for an error."""

    peers: Sequence[int]  # in the group
    expected: int
    to_send: int
    is_joint: bool = False  # all of the group move at once, and each waits for every other

    @classmethod
    def of(cls, receives: Sequence[Message], sends: Sequence[Message]) -> Bytes:
        peers = sorted({message.peer for message in (*sends, *receives)})
        return cls(peers, sum(m.num_bytes for m in receives), sum(m.num_bytes for m in sends))

    def __str__(self) -> str:
        return f"{self.expected:,} bytes expected, {self.to_send:,} bytes to send"


class GroupTransport:
    """A transport on the lanes of one group; how rows move is the subclass's."""

    def __init__(self, groups: LaneGroups, timeout_s: float) -> None:
        self.rank = groups.rank
        self.size = groups.size
        self.ranks: Sequence[int] = groups.ranks
        self.others = tuple(peer for peer in range(groups.size) if peer != groups.rank)
        self.ranks_of_others = self.members(self.others)
        self.watch = groups.watch
        self.groups = groups
        self.timeout_s = timeout_s

    def keep_own(self, sends: Sequence[Message], receives: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """Copies the rows that stay on this rank; returns the messages with rows that go to others, or come."""
        (staying, going), (kept, coming) = self._apart(sends), self._apart(receives)
        for sent, received in zip(staying, kept, strict=True):
            received.rows.copy_(sent.rows)
        return going, coming

    def _apart(self, messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """The rank's own messages, and those of others that have rows."""
        own, others, rank = list[Message](), list[Message](), self.rank
        for message in messages:
            if message.peer == rank:
                own.append(message)
            elif message.start < message.stop:
                others.append(message)
        return own, others

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        with self._joined(self.begin(tags, "exchange of counts"), counts_PC):
            return self.groups.exchange_counts(counts_PC)

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        place = self.begin(tags, "exchange of counts")
        with self._joined(place, told_C):
            finish = self.groups.consult(told_C, num_answered, answer)

        def wait() -> Tensor:
            with self._joined(place, told_C):
                return finish(partial(self.time_left, place))

        return wait

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        with self._joined(self.begin(tags, "sum over the group"), values):
            return self.groups.sum(values)

    @contextmanager
    def _joined(self, place: Place, values: Tensor) -> Iterator[None]:
        """A small collective of the whole group, which may wait for each of the others."""
        place.waits_for = self.ranks_of_others
        self.watch.enters(place)
        try:
            yield
        except RuntimeError as error:
            num_bytes = values.numel() * values.element_size()
            raise self.failure(place, error, Bytes(self.others, num_bytes, num_bytes, is_joint=True)) from error
        finally:
            self.watch.leaves()

    def abandon(self, error: BaseException, tags: Tags = NO_TAGS) -> None:
        place = str(Place(tags, "pass", 0.0))
        self.watch.report(error, place)
        self.groups.guard.end(f"{place} ended with {type(error).__name__}: {error}")

    def check_open(self, tags: Tags = NO_TAGS) -> None:
        self.begin(tags, "pass")

    def begin(self, tags: Tags, op: str) -> Place:
        """The place where this rank is from now on. Raises PeerError where the lanes are not in use any more."""
        place, failure = Place(tags, op, time.monotonic()), self.groups.guard.failure
        if failure is not None:
            raise PeerError(
                f"{place}: the lanes of {ranks_named(self.ranks)} are closed since the first failure on them, lest a "
                f"retry reads rows of the pass before: {failure}; start the job again from its last checkpoint"
            )
        return place

    def members(self, peers: Sequence[int]) -> list[int]:
        """Ranks of the group as ranks of the world."""
        return [self.ranks[peer] for peer in peers]

    def time_left(self, place: Place) -> timedelta:
        """The rest of an op's time limit; never nothing, which would be no limit to gloo."""
        return max(timedelta(seconds=place.since_s + self.timeout_s - time.monotonic()), SHORT)

    def failure(self, place: Place, error: RuntimeError, owed: Bytes) -> PeerError:
        """The error of a transfer that `error` ended, and the end of the lanes with it."""
        first = self.groups.guard.failure
        is_late = time.monotonic() - place.since_s > self.timeout_s - CLOCK_S
        what = f"did not answer rank {self.ranks[self.rank]}"
        if is_late:
            what += f" within {self.timeout_s:g} s"
        elif first is None:
            what += f": {_reason(error)}"
        why = first or self.watch.explain(self.members(owed.peers))
        text = f"{place}: {self._who(owed)} {what} ({owed})"
        text += f"; {why}" if why else ""
        failure = PeerError(text + (f"; moe_ep.timeout_s={self.timeout_s:g} sets the limit" if is_late else ""))
        failure.is_secondary = not is_late or first is not None or self.watch.knows_failure()
        self.watch.report(failure, str(place))
        self.groups.guard.end(text)
        return failure

    def _who(self, owed: Bytes) -> str:
        """The ranks that a transfer waits for; of those that move at once the ones that the watch knows to be amiss."""
        ranks = self.members(owed.peers)
        if not owed.is_joint or len(ranks) == 1:
            return ranks_named(ranks)
        known = self.watch.failed_ranks(ranks)
        return ranks_named(known) if known else f"one of {ranks_named(ranks)}"


def _reason(error: RuntimeError) -> str:
    """The first sentence of a communicator's error, without the place in its source."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0][:200]


def wait_for(work: dist.Work, limit: timedelta | None) -> None:
    """Waits for `work`, at most for the limit; on CUDA there is none, where waiting must order streams and no more."""
    if limit is None:
        work.wait()
    else:
        work.wait(limit)
