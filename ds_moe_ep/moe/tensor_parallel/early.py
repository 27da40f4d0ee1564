"""`EarlyGather`: tokens on their way to the ranks of a tensor group while others still come back from their experts.

1. Each rank sorts its tokens by the combine behind which the last of their rows is back, and tells the group that order
   and how many tokens each combine completes: of the pass, and of the pass back where its tokens take gradients.
2. Behind each combine but the last one those tokens are summed, as they would be at the end, and gathered on a lane of
   their own, under the computations and transfers that follow.
3. What the last combine completes is gathered behind the pass, while the caller may compute; of the pass back at once,
   under the weight gradients, which no rank waits for.

A token's sum is the same wherever it is made, so every bit is. Ranks of a group need the same pieces: those of one
expert group have them, and all others gather behind the pass alone, as do nodes that sum results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.host_copies import CopyToHost, is_on_host, to_device
from ds_moe_ep.comm.lanes import TENSOR_LANE, Event, Lanes
from ds_moe_ep.comm.recorder import NOT_RECORDED
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.kernels.permute import RowMaps, collect, unpermute
from ds_moe_ep.moe.layout import RowLayout
from ds_moe_ep.moe.tensor_parallel.exchange import Spans, all_gather, begin_rows
from ds_moe_ep.schedule.build import Op, OpKind, Schedule

Sums = Callable[[Tensor, Tensor], Tensor]  # of some tokens [n], of the rows [N, D]: their values [n, D]


class SharedPass(Protocol):
    """The part of a pass that says what comes back when."""

    @property
    def forward(self) -> Schedule: ...

    @property
    def backward(self) -> Schedule: ...

    @property
    def layout(self) -> RowLayout: ...

    @property
    def transport(self) -> Transport: ...

    @property
    def use_triton(self) -> bool | None: ...


class EarlyGather:
    """The gathers of one pass and of the pass back. `arm` says what is to be gathered; where it cannot, nothing is."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self.takes_gradient = False  # of the tokens; set by whoever cuts them
        self._results: TokenGather | None = None
        self._begin_back: Callable[[Tensor], TokenGather] | None = None
        self._gradients: TokenGather | None = None

    @property
    def is_armed(self) -> bool:
        """True where results are gathered early, from `arm` to `begin_last`."""
        return self._results is not None

    def arm(
        self, context: SharedPass, maps: RowMaps, weights_TK: Tensor, rows_ND: Tensor, *, are_plain: bool = True
    ) -> EarlyGather | None:
        """Itself, where the group's tokens are gathered early, on all of its ranks; else None. Collective then.

        `rows_ND` are rows like the results. `are_plain`: no weights are in them, and a token's gradient is the sum of
        its rows'.
        """
        orders = [combines_of(context.forward)]
        is_of_one = set(dist.get_process_group_ranks(self._spans.group)) <= set(context.transport.ranks)
        if len(orders[0]) < 2 or context.forward.gathers or not is_of_one:
            return None
        if self.takes_gradient and are_plain:
            orders.append(combines_of(context.backward))
        told = tell(self._spans, [places_of(order, context.layout, maps) for order in orders], len(orders[0]))
        sums = partial(sums_of, weights_TK.detach(), maps, context.use_triton)
        self._results = TokenGather(self._spans, orders[0], told[0], sums, rows_ND)
        if len(orders) > 1:
            gradients = partial(gradients_of, maps, context.use_triton)
            self._begin_back = partial(TokenGather, self._spans, orders[1], told[1], gradients, ends_behind=False)
        return self

    @property
    def results(self) -> TokenGather:
        """The gather of the pass, once it is armed."""
        assert self._results is not None, "it is armed"
        return self._results

    def own(self, results_ND: Tensor) -> Tensor:
        """This rank's tokens, once all results are back; no gradient."""
        return self.results.own(results_ND)

    def begin_last(self) -> Callable[[], Tensor]:
        """Begins to gather the last tokens; the call of the result waits, once, for the tokens of all ranks."""
        results, self._results = self.results, None  # its buffers end with the pass
        return results.begin_last()

    def begin_back(self, gradients_ND: Tensor) -> TokenGather | None:
        """The gather of the tokens' gradients in a pass back that begins, with rows like these; None without any."""
        self._gradients = None if self._begin_back is None else self._begin_back(gradients_ND)
        return self._gradients

    def own_gradient(self) -> Tensor | None:
        """The gradient [t, D] of this rank's tokens behind the pass back; None where it was not summed early."""
        return None if self._gradients is None else self._gradients.own_TD

    def whole_gradient(self) -> Tensor | None:
        """The gradient [T, D] of all ranks' tokens, once; None where it was not gathered early."""
        gradients, self._gradients = self._gradients, None
        return None if gradients is None else gradients.all_TD


class TokenGather:
    """Tokens of one way through the experts: behind each combine those that it completes are summed and gathered.

    With `ends_behind` those of the last combine wait for `own` and `begin_last`, behind the pass.
    """

    def __init__(
        self,
        spans: Spans,
        order: Sequence[int],
        told: TokenOrder,
        sums: Sums,
        like_ND: Tensor,
        *,
        ends_behind: bool = True,
    ) -> None:
        self._order, self._told, self._sums, self._group = order, told, sums, spans.group
        self._ends_behind = ends_behind
        self.own_TD = like_ND.new_empty(spans.span(spans.rank)[1], like_ND.shape[1])
        self.all_TD = like_ND.new_empty(spans.num_tokens, like_ND.shape[1])

    def behind(self, op: Op, event: Event, lanes: Lanes, rows_ND: Tensor) -> list[Event]:
        """Lets the tokens that a combine completes follow it; the event of their arrival."""
        if op.kind is not OpKind.COMBINE or (self._ends_behind and op.piece == self._order[-1]):
            return []
        place = self._order.index(op.piece)
        return [lanes.issue(TENSOR_LANE, [event], partial(self._send, place, rows_ND), NOT_RECORDED)]

    def everything(self) -> list[Tensor]:
        """The tensors that its lane writes."""
        return [self.own_TD, self.all_TD]

    def own(self, rows_ND: Tensor) -> Tensor:
        """This rank's tokens, once all rows are back; no gradient."""
        self._sum(len(self._order) - 1, rows_ND)
        return self.own_TD

    def begin_last(self) -> Callable[[], Tensor]:
        """Begins to gather the last tokens; the call of the result waits, once, for the tokens of all ranks."""
        place = len(self._order) - 1
        arriving = self._begin(place, self._told.tokens(place))

        def finish() -> Tensor:
            if arriving is not None:
                arriving.wait()
            return self.all_TD

        return finish

    def _send(self, place: int, rows_ND: Tensor) -> Event | None:
        return self._begin(place, self._sum(place, rows_ND))

    def _sum(self, place: int, rows_ND: Tensor) -> Tensor:
        """Sums this rank's tokens of a place, and returns which they are."""
        tokens_n = self._told.tokens(place)
        if len(tokens_n):
            self.own_TD.index_copy_(0, tokens_n, self._sums(tokens_n, rows_ND))
        return tokens_n

    @torch.no_grad()
    def _begin(self, place: int, tokens_n: Tensor) -> _Arriving | None:
        counts = self._told.counts(place)
        if not any(counts):
            return None
        finish = begin_rows(self._group, counts, self.own_TD.index_select(0, tokens_n))
        return _Arriving(self.all_TD, self._told.tokens_of_all(place), finish)


class _Arriving:
    """Tokens of all ranks that are on their way to their places."""

    def __init__(self, all_TD: Tensor, tokens_n: Tensor, finish: Callable[[], Tensor]) -> None:
        self._all_TD, self._tokens_n, self._finish = all_TD, tokens_n, finish

    @torch.no_grad()
    def wait(self) -> None:
        self._all_TD.index_copy_(0, self._tokens_n, self._finish())


class TokenOrder:
    """Each rank's tokens in the order in which they are complete, and how many are in each place of it."""

    def __init__(self, spans: Spans, order_PT: Tensor, read: Callable[[], list[list[int]]]) -> None:
        self._spans, self._order_PT, self._read = spans, order_PT, read

    def counts(self, place: int) -> list[int]:
        """Tokens of each rank in a place. On CUDA the first call is a host sync, with the pass in the queue."""
        return [counts[place] for counts in self._read()]

    def tokens(self, place: int) -> Tensor:
        """This rank's tokens of a place, in its own span."""
        return self._tokens_of(self._spans.rank, place)

    def tokens_of_all(self, place: int) -> Tensor:
        """All ranks' tokens of a place, in the whole."""
        spans = self._spans
        return torch.cat([self._tokens_of(rank, place) + spans.span(rank)[0] for rank in range(spans.size)])

    def _tokens_of(self, rank: int, place: int) -> Tensor:
        first = sum(self.counts(before)[rank] for before in range(place))
        return self._order_PT[rank].narrow(0, first, self.counts(place)[rank])


def tell(spans: Spans, places: Sequence[Tensor], num_places: int) -> list[TokenOrder]:
    """Begins to tell the group of its ranks' places [T], of each way through the experts. Collective."""
    longest, mine = spans.span(0)[1], list[Tensor]()
    for places_T in places:
        mine.append((places_T.unsqueeze(1) == torch.arange(num_places, device=places_T.device)).sum(0))
        mine += [places_T.argsort(stable=True), places_T.new_zeros(longest - len(places_T))]
    sent = torch.cat(mine)
    told = sent.new_empty(spans.size * len(sent))
    work = all_gather(told, sent, group=spans.group, async_op=True)
    told_PWX = told.view(spans.size, len(places), num_places + longest)
    counts_PWS = told_PWX[..., :num_places]
    if is_on_host(told.device):
        copy = None
    else:  # in front of the pass: a lane that waits for a combine would wait for it
        work.wait()
        copy = CopyToHost(counts_PWS.flatten(1).contiguous())
    numbers: list[list[int]] = []  # of each rank, of all ways

    def read(way: int) -> list[list[int]]:
        if not numbers:
            if copy is None:
                work.wait()
            numbers.extend((copy or CopyToHost(counts_PWS.flatten(1))).wait())
        first = way * num_places
        return [counts[first : first + num_places] for counts in numbers]

    return [TokenOrder(spans, told_PWX[:, way, num_places:], partial(read, way)) for way in range(len(places))]


def combines_of(schedule: Schedule) -> tuple[int, ...]:
    """The pieces of a schedule as their rows come back."""
    return tuple(op.piece for op in schedule.ops if op.kind is OpKind.COMBINE)


def places_of(order: Sequence[int], layout: RowLayout, maps: RowMaps) -> Tensor:
    """For each token [T] the place, in the order of the pieces' combines, of the last of its rows. Local."""
    parts = sorted(
        (start, stop - start, place)
        for place, piece in enumerate(order)
        for _, (start, stop) in layout.pieces[piece].sent
        if start < stop
    )
    device, num_rows = maps.row_of_choice_TK.device, sum(count for _, count, _ in parts)
    columns = to_device([*(count for _, count, _ in parts), *(place for *_, place in parts)], device).view(
        2, len(parts)
    )
    place_N = torch.repeat_interleave(columns[1], columns[0], output_size=num_rows)
    place_N = torch.cat([place_N, place_N.new_zeros(1)])  # choices without a row point to the first one
    places_TK = place_N[maps.row_of_choice_TK]
    if maps.is_dropped_TK is not None:
        places_TK = places_TK.masked_fill(maps.is_dropped_TK, 0)
    return places_TK.amax(1)


@torch.no_grad()
def sums_of(weights_TK: Tensor, maps: RowMaps, in_triton: bool | None, tokens_n: Tensor, results_ND: Tensor) -> Tensor:
    """The weighted sums [n, D] of these tokens' rows, as `unpermute` makes them of all."""
    return unpermute(results_ND, weights_TK[tokens_n], maps_of_tokens(maps, tokens_n), (), in_triton)


@torch.no_grad()
def gradients_of(maps: RowMaps, in_triton: bool | None, tokens_n: Tensor, rows_ND: Tensor) -> Tensor:
    """The gradients [n, D] of these tokens from their rows', as the way back of `permute` makes them of all."""
    return collect(rows_ND, maps_of_tokens(maps, tokens_n), in_triton)


def maps_of_tokens(maps: RowMaps, tokens_n: Tensor) -> RowMaps:
    """The maps of these tokens' choices."""
    dropped_TK: Any = maps.is_dropped_TK
    return replace(
        maps,
        row_of_choice_TK=maps.row_of_choice_TK[tokens_n],
        is_dropped_TK=None if dropped_TK is None else dropped_TK[tokens_n],
    )
