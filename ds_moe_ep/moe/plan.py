"""From routing to rows: who sends which rows to whom, in what order.

1. Sort the choices by expert, which sorts them by (destination rank, local expert), stable in token order.
2. Count them, and exchange the counts in one small all-to-all, together with what the ranks must agree on.
3. Bring the counts to the host: the layer's only device sync, since message sizes are host integers. With a capacity
   every expert has the same number of rows, padded ones included, and nothing is synchronised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.router import Routes
from ds_moe_ep.timeline import Tags

Counts = tuple[tuple[int, ...], ...]

BAD_INPUT = -1  # what a rank announces in place of a width
NUM_HEAD = 8  # columns before the counts: `Agreed`, and whether the rank sees drift
ROW_COLUMNS = 32  # the exchange has a multiple of so many: ranks in different layers must get each other's heads
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Call:
    """Which call of which layer a plan is for. Ranks of a group must be in the same, and have chosen one schedule."""

    layer: str = ""
    number: int = 0
    schedule: str = ""  # a text that is equal where the schedules are

    @property
    def tags(self) -> Tags:
        """Where the exchange of counts is, for an error."""
        return Tags(self.layer, "forward")


NO_CALL = Call()


class Agreed(NamedTuple):
    """What all ranks must have alike before rows move."""

    width: int
    dtype: int
    capacity: int
    num_experts: int
    layer: int
    call: int
    schedule: int


@dataclass(frozen=True)
class DispatchPlan:
    """Rows by peer P and local expert L, sent and received; `maps` ties sent rows to choices.

    Sent rows lie by (peer, local expert of the peer); the sum of `send_rows_PL` is the number of rows N.
    """

    maps: RowMaps
    send_rows_PL: Counts
    recv_rows_PL: Counts
    is_drift_seen: bool = False  # by any rank of the group: all of them read the same

    @property
    def num_received(self) -> int:
        return sum(map(sum, self.recv_rows_PL))


def make_plan(
    routing: Routes,
    num_experts: int,
    transport: Transport,
    row_type: tuple[int, torch.dtype],
    sees_drift: bool = False,
    call: Call = NO_CALL,
) -> DispatchPlan:
    """The plan of this rank's tokens. Collective over the expert group; one device sync, none with a capacity.

    `row_type` is the width and dtype of a row; `sees_drift` is told to all ranks. Raises EngineError on every rank when
    ranks disagree on the type, the capacity or the call (on CUDA with a capacity the check would be a sync, and is left
    out).
    """
    exchange = _Exchange(transport, call, num_experts, row_type, sees_drift)
    if routing.capacity is not None:
        return _padded_plan(routing, num_experts, exchange)
    num_choices = routing.expert_ids_TK.numel()
    ids_N = routing.expert_ids_TK.flatten()
    if routing.is_used_TK is not None:
        ids_N = torch.where(routing.is_used_TK.flatten(), ids_N, num_experts)
    choice_of_row_N = ids_N.argsort(stable=True)
    count_E = ids_N.new_zeros(num_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    send_PL = count_E[:num_experts].view(transport.size, -1)
    send, recv, is_drift_seen = exchange.run(send_PL)
    row_of_choice_N = torch.empty_like(choice_of_row_N)
    row_of_choice_N[choice_of_row_N] = torch.arange(num_choices, device=ids_N.device)
    is_dropped_TK = None
    if routing.is_used_TK is not None:
        num_rows = sum(map(sum, send))
        choice_of_row_N = choice_of_row_N[:num_rows]
        is_dropped_TK = ~routing.is_used_TK
        row_of_choice_N = row_of_choice_N.masked_fill(is_dropped_TK.flatten(), 0)
    maps = RowMaps(choice_of_row_N, row_of_choice_N.view_as(routing.expert_ids_TK), None, is_dropped_TK)
    return DispatchPlan(maps, send, recv, is_drift_seen)


def _padded_plan(routing: Routes, num_experts: int, exchange: _Exchange) -> DispatchPlan:
    """Every expert gets `capacity` rows from every rank, padded where it was chosen less often."""
    capacity, is_kept_TK, place_TK = routing.capacity, routing.is_kept_TK, routing.place_TK
    assert capacity is not None and is_kept_TK is not None and place_TK is not None
    ids_TK, num_rows = routing.expert_ids_TK, num_experts * capacity
    row_TK = torch.where(is_kept_TK, ids_TK * capacity + place_TK, num_rows)  # the last row takes what is dropped
    choice_of_row_N = ids_TK.new_zeros(num_rows + 1)
    choice_of_row_N[row_TK.flatten()] = torch.arange(ids_TK.numel(), device=ids_TK.device)
    is_padding_N = torch.ones_like(choice_of_row_N, dtype=torch.bool)
    is_padding_N[row_TK.flatten()] = False
    is_dropped_TK = ~is_kept_TK
    maps = RowMaps(
        choice_of_row_N[:num_rows], row_TK.masked_fill(is_dropped_TK, 0), is_padding_N[:num_rows], is_dropped_TK
    )
    num_peers = exchange.transport.size
    counts = ((capacity,) * (num_experts // num_peers),) * num_peers
    is_drift_seen = False
    if ids_TK.device.type == "cpu":
        *_, is_drift_seen = exchange.run(torch.tensor(counts), capacity)
    return DispatchPlan(maps, counts, counts, is_drift_seen)


@dataclass(frozen=True)
class _Exchange:
    """The exchange of counts of one call."""

    transport: Transport
    call: Call
    num_experts: int
    row_type: tuple[int, torch.dtype]
    sees_drift: bool

    def run(self, send_PL: Tensor, capacity: int = -1) -> tuple[Counts, Counts, bool]:
        """Sent and received counts on the host, and whether any rank sees drift. Raises where the ranks disagree."""
        width, dtype = self.row_type
        layer, schedule = (crc32(text.encode()) for text in (self.call.layer, self.call.schedule))
        own = Agreed(width, DTYPES.index(dtype), capacity, self.num_experts, layer, self.call.number, schedule)
        num_peers, num_local = send_PL.shape
        stop = NUM_HEAD + num_local
        send_PC = send_PL.new_zeros(num_peers, num_columns(num_local))
        send_PC[:, :NUM_HEAD] = send_PL.new_tensor((*own, int(self.sees_drift)))
        send_PC[:, NUM_HEAD:stop] = send_PL
        recv_PC = self.transport.exchange_counts(send_PC, self.call.tags)
        both = torch.stack([send_PC, recv_PC]).tolist()  # the layer's only device sync
        self._check(own, [Agreed(*row[: len(own)]) for row in both[1]])
        send, recv = (tuple(tuple(row[NUM_HEAD:stop]) for row in rows) for rows in both)
        return send, recv, any(row[NUM_HEAD - 1] for row in both[1])

    def _check(self, own: Agreed, theirs: list[Agreed]) -> None:
        """Raises EngineError where a peer refused its input, or has something else than this rank."""
        layer, ranks = self.call.layer or "MoE layer", self.transport.ranks
        for peer, agreed in enumerate(theirs):
            if agreed.width == BAD_INPUT:
                raise EngineError(f"{layer}: rank {ranks[peer]} refused its input: its own error says why")
        odd = [peer for peer, agreed in enumerate(theirs) if agreed != own]
        if odd:
            differences = "; ".join(
                f"{describe(own, theirs[peer])[0]} on rank {ranks[self.transport.rank]}, "
                f"{describe(own, theirs[peer])[1]} on rank {ranks[peer]}"
                for peer in odd[:3]
            )
            why = self.transport.explain(odd) if any(theirs[peer].layer != own.layer for peer in odd) else ""
            raise EngineError(
                f"{layer}: {differences}{f' ({why})' if why else ''}: all ranks of the group need the same; give every "
                "rank the same model, call its layers in the same order and equally often, and, with a capacity, with "
                "the same number of tokens"
            )


def num_columns(num_local_experts: int) -> int:
    """Columns of the exchange: the head and the counts, rounded up."""
    return -(-(NUM_HEAD + num_local_experts) // ROW_COLUMNS) * ROW_COLUMNS


def describe(own: Agreed, other: Agreed) -> tuple[str, str]:
    """What two ranks have where they differ, for an error."""
    if own.layer != other.layer:
        return "this layer", "another layer"
    odd = [name for name, a, b in zip(Agreed._fields, own, other, strict=True) if a != b]
    values = [[f"{name}={_shown(name, getattr(agreed, name))}" for name in odd] for agreed in (own, other)]
    return ", ".join(values[0]), ", ".join(values[1])


def _shown(name: str, value: int) -> str:
    if name == "dtype":
        return str(DTYPES[value])
    if name == "capacity" and value < 0:
        return "none"
    return f"{value:08x}" if name == "schedule" else str(value)


def announce_bad_input(
    transport: Transport, num_local_experts: int, device: torch.device, call: Call = NO_CALL
) -> None:
    """Tells the peers, which wait in their exchange of counts, that this rank is about to raise. Collective."""
    counts_PC = torch.zeros(transport.size, num_columns(num_local_experts), dtype=torch.int64, device=device)
    counts_PC[:, 0] = BAD_INPUT
    transport.exchange_counts(counts_PC, call.tags)
