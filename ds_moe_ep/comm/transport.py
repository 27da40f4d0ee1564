"""Interface between the executor of schedules and whatever moves rows.

A transport belongs to one expert-parallel group. It has two lanes, "dispatch" and "combine", each a communicator of
its own, so that results go back while rows still come. Small collectives have a third one: what a rank tells before its
rows move meets what the others tell, and never their rows. A transfer is started with all its messages and waited for
exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor

from ds_moe_ep.schedule.spans import NEAR_LANES as NEAR_LANES
from ds_moe_ep.schedule.spans import NO_TAGS, Tags

LANES = ("dispatch", "combine")
CONTROL = "control"  # the communicator of small collectives
REPLICAS = "replicas"  # that of the weights and gradients of replicated experts, where a layer has some

Answer = Callable[[Tensor], Tensor]  # told_PC of all ranks -> what each of them is answered, [P, A]


@dataclass(slots=True)
class Message:
    """Rows [n, D] for, or from, the rank `peer` of the group, which may be the own one: a span of a contiguous buffer.

    n may be 0. Not frozen: a pass makes a hundred of them, and setting frozen fields takes four times as long.
    """

    peer: int
    buffer_RD: Tensor
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> Tensor:
        """A view of the buffer."""
        return self.buffer_RD[self.start : self.stop]

    @property
    def num_bytes(self) -> int:
        return len(self) * self.buffer_RD.shape[1] * self.buffer_RD.element_size()


class Views:
    """The rows of a buffer between cuts: all of them by one operation, when the first are asked for."""

    __slots__ = ("_buffer_RD", "_lengths", "_parts")

    def __init__(self, buffer_RD: Tensor, lengths: Sequence[int]) -> None:
        self._buffer_RD, self._lengths = buffer_RD, lengths
        self._parts: Sequence[Tensor] | None = None

    @property
    def parts(self) -> Sequence[Tensor]:
        """The rows of each part."""
        if self._parts is None:
            self._parts = self._buffer_RD.split_with_sizes(self._lengths)
        return self._parts


class CutMessages(Sequence[Message]):
    """Messages of one buffer, by peer a span of it, whose rows are `views` that all transfers of the pass share.

    A transport that sends each by itself reads those: the places among them of rows that stay on the rank, and (place,
    peer) of those that go to another rank, or come. For any other they are a sequence of messages.
    """

    __slots__ = ("_spans", "buffer_RD", "others", "own", "views")

    def __init__(
        self,
        buffer_RD: Tensor,
        spans: Sequence[tuple[int, tuple[int, int]]],
        views: Views,
        own: Sequence[int],
        others: Sequence[tuple[int, int]],
    ) -> None:
        self.buffer_RD, self._spans, self.views, self.own, self.others = buffer_RD, spans, views, own, others

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        return [Message(peer, self.buffer_RD, *span) for peer, span in self._spans][index]


class Transfer(Protocol):
    """A transfer that was started."""

    def wait(self) -> None:
        """Returns when received rows may be read and sent ones overwritten; on CUDA it orders the current stream.

        Raises PeerError when a peer does not answer within the transport's time limit, which counts from the start.
        """


class Transport(Protocol):
    """Moves rows between the ranks of one expert-parallel group. `ranks` are the group's, in the world.

    Tags name the layer and the pass in errors, and are the same on every rank.
    """

    rank: int
    size: int
    ranks: Sequence[int]

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        """Row p of every rank's counts [P, C] goes to rank p; returns [P, C], row p from rank p. Collective."""

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        """Tells the group's first rank these columns; returns what waits for its answer [A], of `num_answered` columns.

        The first rank calls `answer` with the columns of all ranks. Collective, on the host alone: a message per rank
        and way, where an all-to-all has one per pair of ranks. All ranks tell equally many columns.
        """

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        """Starts one transfer on `lane`. Every rank starts the same transfers in the same order."""

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        """The sum of `values` over the group, on every rank. Collective, without gradient."""

    def abandon(self, error: BaseException, tags: Tags = NO_TAGS) -> None:
        """Ends the use of the lanes, since a pass ended with `error`; tells the peers. No retry reads its rows."""

    def check_open(self, tags: Tags = NO_TAGS) -> None:
        """Raises PeerError where a failure has ended the use of the lanes."""


class InFront:
    """A transport in front of another, which does what a subclass leaves to it."""

    def __init__(self, inner: Transport) -> None:
        self.rank, self.size, self.ranks = inner.rank, inner.size, inner.ranks
        self._inner = inner

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return self._inner.exchange_counts(counts_PC, tags)

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        return self._inner.consult(told_C, num_answered, answer, tags)

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        return self._inner.start(lane, sends, receives, tags)

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return self._inner.sum(values, tags)

    def abandon(self, error: BaseException, tags: Tags = NO_TAGS) -> None:
        self._inner.abandon(error, tags)

    def check_open(self, tags: Tags = NO_TAGS) -> None:
        self._inner.check_open(tags)


class Done:
    """A transfer with nothing to wait for."""

    def wait(self) -> None:
        return None


class Loopback:
    """The transport of a group of one rank: nothing ever crosses a wire, and rows are received where they lie."""

    rank = 0
    size = 1
    ranks: Sequence[int] = (0,)

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return counts_PC

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        answered_A = answer(told_C.unsqueeze(0))[0]
        return lambda: answered_A

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        assert all(message.peer == 0 for message in (*sends, *receives)), "a group of one rank has no peers"
        return Done()

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return values

    def abandon(self, error: BaseException, tags: Tags = NO_TAGS) -> None:
        return None

    def check_open(self, tags: Tags = NO_TAGS) -> None:
        return None
