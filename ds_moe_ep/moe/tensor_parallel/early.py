"""`EarlyGather`: results on their way to the ranks of a tensor group while others still come back from their experts.

1. Each rank sorts its tokens by the combine behind which the last of their rows is back, and tells the group that order
   and how many tokens each combine completes.
2. Behind each combine but the last one those tokens are summed, as they would be at the end, and gathered on a lane of
   their own, under the computations and transfers that follow.
3. What the last combine completes is gathered behind the pass, while the caller may compute.

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
from ds_moe_ep.kernels.permute import RowMaps, unpermute
from ds_moe_ep.moe.layout import RowLayout
from ds_moe_ep.moe.tensor_parallel.exchange import Spans, all_gather, begin_rows
from ds_moe_ep.schedule.build import Op, OpKind, Schedule


class SharedPass(Protocol):
    """The part of a pass that says what comes back when."""

    @property
    def forward(self) -> Schedule: ...

    @property
    def layout(self) -> RowLayout: ...

    @property
    def transport(self) -> Transport: ...

    @property
    def use_triton(self) -> bool | None: ...


class EarlyGather:
    """The gather of one pass. `arm` says what is to be gathered; until then, and where it cannot be, nothing is."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans
        self._order: tuple[int, ...] = ()  # the pieces as their results come back
        self._told: _Told | None = None
        self._sums: Callable[[Tensor, Tensor], Tensor] | None = None
        self._own_TD: Tensor | None = None  # this rank's tokens
        self._all_TD: Tensor | None = None

    @property
    def is_armed(self) -> bool:
        """True where results are gathered early."""
        return self._told is not None

    def arm(self, context: SharedPass, maps: RowMaps, weights_TK: Tensor, rows_ND: Tensor) -> EarlyGather | None:
        """Itself, where the group's tokens are gathered early, on all of its ranks; else None. Collective then.

        `rows_ND` are rows like the results.
        """
        order = tuple(op.piece for op in context.forward.ops if op.kind is OpKind.COMBINE)
        is_of_one = set(dist.get_process_group_ranks(self._spans.group)) <= set(context.transport.ranks)
        if len(order) < 2 or context.forward.gathers or not is_of_one:
            return None
        self._order = order
        self._told = _Told(self._spans, places_of(order, context.layout, maps), len(order))
        self._sums = partial(sums_of, weights_TK.detach(), maps, context.use_triton)
        self._own_TD = rows_ND.new_empty(weights_TK.shape[0], rows_ND.shape[1])
        self._all_TD = rows_ND.new_empty(self._spans.num_tokens, rows_ND.shape[1])
        return self

    def behind(self, op: Op, event: Event, lanes: Lanes, results_ND: Tensor) -> list[Event]:
        """Lets the tokens that a combine completes follow it; the event of their arrival."""
        if op.kind is not OpKind.COMBINE or op.piece == self._order[-1]:
            return []
        place = self._order.index(op.piece)
        return [lanes.issue(TENSOR_LANE, [event], partial(self._send, place, results_ND), NOT_RECORDED)]

    def everything(self) -> list[Tensor]:
        """The tensors that its lane writes."""
        return [tensor for tensor in (self._own_TD, self._all_TD) if tensor is not None]

    def own(self, results_ND: Tensor) -> Tensor:
        """This rank's tokens, once all results are back; no gradient."""
        self._sum(len(self._order) - 1, results_ND)
        assert self._own_TD is not None
        return self._own_TD

    def begin_last(self) -> Callable[[], Tensor]:
        """Begins to gather the last tokens; the call of the result waits, once, for the tokens of all ranks."""
        place = len(self._order) - 1
        arriving = self._begin(place, self._known.tokens(place))

        def finish() -> Tensor:
            if arriving is not None:
                arriving.wait()
            assert self._all_TD is not None
            return self._all_TD

        return finish

    @property
    def _known(self) -> _Told:
        assert self._told is not None, "it is armed"
        return self._told

    def _send(self, place: int, results_ND: Tensor) -> Event | None:
        return self._begin(place, self._sum(place, results_ND))

    def _sum(self, place: int, results_ND: Tensor) -> Tensor:
        """Sums this rank's tokens of a place, and returns which they are."""
        tokens_n = self._known.tokens(place)
        assert self._sums is not None and self._own_TD is not None
        if len(tokens_n):
            self._own_TD.index_copy_(0, tokens_n, self._sums(tokens_n, results_ND))
        return tokens_n

    @torch.no_grad()
    def _begin(self, place: int, tokens_n: Tensor) -> _Arriving | None:
        counts = self._known.counts(place)
        if not any(counts):
            return None
        assert self._own_TD is not None and self._all_TD is not None
        finish = begin_rows(self._spans.group, counts, self._own_TD.index_select(0, tokens_n))
        return _Arriving(self._all_TD, self._known.tokens_of_all(place), finish)


class _Arriving:
    """Tokens of all ranks that are on their way to their places."""

    def __init__(self, all_TD: Tensor, tokens_n: Tensor, finish: Callable[[], Tensor]) -> None:
        self._all_TD, self._tokens_n, self._finish = all_TD, tokens_n, finish

    @torch.no_grad()
    def wait(self) -> None:
        self._all_TD.index_copy_(0, self._tokens_n, self._finish())


class _Told:
    """Each rank's tokens in the order in which they are complete, and how many are in each place of it."""

    def __init__(self, spans: Spans, places_T: Tensor, num_places: int) -> None:
        """Begins to tell the group of its ranks' places [T]. Collective."""
        self._spans, longest = spans, spans.span(0)[1]
        counts = (places_T.unsqueeze(1) == torch.arange(num_places, device=places_T.device)).sum(0)
        order_T = torch.cat([places_T.argsort(stable=True), places_T.new_zeros(longest - len(places_T))])
        mine = torch.cat([counts, order_T])
        told = mine.new_empty(spans.size * len(mine))
        self._work = all_gather(told, mine, group=spans.group, async_op=True)
        counts_and_order = told.view(spans.size, -1)
        self._counts_PS: Tensor = counts_and_order[:, :num_places]
        self._order_PT: Tensor = counts_and_order[:, num_places:]
        self._copy: CopyToHost | None = None
        if not is_on_host(places_T.device):  # in front of the pass: a lane that waits for a combine would wait for it
            self._work.wait()
            self._copy = CopyToHost(self._counts_PS.contiguous())
        self._numbers: list[list[int]] | None = None

    def counts(self, place: int) -> list[int]:
        """Tokens of each rank in a place. On CUDA the first call is a host sync, with the pass in the queue."""
        if self._numbers is None:
            if self._copy is None:
                self._work.wait()
            copy = self._copy or CopyToHost(self._counts_PS)
            self._numbers = copy.wait()
        return [counts[place] for counts in self._numbers]

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
    dropped_TK: Any = maps.is_dropped_TK
    some = replace(
        maps,
        row_of_choice_TK=maps.row_of_choice_TK[tokens_n],
        is_dropped_TK=None if dropped_TK is None else dropped_TK[tokens_n],
    )
    return unpermute(results_ND, weights_TK[tokens_n], some, (), in_triton)
