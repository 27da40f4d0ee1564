"""Gradients of copies: summed where they are computed, sent home in the last backward pass of a window.

Two nodes of autograd's graph do it. `Lend` stands behind the copies' weights and the rows: its backward pass takes the
copies' gradients, and in the last pass starts to send their sums. `Collect` stands between it and the home's
parameters: its backward pass waits for what comes, and returns the sums. A parameter then has two gradients, its own
experts' product and these sums, which autograd adds before anything that hangs on the parameter hears of one: once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe_ep.comm.host_copies import is_on_host, to_device
from ds_moe_ep.comm.transport import Message, Transfer, Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.weight_sums import FP32, sum_of
from ds_moe_ep.moe.replicas.compare import odd_pair
from ds_moe_ep.moe.replicas.copies import message
from ds_moe_ep.schedule.assignment import Assignment
from ds_moe_ep.schedule.placement import Placement
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.schedule.way_home import Move, rounds_home


@dataclass(frozen=True, eq=False)
class LentPass:
    """One forward pass through copies, as its backward pass needs it: the same on every rank, but for `experts`.

    It lives as long as the graph of the pass.
    """

    placement: Placement
    trained_E: Sequence[int]  # a bit for each weight of an expert
    visited: frozenset[tuple[int, int]]  # (expert, host) of copies that got rows
    experts: Sequence[int]  # this rank's guests, in the order of the gradients
    state: set[str] = field(default_factory=set)  # "backward" where it has gone backward

    def is_trained(self, expert: int, index: int) -> bool:
        """True where one of the expert's weights needs a gradient."""
        return bool(self.trained_E[expert] >> index & 1)


def lent_pass(assignment: Assignment, trained_E: Sequence[int], rank: int) -> LentPass:
    """The part of an assignment that its backward pass needs."""
    placement = assignment.placement
    visited = frozenset(
        (expert, host)
        for expert, rows_RH in assignment.split.items()
        for host, rows in zip(placement.hosts(expert)[1:], map(sum, list(zip(*rows_RH, strict=True))[1:]), strict=True)
        if rows
    )
    own_guests = [guest for guest in placement.guests_RS[rank] if guest is not None]
    return LentPass(placement, trained_E, visited, own_guests)


@dataclass
class GradientSums:
    """Gradient sums of this rank's guests since they were last sent, and who owes whom."""

    passes: int = 0
    of: dict[int, list[Tensor | None]] = field(default_factory=dict)  # by expert, a sum for each weight
    owed: dict[tuple[int, int], int] = field(default_factory=dict)  # by (expert, host): a bit for each weight
    placement: Placement | None = None

    def add(self, lent: LentPass, grads: Mapping[int, Sequence[Tensor | None]]) -> None:
        """Adds the gradients of one backward pass, in fp32 where several add up."""
        self.passes += 1
        self.placement = lent.placement
        for expert, host in lent.visited:
            if lent.trained_E[expert]:
                self.owed[expert, host] = self.owed.get((expert, host), 0) | lent.trained_E[expert]
        for expert, parts in grads.items():
            before = self.of.get(expert, [None] * len(parts))
            self.of[expert] = [sum_of(old, new) for old, new in zip(before, parts, strict=True)]


class Returning:
    """GradientSums on their way home, in the rounds of `way_home.py`: one expert's sums of others at a time."""

    def __init__(
        self,
        sums: GradientSums,
        link: Transport,
        like: Sequence[Tensor],
        device: torch.device,
        window: int,
        tags: Tags,
    ) -> None:
        """Starts the first round. Collective. `like` has shapes and types of an expert's weights.

        Raises EngineError, on every rank, where one sends what another does not expect (on a CPU).
        """
        assert sums.placement is not None
        self._home, self._rounds = sums.placement.home, list(rounds_home(sums.owed, sums.placement.home))
        self._sums, self._link, self._like, self._device = sums, link, like, device
        self._window, self._tags, self._number = window, tags, 0
        if sums.placement.copies and is_on_host(device):
            check_moves(self._rounds, link, tags)
        self._started = self._start()

    def _start(self) -> _Round | None:
        """The next round, started; None behind the last. Collective."""
        if not self._rounds:
            return None
        self._number += 1
        sends, receives, came = list[Message](), list[Message](), list[_Came]()
        for move in self._rounds.pop(0):
            labels = to_device([move.expert, self._window, self._sums.passes, move.weights], self._device).view(1, -1)
            types = {
                index: weight.dtype if self._sums.passes == 1 and not move.is_summed else sum_type(weight.dtype)
                for index, weight in enumerate(self._like)
                if move.weights >> index & 1
            }
            if move.source == self._link.rank:
                sends.append(message(move.target, labels))
                parts = self._sums.of.pop(move.expert)
                for index, dtype in types.items():
                    part = parts[index]
                    assert part is not None, "a trained weight has a gradient, be it zero"
                    sends.append(message(move.target, part.to(dtype).contiguous()))
            elif move.target == self._link.rank:
                room = self._room_for(move.expert, types)
                came.append(_Came(move, labels, torch.empty_like(labels), room))
                receives += [message(move.source, each) for each in (came[-1].labels, *room.values())]
        tags = replace(self._tags, peers=f"sums of window {self._window}, round {self._number}")
        return _Round(self._link.start("replicas", sends, receives, tags), sends, came)

    def _room_for(self, expert: int, types: Mapping[int, torch.dtype]) -> dict[int, Tensor]:
        """Room for an expert's sums that come. Raises EngineError, of which the others hear, where there is none."""
        try:
            return {
                index: torch.empty_like(self._like[index], dtype=dtype, device=self._device)
                for index, dtype in types.items()
            }
        except RuntimeError as error:  # torch's out of memory is one, on any device
            num_bytes = sum(self._like[index].numel() * dtype.itemsize for index, dtype in types.items())
            named = EngineError(
                f"{self._tags.layer or 'MoE layer'}: no memory for the gradient sums of copies of expert {expert}, "
                f"{num_bytes:,} bytes ({error}); lower moe_ep.replicas, or set it to 0"
            )
            self._link.abandon(named, self._tags)
            raise named from error

    def add_to(self, totals: list[list[Tensor | None]]) -> None:
        """Waits for the sums, and adds them up per own expert and weight. Raises EngineError for sums of others.

        Collective: what others send through this rank goes on from here.
        """
        first = self._link.rank * len(totals)
        while self._started is not None:
            self._started.transfer.wait()
            came, self._started = self._started.came, None  # what was sent is free
            for move, expected, labels, room in came:
                check_labels(expected, labels, self._tags.layer, self._link.ranks[move.source])
                is_home = self._home(move.expert) == self._link.rank
                its = totals[move.expert - first] if is_home else self._sums.of[move.expert]
                for index, grad in room.items():
                    its[index] = added(its[index], grad)
            del came
            self._started = self._start()


class _Came(NamedTuple):
    """Sums that come, and how they are to be labelled."""

    move: Move
    expected: Tensor
    labels: Tensor
    room: dict[int, Tensor]


class _Round(NamedTuple):
    transfer: Transfer
    sends: list[Message]  # kept until the transfer is over
    came: list[_Came]


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """Their sum, in the memory of `part` where it can hold it: that came for this sum alone."""
    if total is None:
        return part
    if part.dtype == sum_type(total.dtype):
        return part.add_(total)
    return total.to(sum_type(total.dtype)) + part


def check_moves(rounds: Sequence[Sequence[Move]], link: Transport, tags: Tags) -> None:
    """Raises EngineError, on every rank, where one sends sums to another that expects none, or others. Collective."""
    sent, expected = ([list[str]() for _ in range(link.size)] for _ in range(2))
    for number, moves in enumerate(rounds):
        for move in moves:
            text = f"{number} {move.expert} {move.weights}"
            if move.source == link.rank:
                sent[move.target].append(text)
            elif move.target == link.rank:
                expected[move.source].append(text)
    sent_P, expected_P = ([crc32(" ".join(its).encode()) for its in lists] for lists in (sent, expected))
    odd = odd_pair(link, sent_P, expected_P, tags)
    if odd is not None:
        source, target = (link.ranks[rank] for rank in odd)
        error = EngineError(
            f"{tags.layer or 'MoE layer'}: rank {source} sends rank {target} other gradients of copies than that rank "
            "expects of it: one of them has another idea of the experts' homes, or of the rows that the copies got; "
            "start again from the last checkpoint, or set moe_ep.replicas to 0"
        )
        link.abandon(error, tags)
        raise error


def check_labels(expected: Tensor, came: Tensor, layer: str, host: int) -> None:
    """Raises EngineError where sums that came are not those of this expert and window, with every pass in them once."""
    if came.is_cuda or torch.equal(expected, came):  # there it would be a device sync; lengths and order still hold
        return
    (expert, window, passes, _), (its, theirs, added, _) = expected[0].tolist(), came[0].tolist()
    raise EngineError(
        f"{layer or 'MoE layer'}: the gradient of expert {expert} in window {window}, of {passes} backward passes, was "
        f"expected from its copy on rank {host}; what came is that of expert {its} in window {theirs}, of {added} "
        "passes: ranks are out of step; start again from the last checkpoint, or set moe_ep.replicas to 0"
    )


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type of sums of gradients of this type: those of several passes, or of several hosts, keep fp32."""
    return torch.promote_types(dtype, FP32)


class Ledger:
    """The sums of one layer's window so far, over all of its loans."""

    def __init__(self) -> None:
        self.sums = GradientSums()
        self.num_passes = 0  # forward passes that have gone backward since the last step

    def take(self) -> GradientSums:
        """The sums, which begin anew."""
        sums, self.sums = self.sums, GradientSums()
        return sums


class Loan:
    """The shared state of the two nodes: where gradients of copies go, and those that came for this rank's weights."""

    def __init__(
        self,
        ledger: Ledger,
        link: Transport,
        own: Sequence[Sequence[Tensor]],
        is_last: Callable[[], bool],
        window: int,
        layer: str,
    ) -> None:
        self._ledger, self._link, self._device = ledger, link, own[0][0].device
        self._like = [shape_of(weight) for weight in own[0]]
        self._types = [[weight.dtype for weight in parts] for parts in own]
        self._is_last, self._window, self._layer = is_last, window, layer
        self._returning: list[Returning] = []

    def take(self, lent: LentPass, grads: Mapping[int, Sequence[Tensor | None]], is_first: bool) -> None:
        """Takes a backward pass's gradients of copies; starts to send their sums where it is a window's last.

        `is_first`: the forward pass has not gone backward before.
        """
        self._ledger.sums.add(lent, grads)
        self._ledger.num_passes += is_first
        if self._is_last():
            tags = Tags(self._layer, "backward", f"sums of window {self._window}")
            sums = self._ledger.take()
            self._returning.append(Returning(sums, self._link, self._like, self._device, self._window, tags))

    def collect(self) -> list[Tensor | None]:
        """The sums that came for the own weights, in the order of the parameters; waits for them."""
        totals: list[list[Tensor | None]] = [[None] * len(types) for types in self._types]
        returning, self._returning = self._returning, []
        for each in returning:
            each.add_to(totals)
        both = zip(chain(*self._types), chain(*totals), strict=True)
        return [None if total is None else total.to(dtype) for dtype, total in both]


def shape_of(weight: Tensor) -> Tensor:
    """A tensor of the same shape and type without memory or graph."""
    return weight.detach().to("meta")


class Collect(torch.autograd.Function):
    """From the home's parameters to a token, which `Lend` takes."""

    @staticmethod
    def forward(ctx: Any, loan: Loan, anchor: Tensor, *own: Tensor) -> Tensor:
        ctx.loan = loan
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.loan.collect()


class Lend(torch.autograd.Function):
    """From the token, the rows and the copies' weights to the same rows and weights, as an expert pass takes them."""

    @staticmethod
    def forward(
        ctx: Any, loan: Loan, lent: LentPass, collect: Any, token: Tensor, rows_ND: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.loan, ctx.lent, ctx.collect = loan, lent, collect
        ctx.num_weights = len(weights) // max(len(lent.experts), 1)
        outputs = [weight.detach() for weight in weights]
        frozen = [
            outputs[place * ctx.num_weights + index]
            for place, expert in enumerate(lent.experts)
            for index in range(ctx.num_weights)
            if not lent.is_trained(expert, index)
        ]
        ctx.mark_non_differentiable(*frozen)
        return rows_ND.detach(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_ND: Tensor, *d_weights: Tensor) -> tuple[Tensor | None, ...]:
        lent, num = ctx.lent, ctx.num_weights
        is_first = "backward" not in lent.state  # a graph that is kept may go backward again
        lent.state.add("backward")
        # A backward pass that is not asked for gradients of parameters has none of copies either.
        if torch._C._will_engine_execute_node(ctx.collect):
            grads = {
                expert: [d_weights[i * num + j] if lent.is_trained(expert, j) else None for j in range(num)]
                for i, expert in enumerate(lent.experts)
            }
            ctx.loan.take(lent, grads, is_first)
        return None, None, None, d_rows_ND.new_empty(0), d_rows_ND, *[None] * len(d_weights)
