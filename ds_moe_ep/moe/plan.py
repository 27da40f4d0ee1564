"""From routing to rows: who sends which rows to whom, in what order.

1. Sort the choices by expert, which sorts them by (destination rank, local expert), stable in token order.
2. Count them, and exchange the counts in one small all-to-all, together with what the ranks must agree on.
3. Bring the counts to the host: the layer's only device sync, since message sizes are host integers. With a capacity
   every expert has the same number of rows, padded ones included, and nothing is synchronised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.router import Routes

Counts = tuple[tuple[int, ...], ...]

BAD_INPUT = (-1, -1, -1)  # what a rank announces in place of width, dtype and capacity
NUM_HEAD = len(BAD_INPUT) + 1  # columns before the counts: those three, and whether the rank sees drift
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
) -> DispatchPlan:
    """The plan of this rank's tokens. Collective over the expert group; one device sync, none with a capacity.

    `row_type` is the width and dtype of a row; `sees_drift` is told to all ranks. Raises EngineError on every rank when
    ranks disagree on the type or on the capacity (on CUDA with a capacity the check would be a sync, and is left out).
    """
    if routing.capacity is not None:
        return _padded_plan(routing, num_experts, transport, row_type, sees_drift)
    num_choices = routing.expert_ids_TK.numel()
    ids_N = routing.expert_ids_TK.flatten()
    if routing.is_used_TK is not None:
        ids_N = torch.where(routing.is_used_TK.flatten(), ids_N, num_experts)
    choice_of_row_N = ids_N.argsort(stable=True)
    count_E = ids_N.new_zeros(num_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    send_PL = count_E[:num_experts].view(transport.size, -1)
    send, recv, is_drift_seen = _exchange(send_PL, transport, (*row_type, -1), sees_drift)
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


def _padded_plan(
    routing: Routes, num_experts: int, transport: Transport, row_type: tuple[int, torch.dtype], sees_drift: bool
) -> DispatchPlan:
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
    counts = ((capacity,) * (num_experts // transport.size),) * transport.size
    is_drift_seen = False
    if ids_TK.device.type == "cpu":
        *_, is_drift_seen = _exchange(torch.tensor(counts), transport, (*row_type, capacity), sees_drift)
    return DispatchPlan(maps, counts, counts, is_drift_seen)


def _exchange(
    send_PL: Tensor, transport: Transport, row_type: tuple[int, torch.dtype, int], sees_drift: bool
) -> tuple[Counts, Counts, bool]:
    """Sent and received counts on the host, and whether any rank sees drift.

    The peers' agreement on `row_type` (row width, dtype and capacity) is checked.
    """
    width, dtype, capacity = row_type
    own = (width, DTYPES.index(dtype), capacity)
    head_PH = send_PL.new_tensor((*own, int(sees_drift))).expand(transport.size, NUM_HEAD)
    recv_PC = transport.exchange_counts(torch.cat([head_PH, send_PL], 1))
    both = torch.stack([torch.cat([head_PH, send_PL], 1), recv_PC]).tolist()  # the layer's only device sync
    for peer, theirs in enumerate(tuple(row[: len(own)]) for row in both[1]):
        if theirs == BAD_INPUT:
            raise EngineError(f"rank {peer} of the expert-parallel group refused its input: its own error says why")
        if theirs != own:
            raise EngineError(
                f"{describe(own)} on rank {transport.rank} of the expert-parallel group, {describe(theirs)} on rank "
                f"{peer}: all ranks need the same; give every rank the same model and, with a capacity, the same "
                "number of tokens"
            )
    send, recv = (tuple(tuple(row[NUM_HEAD:]) for row in rows) for rows in both)
    return send, recv, any(row[NUM_HEAD - 1] for row in both[1])


def describe(agreed: tuple[int, ...]) -> str:
    """The values that ranks must agree on, for an error."""
    width, dtype, capacity = agreed
    return f"rows of width={width}, dtype={DTYPES[dtype]}, capacity={'none' if capacity < 0 else capacity}"


def announce_bad_input(transport: Transport, num_local_experts: int, device: torch.device) -> None:
    """Tells the peers, which wait in their exchange of counts, that this rank is about to raise. Collective."""
    counts_PC = torch.tensor([*BAD_INPUT, 0, *[0] * num_local_experts], device=device)
    transport.exchange_counts(counts_PC.expand(transport.size, -1).contiguous())
