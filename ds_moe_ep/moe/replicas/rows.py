"""Rows of a pass whose experts have several hosts.

The choices are sorted by expert as without replicas. A source's rows of one expert are then cut, in their order, by the
shares of its hosts, and the parts are put in the order of (host, place on the host). From there on a copy is one more
local expert.
"""

from __future__ import annotations

from itertools import accumulate, chain

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.kernels.sort import SortedChoices
from ds_moe_ep.schedule.assignment import Assignment


def maps_to_hosts(in_order: SortedChoices, is_used_TK: Tensor | None, assignment: Assignment, rank: int) -> RowMaps:
    """Which choice fills which row in send order, and back. Local; no device sync.

    `is_used_TK` is None where every choice travels.
    """
    num_rows = sum(assignment.rows_RE[rank])
    if not assignment.split or not num_rows:
        return maps_of(in_order, is_used_TK, num_rows)
    choice_of_row_N = in_order.choice_of_row_N[:num_rows]
    sorted_row_N, sent_row_N = _moves(assignment, rank, choice_of_row_N.device)
    row_of_choice_TK = sent_row_N[in_order.row_of_choice_TK.clamp(max=num_rows - 1)]
    return maps_of(
        SortedChoices(choice_of_row_N[sorted_row_N], row_of_choice_TK, in_order.count_E), is_used_TK, num_rows
    )


def maps_of(in_order: SortedChoices, is_used_TK: Tensor | None, num_rows: int) -> RowMaps:
    """The maps of choices in the order in which their rows are sent. Local; no device sync."""
    return RowMaps.of_used(in_order.choice_of_row_N[:num_rows], in_order.row_of_choice_TK, is_used_TK)


def _moves(assignment: Assignment, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row by expert of each row in send order, and the row in send order of each row by expert."""
    parts = [part for part in assignment.parts(rank) if part[2]]
    place_on = assignment.placement.place_on
    order = sorted(range(len(parts)), key=lambda i: (parts[i][1], place_on(parts[i][1], parts[i][0])))
    sorted_at = list(accumulate((rows for *_, rows in parts), initial=0))
    sent_at, start = [0] * len(parts), 0
    for index in order:
        sent_at[index] = start
        start += parts[index][2]
    ahead = [there - here for there, here in zip(sent_at, sorted_at, strict=False)]
    columns = [[ahead[i] for i in order], [parts[i][2] for i in order], ahead, [rows for *_, rows in parts]]
    ahead_in_order, rows_in_order, ahead_P, rows_P = to_device([*chain(*columns)], device).view(4, -1)
    row_N = torch.arange(start, device=device)
    sorted_row_N = row_N - torch.repeat_interleave(ahead_in_order, rows_in_order, output_size=start)
    return sorted_row_N, row_N + torch.repeat_interleave(ahead_P, rows_P, output_size=start)
