"""Agreement of a group's ranks before rows move, and the errors where they do not agree.

1. A pass begins with one small exchange of heads, on a communicator that carries no rows. A forward pass adds its
   counts of rows; a backward pass on the host is a head alone. So whatever passes the ranks are in, they meet here.
   On the host the first rank compares the heads and hands out the counts, a message per rank and way; on CUDA it is an
   all-to-all, and each rank compares.
2. Where two heads differ, all ranks exchange them, and all of them raise. Ranks in different passes first tell each
   other, in words, where they are.
3. On CUDA a backward pass asks no rank, since the answer would be a device sync: the next head tells which backward
   passes there were, and with a capacity nothing is exchanged at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from itertools import chain
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import CopyToHost, is_on_host, to_device
from ds_moe_ep.comm.packed import Packing
from ds_moe_ep.comm.transport import Answer, Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.health.diagnosis import ranks_named
from ds_moe_ep.health.heartbeat import LONGEST_TEXT
from ds_moe_ep.schedule.spans import Tags

BAD_INPUT = -1  # what a rank announces in place of a width
NUM_COLUMNS = 64  # of one exchange, whatever the layer: a message that is longer than expected would end the process
NUM_TOLD = 8  # experts of each rank whose counts the first rank hands out; more follow in an all-to-all
ROOM = 2 * NUM_TOLD  # columns per rank of the group behind a head, and behind a verdict
SAME_PASSES = (
    "every rank of the group calls the model's layers in the same order and equally often, in the same mode, and goes "
    "backward through each call or through none; give a rank that is out of data another batch, evaluate on all ranks "
    "or on none, and multiply a loss by 0 where it must not count"
)
_digest = lru_cache(maxsize=4096)(lambda text: crc32(text.encode()))  # of names, which each pass tells
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Mode(IntEnum):
    """Kind of the pass that a rank is in."""

    EVALUATION = 0
    EVALUATION_WITH_GRADIENT = 1
    TRAINING_WITHOUT_GRADIENT = 2
    TRAINING = 3
    BACKWARD = 4
    PLACEMENT = 5  # of copies, between passes

    @classmethod
    def of(cls, training: bool) -> Mode:
        """The mode of a forward pass that begins now."""
        with_gradient = torch.is_grad_enabled()
        if training:
            return cls.TRAINING if with_gradient else cls.TRAINING_WITHOUT_GRADIENT
        return cls.EVALUATION_WITH_GRADIENT if with_gradient else cls.EVALUATION

    @property
    def is_training(self) -> bool:
        """True for a forward pass of training."""
        return self in (Mode.TRAINING, Mode.TRAINING_WITHOUT_GRADIENT)

    def __str__(self) -> str:
        kind, _, rest = self.name.lower().partition("_")
        return f"{kind} pass" + (f" {rest.replace('_', ' ')}" if rest else "")


@dataclass(frozen=True)
class Call:
    """One pass of one layer. Ranks of a group must be in the same, and have chosen one schedule."""

    layer: str = ""
    number: int = 0
    schedule: str = ""  # a text that is equal where the schedules are
    mode: Mode = Mode.TRAINING
    history: int = 0  # a digest of the layer's backward passes before

    @property
    def tags(self) -> Tags:
        """Where the exchange is, for an error."""
        return Tags(self.layer, "backward" if self.mode is Mode.BACKWARD else "forward")

    def __str__(self) -> str:
        return f"the {self.mode} of call {self.number} of {self.layer or 'MoE layer'}"


NO_CALL = Call()


class CountsHeader(NamedTuple):
    """Header of the counts exchange: must be equal on all ranks before rows move."""

    width: int
    dtype: int
    capacity: int
    num_experts: int
    layer: int
    call: int
    mode: int
    schedule: int
    history: int
    placement: int = 0  # of replicated experts
    window: int = 0  # optimizer steps that their weights have seen


class Head(NamedTuple):
    """The columns in front of a rank's counts: the header, and what this rank alone tells."""

    header: CountsHeader
    sees_drift: bool = False
    needs_gradient: bool = False
    holds_placement: bool = False  # a pass of it that has not gone backward yet needs the placement that there is

    def columns(self) -> tuple[int, ...]:
        return *self.header, *map(int, self[1:])

    @classmethod
    def read(cls, columns: Sequence[int]) -> Head:
        num = len(CountsHeader._fields)
        return cls(CountsHeader(*columns[:num]), *map(bool, columns[num:NUM_HEAD]))


NUM_HEADER = len(CountsHeader._fields)
NUM_HEAD = NUM_HEADER + len(Head._fields) - 1
NUM_VERDICT = len(Head._fields)  # columns of an answer before its counts: heads are alike; what some rank tells


class AgreedCounts(NamedTuple):
    """Counts that were exchanged, [P][L] each, and what any rank of the group told."""

    send_PL: list[list[int]]
    recv_PL: list[list[int]]
    total_E: Sequence[int]  # rows of all ranks, where the first one handed out the counts
    is_drift_seen: bool
    goes_backward: bool
    is_placement_held: bool = False


@dataclass(frozen=True)
class Agreement:
    """The exchange with which a pass begins."""

    transport: Transport
    call: Call
    num_experts: int
    row_type: tuple[int, torch.dtype]
    sees_drift: bool = False
    needs_gradient: bool = False
    placement: int = 0
    window: int = 0
    holds_placement: bool = False

    def on_counts(self, send_PL: Tensor, capacity: int = -1) -> AgreedCounts:
        """The exchanged counts, at once: `begin_counts`, and its end."""
        return self.begin_counts(send_PL, capacity)()

    def begin_counts(self, send_PL: Tensor, capacity: int = -1) -> Callable[[], AgreedCounts]:
        """Starts the exchange of counts; returns what waits for it. Collective.

        One device sync, at the end: what is launched before it hides it. The end raises EngineError on every rank where
        one refused its input or two are not alike.
        """
        if is_on_host(send_PL.device):
            return self._begin_on_host(send_PL, self._head(capacity))
        (size, num_local), head, device = send_PL.shape, self._head(capacity), send_PL.device
        first = num_columns(num_local) - num_local  # columns between a head and its counts are zeros
        head_C = to_device((*head.columns(), *[0] * (first - NUM_HEAD)), device)
        told_PC = self._exchange(torch.cat([head_C.expand(size, -1), send_PL], dim=1))
        on_its_way = CopyToHost(torch.cat([told_PC[:, :NUM_HEAD], told_PC[:, first:], send_PL], dim=1))

        def finish() -> AgreedCounts:
            rows = on_its_way.wait()  # the layer's only device sync
            self.transport.check_open(self.call.tags)  # what a communicator that was aborted left there means nothing
            self.check(head, rows, device)
            stop = NUM_HEAD + num_local
            received, sent = [row[NUM_HEAD:stop] for row in rows], [row[stop:] for row in rows]
            told = [any(column) for column in zip(*[row[NUM_HEADER:NUM_HEAD] for row in rows], strict=True)]
            return AgreedCounts(sent, received, (), *told)

        return finish

    def begin_telling(self, told_C: Tensor, num_small: int, capacity: int = -1) -> Callable[[], AgreedCounts]:
        """As `begin_counts`, where every rank tells all others the same columns: those are received, by rank.

        On the host the first rank hands them out with the verdict where they fit, the first `num_small` columns in 32
        bits each; else behind it, since it says that all ranks tell equally many.
        """
        size, packing = self.transport.size, Packing(len(told_C), num_small)
        if not is_on_host(told_C.device):
            return self.begin_counts(told_C.expand(size, -1), capacity)
        fits = packing.fits(size, ROOM * size)
        told_first = (told_C.tolist(), partial(_packed_answers, packing)) if fits else ([], answers)
        answered = self._ask(self._head(capacity), *told_first)

        def finish() -> AgreedCounts:
            verdict = answered()
            told = packing.unpack(torch.tensor(verdict[NUM_VERDICT:]), size) if fits else self.tell(told_C)
            self.transport.check_open(self.call.tags)
            return AgreedCounts([], told, (), *map(bool, verdict[1:NUM_VERDICT]))

        return finish

    def tell(self, told_C: Tensor) -> list[list[int]]:
        """The columns of every rank, behind an exchange in which all agreed. Collective, on the host."""
        size, to_each = self.transport.size, lambda told_PC: told_PC.flatten().expand(len(told_PC), -1)
        told = self.transport.consult(told_C, size * len(told_C), to_each, self.call.tags)()
        self.transport.check_open(self.call.tags)
        return told.view(size, -1).tolist()

    def on_backward(self) -> None:
        """Makes sure that all ranks begin this backward pass now. Collective, on the host; raises as `on_counts`."""
        self._ask(self._head(-1), [])()

    def _begin_on_host(self, send_PL: Tensor, head: Head) -> Callable[[], AgreedCounts]:
        """Asks the first rank, which hands out the counts of as many experts as fit."""
        sent, num_local = send_PL.tolist(), send_PL.shape[1]
        if self.transport.size == 1:
            return lambda: AgreedCounts(sent, sent, (), *head[1:])
        are_told = num_local <= NUM_TOLD
        answered = self._ask(head, list(chain.from_iterable(sent)) if are_told else [])

        def finish() -> AgreedCounts:
            verdict = answered()
            counts, num = verdict[NUM_VERDICT:], send_PL.numel()
            if are_told:
                received = [counts[first : first + num_local] for first in range(0, num, num_local)]
            else:  # all ranks have as many
                received = self.transport.exchange_counts(send_PL, self.call.tags).tolist()
            self.transport.check_open(self.call.tags)
            totals = counts[num : 2 * num] if are_told else ()
            return AgreedCounts(sent, received, totals, *map(bool, verdict[1:NUM_VERDICT]))

        return finish

    def _ask(self, head: Head, counts: Sequence[int], answer: Answer | None = None) -> Callable[[], list[int]]:
        """Tells its head, and counts by peer and expert, to the first rank; returns what waits for the answer.

        Collective. The end raises EngineError on every rank where two heads differ.
        """
        answered = consult_on(self.transport, head.columns(), counts, self.call, answer)

        def finish() -> list[int]:
            answer = answered().tolist()
            if not answer[0]:
                self.check(head, exchange_heads(self.transport, head.columns(), self.call), torch.device("cpu"))
            return answer

        return finish

    def _head(self, capacity: int) -> Head:
        call, (width, dtype) = self.call, self.row_type
        layer, schedule = _digest(call.layer), _digest(call.schedule)
        kind, experts = DTYPES.index(dtype), self.num_experts
        place = (layer, call.number, call.mode, schedule, call.history)
        header = CountsHeader(width, kind, capacity, experts, *place, self.placement, self.window)
        return Head(header, self.sees_drift, self.needs_gradient, self.holds_placement)

    def _exchange(self, send_PC: Tensor) -> Tensor:
        """The exchange of heads and counts, in messages of one length."""
        if send_PC.shape[1] <= NUM_COLUMNS:
            return self.transport.exchange_counts(send_PC, self.call.tags)
        parts = send_PC.split(NUM_COLUMNS, dim=1)
        return torch.cat([self.transport.exchange_counts(part_PC, self.call.tags) for part_PC in parts], dim=1)

    def check(self, own: Head, rows: list[list[int]], device: torch.device) -> None:
        """Raises EngineError where a peer, by its row's head, refused its input, or is not like this rank."""
        columns = list(own.header)
        if [row[:NUM_HEADER] for row in rows].count(columns) == len(rows):
            return
        layer, ranks = self.call.layer or "MoE layer", self.transport.ranks
        heads = [Head.read(row) for row in rows]
        for rank, head in zip(ranks, heads, strict=True):
            if head.header.width == BAD_INPUT:
                raise EngineError(f"{layer}: rank {rank} refused its input: its own error says why")
        odd = [peer for peer, head in enumerate(heads) if head.header != own.header]
        if any(place_of(heads[peer]) != place_of(own) for peer in odd):
            raise EngineError(f"{layer}: ranks are in different passes: {self._places(device)}: {SAME_PASSES}")
        here = ranks[self.transport.rank]
        differences = "; ".join(
            f"{mine} on rank {here}, {theirs} on rank {ranks[peer]}"
            for peer in odd[:3]
            for mine, theirs in (describe(own.header, heads[peer].header),)
        )
        raise EngineError(
            f"{layer}: {differences}: all ranks of the group need the same; give every rank the same model and, with a "
            "capacity, the same number of tokens"
        )

    def _places(self, device: torch.device) -> str:
        """Where each rank of the group is. Collective: all of them have read the same heads, and ask."""
        own = str(self.call).encode()[:LONGEST_TEXT]
        text_C = torch.frombuffer(bytearray(own.ljust(8 * NUM_COLUMNS)), dtype=torch.int64).to(device)
        told_PC = self.transport.exchange_counts(text_C.repeat(self.transport.size, 1), self.call.tags).cpu()
        at: dict[str, list[int]] = {}
        for rank, row in zip(self.transport.ranks, told_PC, strict=True):
            at.setdefault(bytes(row.view(torch.uint8).tolist()).decode(errors="replace").strip(), []).append(rank)
        return "; ".join(f"{ranks_named(ranks)} in {place}" for place, ranks in at.items())


def num_columns(num_local_experts: int) -> int:
    """Columns of the exchange: the head and the counts, rounded up."""
    return -(-(NUM_HEAD + num_local_experts) // NUM_COLUMNS) * NUM_COLUMNS


def place_of(head: Head) -> tuple[int, int, int]:
    """The pass that a rank is in."""
    return head.header.layer, head.header.call, head.header.mode


def describe(own: CountsHeader, other: CountsHeader) -> tuple[str, str]:
    """The differences of two ranks in the same pass, as each has them, for an error."""
    odd = [name for name, a, b in zip(CountsHeader._fields, own, other, strict=True) if a != b]
    mine, theirs = (
        ", ".join(f"{name}={_shown(name, getattr(header, name))}" for name in odd) for header in (own, other)
    )
    return mine, theirs


def _shown(name: str, value: int) -> str:
    if name == "dtype":
        return str(DTYPES[value])
    if name == "capacity" and value < 0:
        return "none"
    if name == "history":
        return f"{value:08x} (backward passes before)"
    return f"{value:08x}" if name in ("schedule", "placement") else str(value)


def announce_bad_input(
    transport: Transport, num_local_experts: int, device: torch.device, call: Call = NO_CALL
) -> None:
    """Tells the peers, which wait where their passes begin, that this rank is about to raise. Collective."""
    if is_on_host(device):
        head = (BAD_INPUT, *[0] * (NUM_HEAD - 1))
        consult_on(transport, head, [], call)()
        exchange_heads(transport, head, call)
        return
    columns_PC = torch.zeros(transport.size, num_columns(num_local_experts), dtype=torch.int64, device=device)
    columns_PC[:, 0] = BAD_INPUT
    for part_PC in columns_PC.split(NUM_COLUMNS, dim=1):
        transport.exchange_counts(part_PC, call.tags)


def consult_on(
    transport: Transport, head: Sequence[int], counts: Sequence[int], call: Call, answer: Answer | None = None
) -> Callable[[], Tensor]:
    """Tells its head to the first rank, and the counts [P * L]; returns what waits for the answer. Collective."""
    num_told = ROOM * transport.size
    columns = array("q", (*head, *counts, *[0] * (num_told - len(counts))))  # ten times as fast as torch.tensor
    told_C = torch.frombuffer(columns, dtype=torch.int64)
    return transport.consult(told_C, NUM_VERDICT + num_told, answer or answers, call.tags)


def answers(told_PC: Tensor) -> Tensor:
    """The first rank's answer to each: the verdict, and where all agree the counts of what comes to it, and of all."""
    (answers_PA, header), num_ranks = verdicts(told_PC), len(told_PC)
    num_local = 0 if header is None else header.num_experts // num_ranks
    if header is not None and num_local <= NUM_TOLD and header.mode != Mode.BACKWARD:
        num = num_ranks * num_local
        counts_PPL = told_PC[:, NUM_HEAD : NUM_HEAD + num].view(num_ranks, num_ranks, num_local)
        answers_PA[:, NUM_VERDICT : NUM_VERDICT + num] = counts_PPL.transpose(0, 1).flatten(1)
        answers_PA[:, NUM_VERDICT + num : NUM_VERDICT + 2 * num] = counts_PPL.sum(0).flatten()
    return answers_PA


def verdicts(told_PC: Tensor) -> tuple[Tensor, CountsHeader | None]:
    """The answers with the verdict alone, and the header on which all agree; None where they do not."""
    num_ranks = len(told_PC)
    answers_PA = told_PC.new_zeros(num_ranks, NUM_VERDICT + ROOM * num_ranks)
    heads = told_PC[:, :NUM_HEAD].tolist()  # a few numbers: lists of them cost less than operations on tensors
    headers = [head[:NUM_HEADER] for head in heads]
    header = CountsHeader(*headers[0])
    if header.width == BAD_INPUT or headers.count(headers[0]) < num_ranks:
        return answers_PA, None
    told = map(max, zip(*[head[NUM_HEADER:] for head in heads], strict=True))
    answers_PA[:, :NUM_VERDICT] = torch.tensor([1, *told])
    return answers_PA, header


def _packed_answers(packing: Packing, told_PC: Tensor) -> Tensor:
    """The first rank's answer to each: the verdict, and where all agree what all ranks told."""
    answers_PA, header = verdicts(told_PC)
    if header is not None:
        packed_C = packing.pack(told_PC[:, NUM_HEAD:])
        answers_PA[:, NUM_VERDICT : NUM_VERDICT + len(packed_C)] = packed_C
    return answers_PA


def exchange_heads(transport: Transport, head: Sequence[int], call: Call) -> list[list[int]]:
    """Every rank's head, after an answer that they are not alike. Collective, on the host."""
    columns_C = torch.tensor([*head, *[0] * (NUM_COLUMNS - NUM_HEAD)])
    return transport.exchange_counts(columns_C.repeat(transport.size, 1), call.tags).tolist()
