"""Buffers of a pass: the rows that leave, those that come, and the results on their way back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.comm.transport import CutMessages, Message, Views
from ds_moe_ep.moe.layout import PieceRows, RowLayout, Span
from ds_moe_ep.moe.rows.cuts import MessageCuts

Spans = Sequence[tuple[int, Span]]  # by peer


@dataclass(frozen=True)
class Buffers:
    """The rows of one pass. N sent and returned, R received.

    `wire_in` and `wire_out` are what the transport writes and reads on the experts' side: the stacked rows
    themselves, or, where received rows lie in another order, one staging buffer for both (a piece's results take the
    places of its inputs, which are stacked by then; there is no buffer of stacked results, each run spreads its own).
    With `returns_in_place` results come back over the sent rows: a piece's rows are gone when its results arrive.
    """

    sent_ND: Tensor
    wire_in_RD: Tensor
    inputs_RD: Tensor
    outputs_RD: Tensor
    wire_out_RD: Tensor
    results_ND: Tensor
    runs: RunViews | None = None  # of stacked rows, where no rows move
    order: RowOrder | None = None  # where rows move by index; run by run else
    sent_cuts: MessageCuts | None = None
    received_cuts: MessageCuts | None = None
    _views: dict[int, Views] = field(default_factory=dict)  # of the buffers, by their place in memory

    @classmethod
    def of(cls, sent_ND: Tensor, layout: RowLayout, num_ranks: int, returns_in_place: bool = False) -> Buffers:
        if num_ranks == 1:  # every row stays, in its place
            outputs_RD = torch.empty_like(sent_ND)
            runs = RunViews.of(layout, sent_ND, outputs_RD)
            return cls(sent_ND, sent_ND, sent_ND, outputs_RD, outputs_RD, outputs_RD, runs)
        cuts = (None, None) if sent_ND.is_cpu else (layout.sent_cuts, layout.received_cuts)
        inputs_RD = sent_ND.new_empty(layout.num_received, sent_ND.shape[1])
        results_ND = sent_ND if returns_in_place else torch.empty_like(sent_ND)
        if layout.is_stacked_on_arrival:
            outputs_RD = torch.empty_like(inputs_RD)
            runs = RunViews.of(layout, inputs_RD, outputs_RD)
            return cls(sent_ND, inputs_RD, inputs_RD, outputs_RD, outputs_RD, results_ND, runs, None, *cuts)
        wire_RD = torch.empty_like(inputs_RD)
        by_index = moves_by_index(sent_ND.device) or bool(layout.groupings)
        order = RowOrder.of(layout, sent_ND.device) if by_index else None
        return cls(sent_ND, wire_RD, inputs_RD, wire_RD[:0], wire_RD, results_ND, None, order, *cuts)

    def sent(self, rows_ND: Tensor, layout: RowLayout, piece: int) -> Sequence[Message]:
        """The messages of a piece to its peers, or those of its results from them, in one of these buffers."""
        return self._cut(rows_ND, layout.pieces[piece].sent, self.sent_cuts, piece)

    def received(self, rows_RD: Tensor, layout: RowLayout, piece: int) -> Sequence[Message]:
        """The messages of a piece from its peers, or those of its results to them, in one of these buffers."""
        return self._cut(rows_RD, layout.pieces[piece].received, self.received_cuts, piece)

    def _cut(self, rows_RD: Tensor, spans: Spans, cuts: MessageCuts | None, piece: int) -> Sequence[Message]:
        """The messages, on a device with views that all pieces share: there each is sent by itself."""
        if cuts is not None:
            views = self._views.get(id(rows_RD))
            if views is None and cuts.num_rows == rows_RD.shape[0]:
                views = self._views[id(rows_RD)] = Views(rows_RD, cuts.lengths)
            if views is not None:
                return CutMessages(rows_RD, spans, views, *cuts.pieces[piece])
        return [Message(peer, rows_RD, start, stop) for peer, (start, stop) in spans]

    def stack(self, rows: PieceRows) -> None:
        """Puts a piece's rows from where they came to where they are computed."""
        wire_nD = self.wire_in_RD[slice(*rows.wire)]
        if self.order is not None:
            self.inputs_RD.index_copy_(0, self.order.stacked_R[slice(*rows.wire)], wire_nD)
            return
        parts = wire_nD.split(rows.part_rows)
        for (_, (start, stop)), own in zip(rows.runs, rows.run_parts, strict=True):
            torch.cat([parts[part] for part in own], out=self.inputs_RD[start:stop])

    def runs_of(self, rows: PieceRows) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Each run of a piece: the expert, its stacked rows, their inputs, and a place to write their results to.

        Behind the last run all results lie on the wire.
        """
        if self.runs is not None:
            place_of, inputs, outputs = self.runs
            for expert, (start, stop) in rows.runs:
                place = place_of[start]
                yield expert, slice(start, stop), inputs[place], outputs[place]
            return
        for expert, here, out_nD in self._moved_runs_of(rows):
            yield expert, here, self.inputs_RD[here], out_nD

    def _moved_runs_of(self, rows: PieceRows) -> Iterator[tuple[int, slice, Tensor]]:
        """The same without the inputs, where views are made one by one."""
        if not rows.moves:
            for expert, (start, stop) in rows.runs:
                yield expert, slice(start, stop), self.outputs_RD[start:stop]
            return
        if self.order is None and len(rows.moves) == len(rows.runs):
            for (expert, (start, stop)), own in zip(rows.runs, rows.run_parts, strict=True):
                wire = rows.moves[own[0]][0]  # one peer's rows, which lie side by side there too
                yield expert, slice(start, stop), self.wire_out_RD[wire : wire + stop - start]
            return
        here = slice(*rows.wire)
        scratch_nD, first = torch.empty_like(self.wire_out_RD[here]), 0
        for expert, (start, stop) in rows.runs:
            yield expert, slice(start, stop), scratch_nD[first : first + stop - start]
            first += stop - start
        if self.order is not None:
            torch.index_select(scratch_nD, 0, self.order.computed_R[here], out=self.wire_out_RD[here])
            return
        computed = [part for own in rows.run_parts for part in own]
        parts = dict(zip(computed, scratch_nD.split([rows.part_rows[part] for part in computed]), strict=True))
        torch.cat([parts[part] for part in range(len(parts))], out=self.wire_out_RD[here])

    def groups_of(self, rows: PieceRows) -> tuple[tuple[int, slice], ...]:
        """Groups of experts whose products are made at once, and their stacked rows of a piece; none without rows."""
        return tuple((group, slice(*span)) for group, span in rows.runs)

    def spread(self, rows: PieceRows, here: slice, results_nD: Tensor) -> None:
        """Puts the results of a piece's stacked rows of one group to where they leave from."""
        if self.order is None:
            self.outputs_RD[here] = results_nD
        elif self.order.wire_R is not None:
            self.wire_out_RD.index_copy_(0, self.order.wire_R[here], results_nD)
        else:  # the whole piece
            wire = slice(*rows.wire)
            torch.index_select(results_nD, 0, self.order.computed_R[wire], out=self.wire_out_RD[wire])

    def everything(self) -> tuple[Tensor, ...]:
        return self.sent_ND, self.wire_in_RD, self.inputs_RD, self.outputs_RD, self.wire_out_RD, self.results_ND


class RunViews(NamedTuple):
    """Inputs and outputs of the runs of all pieces, each cut by one operation; the place of a run by its first row."""

    place_of: Mapping[int, int]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    @classmethod
    def of(cls, layout: RowLayout, inputs_RD: Tensor, outputs_RD: Tensor) -> RunViews | None:
        if (cuts := layout.run_cuts) is None or cuts.num_rows != inputs_RD.shape[0]:
            return None
        lengths, place_of, _ = cuts
        return cls(place_of, inputs_RD.split_with_sizes(lengths), outputs_RD.split_with_sizes(lengths))


@dataclass(frozen=True)
class RowOrder:
    """For each received row as it lies on the wire: its stacked place, and its place among what its piece computes.

    With many experts, a piece has a part of each expert's rows from each peer: as copies of slices they would be as
    many launches, by index they are one launch for each way. `wire_R`: where a piece's rows are computed in several
    groups, the place on the wire of each stacked row.
    """

    stacked_R: Tensor
    computed_R: Tensor
    wire_R: Tensor | None = None

    @classmethod
    def of(cls, layout: RowLayout, device: torch.device) -> RowOrder:
        """From the lengths of the parts, which are few; no device sync."""
        parts: list[tuple[int, int, int]] = []  # how far behind its place on the wire either other place is, rows
        for rows in layout.pieces:
            computed_at = dict[int, int]()  # of a run, by its first stacked row
            for _, (start, _) in rows.runs:
                computed_at[start] = sum(other - first for _, (first, other) in rows.runs if first < start)
            starts = sorted(computed_at)
            for wire, stacked, num_rows in rows.moves:
                run = starts[bisect_right(starts, stacked) - 1]
                parts.append((stacked - wire, computed_at[run] + stacked - run - wire, num_rows))
        columns = to_device([value for column in zip(*parts, strict=True) for value in column], device).view(3, -1)
        num_rows = sum(part[2] for part in parts)
        behind = torch.repeat_interleave(columns[:2], columns[2], dim=1, output_size=num_rows)
        wire_order_R = torch.arange(num_rows, device=device)
        stacked_R, computed_R = behind + wire_order_R
        if len(layout.groupings) <= 1:
            return cls(stacked_R, computed_R)
        return cls(stacked_R, computed_R, torch.empty_like(stacked_R).index_copy_(0, stacked_R, wire_order_R))


def moves_by_index(device: torch.device) -> bool:
    """True where a launch costs more than what it moves; on the CPU copies of slices are faster than gathers."""
    return device.type != "cpu"
