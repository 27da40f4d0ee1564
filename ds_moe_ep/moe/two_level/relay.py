"""The legs of a pass with two levels: copies out, rows spread in the node, and results or sums of them back.

1. Dispatch: each copy leaves with its routes in the bytes behind it, so that one message has both.
2. Spread: the relay makes rows of copies, a gather by their routes, and sends each rank of its node its part. Near rows
   of the piece go along.
3. Gather: each rank's results come back to the relay, which sums those of a copy, with their weights, in fp32 and in
   the order of the choices; 4. Combine: the sums go home.

Backward mirrors it where nodes sum: gradients of sums go out as copies, the relay weighs them and keeps the product of
each with its result, the gradient of that weight; gradients of rows are summed per copy and go home with these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Message, Transfer, Transport
from ds_moe_ep.kernels.permute import RowMaps, gather_tokens, unpermute
from ds_moe_ep.moe.two_level.copies import NOWHERE, NodeCopies, Span
from ds_moe_ep.moe.two_level.legs import PieceLegs, num_relayed
from ds_moe_ep.schedule.build import Op, OpKind, Schedule
from ds_moe_ep.schedule.spans import Tags

Leg = Callable[[], Transfer]


class PassRows(Protocol):
    """The rows of a pass, as its buffers hold them."""

    @property
    def sent_ND(self) -> Tensor: ...
    @property
    def wire_in_RD(self) -> Tensor: ...
    @property
    def wire_out_RD(self) -> Tensor: ...
    @property
    def results_ND(self) -> Tensor: ...


@dataclass
class Relay:
    """The legs of one pass on this rank. V copies relayed, Y rows made of them."""

    copies: NodeCopies
    legs: Sequence[PieceLegs | None]
    transport: Transport
    with_sums: bool
    is_backward: bool = False
    use_triton: bool | None = None  # as the kernels take it
    weights_UK: Tensor | None = None  # of the own copies, where nodes sum
    routes_VK: Tensor = field(init=False)
    weights_VK: Tensor | None = None
    results_YD: Tensor | None = None
    dots_VK: Tensor | None = None  # gradients of the weights, on the relay
    dots_UK: Tensor | None = None  # and at home
    _copies_VD: Tensor | None = None
    _rows_YD: Tensor | None = None

    def prepare(self, like_ND: Tensor) -> None:
        """Makes the buffers of a forward pass."""
        num_copies, num_rows = num_relayed(self.copies)
        self.routes_VK = self.copies.routes_UK.new_empty(num_copies, self.copies.num_choices)
        self._copies_VD = like_ND.new_empty(num_copies, like_ND.shape[1] + self._num_extra(like_ND))
        if self.with_sums:
            assert self.weights_UK is not None, "sums have weights"
            self.weights_VK = self.weights_UK.new_empty(num_copies, self.copies.num_choices)
            self.results_YD = self._rows_YD = like_ND.new_empty(num_rows, like_ND.shape[1])

    @property
    def saved(self) -> list[Tensor]:
        """The tensors that the backward pass needs, where nodes sum."""
        if not self.with_sums:
            return []
        assert self.weights_VK is not None and self.results_YD is not None, "a forward pass has been"
        return [self.routes_VK, self.weights_VK, self.results_YD]

    def backward(self, saved: Sequence[Tensor], like_ND: Tensor) -> Relay:
        """The relay of the backward pass."""
        relay = Relay(self.copies, self.legs, self.transport, self.with_sums, True, self.use_triton)
        if self.with_sums:
            relay.routes_VK, relay.weights_VK, relay.results_YD = saved
            relay._copies_VD = like_ND.new_empty(len(relay.routes_VK), like_ND.shape[1])
            relay._rows_YD = torch.empty_like(relay.results_YD)
            relay.dots_VK = torch.zeros_like(relay.weights_VK)
            relay.dots_UK = relay.weights_VK.new_zeros(sum(self.copies.copies_M), self.copies.num_choices)
        return relay

    def release(self) -> None:
        """Forgets the tensors of a forward pass: only what the autograd function saves can be freed then."""
        self.weights_UK = self.weights_VK = self.results_YD = self._copies_VD = self._rows_YD = None
        self.routes_VK = self.copies.routes_UK[:0]

    def everything(self) -> list[Tensor]:
        """The tensors that its legs may still use."""
        return [each for each in vars(self).values() if isinstance(each, Tensor)]

    def leg(self, op: Op, schedule: Schedule, rows: PassRows, tags: Tags) -> Leg | None:
        """The work of an op that is a leg of the two levels; None for any other one."""
        works = {
            OpKind.DISPATCH: (self._dispatch, schedule.spreads),
            OpKind.SPREAD: (self._spread, schedule.spreads),
            OpKind.GATHER: (self._gather, schedule.gathers),
            OpKind.COMBINE: (self._combine, schedule.gathers),
        }
        work, pieces = works.get(op.kind, (None, frozenset[int]()))
        if work is None or op.piece not in pieces:
            return None
        legs = self.legs[op.piece]
        assert legs is not None, "the layout has the legs of the forward schedule"
        return partial(work, legs, rows, tags)

    def _dispatch(self, legs: PieceLegs, rows: PassRows, tags: Tags) -> Transfer:
        assert self._copies_VD is not None, "a pass was prepared"
        sends = [self._leaving(relay, span, rows.sent_ND) for relay, span in legs.leaving]
        receives = [Message(each.source, self._copies_VD, *each.copies) for each in legs.brought]
        return self.transport.start("dispatch", sends, receives, tags)

    def _leaving(self, relay: int, span: Span, sent_ND: Tensor) -> Message:
        """The copies for one relay: with their routes, and weights where it sums; gradients of sums without."""
        start, stop = span
        first = self.copies.num_near
        if self.is_backward:
            return Message(relay, sent_ND, first + start, first + stop)
        own = slice(start, stop)
        if self.with_sums:
            copies_uD = sent_ND[first + start : first + stop]
        else:
            copies_uD = sent_ND.index_select(0, self.copies.row_of_copy_U[own])
        behind = [self.copies.routes_UK[own], *([] if self.weights_UK is None else [self.weights_UK[own]])]
        return Message(relay, packed(copies_uD, behind, self._num_extra(sent_ND)), 0, stop - start)

    def _spread(self, legs: PieceLegs, rows: PassRows, tags: Tags) -> Transfer:
        sends = [(self.transport.rank, [Message(peer, rows.sent_ND, *span) for peer, span in legs.near])]
        for each in legs.brought:
            made_yD = self._rows_of(each.copies, each.rows, rows.sent_ND.shape[1])
            first = each.rows[0]
            parts = [Message(peer, made_yD, start - first, stop - first) for peer, (start, stop) in each.to]
            sends.append((each.source, parts))
        receives = [Message(peer, rows.wire_in_RD, *span) for peer, span in legs.arriving]
        return self.transport.start("spread", _in_order(sends), receives, tags)

    def _rows_of(self, copies: Span, rows: Span, width: int) -> Tensor:
        """The rows [n, D] that copies of one source fill: themselves, or weighed gradients of sums."""
        assert self._copies_VD is not None, "a pass was prepared"
        here, there = slice(*copies), slice(*rows)
        copies_vD = self._copies_VD[here, :width]
        if not self.is_backward:
            kinds = [self.routes_VK, *([] if self.weights_VK is None else [self.weights_VK])]
            for kind, found in zip(kinds, unpacked(self._copies_VD[here], width, kinds), strict=True):
                kind[here] = found
            return gather_tokens(copies_vD, self._maps(copies, rows))
        assert self.weights_VK is not None and self.results_YD is not None and self.dots_VK is not None, "nodes sum"
        maps = self._maps(copies, rows)
        d_rows_yD = gather_tokens(copies_vD, maps)
        if len(d_rows_yD) and len(copies_vD):
            weights_vK = self.weights_VK[here]
            dots_y = (d_rows_yD.to(weights_vK.dtype) * self.results_YD[there]).sum(1)
            self.dots_VK[here] = dots_y.take(maps.row_of_choice_TK).masked_fill(self.routes_VK[here] == NOWHERE, 0)
            weight_y1 = weights_vK.flatten().index_select(0, maps.choice_of_row_N).unsqueeze(1)
            torch.mul(d_rows_yD, weight_y1, out=d_rows_yD)
        return d_rows_yD

    def _gather(self, legs: PieceLegs, rows: PassRows, tags: Tags) -> Transfer:
        assert self._rows_YD is not None, "nodes sum"
        receives = [(self.transport.rank, [Message(peer, rows.results_ND, *span) for peer, span in legs.near])]
        for each in legs.brought:
            receives.append((each.source, [Message(peer, self._rows_YD, *span) for peer, span in each.to]))
        sends = [Message(peer, rows.wire_out_RD, *span) for peer, span in legs.arriving]
        return self.transport.start("gather", sends, _in_order(receives), tags)

    def _combine(self, legs: PieceLegs, rows: PassRows, tags: Tags) -> Transfer:
        assert self._rows_YD is not None, "nodes sum"
        sends = []
        for each in legs.brought:
            here = slice(*each.copies)
            sums_vD = self._sums_of(each.copies, each.rows)
            if self.dots_VK is not None:
                sums_vD = packed(sums_vD, [self.dots_VK[here]], num_extra(sums_vD, [self.dots_VK]))
            sends.append(Message(each.source, sums_vD, 0, len(sums_vD)))
        first = self.copies.num_near
        if self.dots_UK is None:
            home = [Message(peer, rows.results_ND, first + a, first + b) for peer, (a, b) in legs.leaving]
            return self.transport.start("combine", sends, home, tags)
        return self._combine_with_dots(legs, rows, sends, tags)

    def _combine_with_dots(self, legs: PieceLegs, rows: PassRows, sends: Sequence[Message], tags: Tags) -> Transfer:
        """Sums of gradients come home with the gradients of weights behind them, and are put apart at the end."""
        assert self.dots_UK is not None, "a backward pass where nodes sum"
        dots_UK, results_ND, first = self.dots_UK, rows.results_ND, self.copies.num_near
        width = results_ND.shape[1] + num_extra(results_ND, [dots_UK])
        home = [Message(peer, results_ND.new_empty(b - a, width), 0, b - a) for peer, (a, b) in legs.leaving]

        def put_apart() -> None:
            for message, (_, (start, stop)) in zip(home, legs.leaving, strict=True):
                results_ND[first + start : first + stop] = message.rows[:, : results_ND.shape[1]]
                (dots_UK[start:stop],) = unpacked(message.rows, results_ND.shape[1], [dots_UK])

        return _Behind(self.transport.start("combine", sends, home, tags), put_apart)

    def _sums_of(self, copies: Span, rows: Span) -> Tensor:
        """Sums [n, D] of the rows of each copy: of results with their weights, of gradients without."""
        assert self._rows_YD is not None and self.weights_VK is not None, "nodes sum"
        weights_vK = self.weights_VK[slice(*copies)]
        if self.is_backward:
            weights_vK = torch.ones_like(weights_vK)
        with torch.no_grad():
            maps = self._maps(copies, rows)
            return unpermute(self._rows_YD[slice(*rows)], weights_vK, maps, (), self.use_triton)

    def _maps(self, copies: Span, rows: Span) -> RowMaps:
        """The maps between copies of one source and the rows that they fill."""
        routes_vK, num_rows = self.routes_VK[slice(*copies)].to(torch.int64), rows[1] - rows[0]
        is_dropped_vK = routes_vK == NOWHERE
        num_choices = routes_vK.numel()
        choice_of_row = routes_vK.new_full((num_rows + 1,), num_choices)
        places = routes_vK.masked_fill(is_dropped_vK, num_rows).flatten()
        choice_of_row[places] = torch.arange(num_choices, device=places.device)
        choice_of_row = choice_of_row[:num_rows]
        is_padding = choice_of_row == num_choices if self.copies.has_padding else None
        if is_padding is not None:
            choice_of_row = choice_of_row.masked_fill(is_padding, 0)
        return RowMaps(choice_of_row, routes_vK.masked_fill(is_dropped_vK, 0), is_padding, is_dropped_vK)

    def _num_extra(self, like_ND: Tensor) -> int:
        """Columns behind a copy for its routes, and for its weights where nodes sum."""
        return num_extra(like_ND, [self.copies.routes_UK, *([] if self.weights_UK is None else [self.weights_UK])])


def relay_of(
    schedule: Schedule,
    copies: NodeCopies | None,
    legs: Sequence[PieceLegs | None],
    transport: Transport,
    like_ND: Tensor,
    weights_UK: Tensor | None,
    use_triton: bool | None,
) -> Relay | None:
    """The legs of a forward pass; None with one level."""
    if copies is None or not schedule.spreads:
        return None
    relay = Relay(copies, legs, transport, bool(schedule.gathers), False, use_triton, weights_UK)
    relay.prepare(like_ND)
    return relay


class _Behind:
    """A transfer with something to do at its end."""

    def __init__(self, inner: Transfer, end: Callable[[], None]) -> None:
        self._inner, self._end = inner, end

    def wait(self) -> None:
        self._inner.wait()
        self._end()


def _in_order(by_source: Sequence[tuple[int, list[Message]]]) -> list[Message]:
    """Messages by the rank whose rows they carry: both ends of a pair of ranks list them alike."""
    return [message for _, messages in sorted(by_source, key=lambda item: item[0]) for message in messages]


def num_extra(like_ND: Tensor, behind: Sequence[Tensor]) -> int:
    """Columns of a row's type that hold the bytes of what stands behind it."""
    num_bytes = sum(tensor.shape[1] * tensor.element_size() for tensor in behind)
    return -(-num_bytes // like_ND.element_size())


def packed(rows_uD: Tensor, behind: Sequence[Tensor], extra: int) -> Tensor:
    """Rows with the bytes of what belongs to each behind it."""
    width, size = rows_uD.shape[1], rows_uD.element_size()
    made_uE = rows_uD.new_empty(len(rows_uD), width + extra)
    made_uE[:, :width] = rows_uD
    as_bytes, start = made_uE.view(torch.uint8), width * size
    for tensor in behind:
        stop = start + tensor.shape[1] * tensor.element_size()
        as_bytes[:, start:stop] = tensor.contiguous().view(torch.uint8)
        start = stop
    return made_uE


def unpacked(rows_uE: Tensor, width: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Everything that `packed` has put behind rows of this width, in the types and widths of `like`."""
    as_bytes, start, found = rows_uE.view(torch.uint8), width * rows_uE.element_size(), []
    for tensor in like:
        stop = start + tensor.shape[1] * tensor.element_size()
        found.append(as_bytes[:, start:stop].contiguous().view(tensor.dtype))
        start = stop
    return found
