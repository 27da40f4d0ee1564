"""Buffers that are cut by one operation: every message and every product finds its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_moe_ep.comm.transport import CutMessages, Message
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.layout import RowLayout, lay_out
from ds_moe_ep.moe.rows.buffers import Buffers, RunViews
from ds_moe_ep.moe.rows.cuts import Cuts, MessageCuts
from ds_moe_ep.schedule.build import forward_schedule

TORUS, RANK = Torus(2, 2), 1
SENT = ((3,), (0,), (5,), (2,))  # rows to each rank, none to itself
RECEIVED = ((4,), (0,), (1,), (6,))


def layout_of(schedule: str) -> RowLayout:
    none = torch.empty(0, dtype=torch.int64)
    plan = DispatchPlan(RowMaps(none, none.view(0, 1)), SENT, RECEIVED)
    config = MoEConfig(num_experts=TORUS.size, ep_size=TORUS.size, schedule=schedule)
    return lay_out(plan, forward_schedule(config, TORUS), RANK)


def numbered(num_rows: int) -> Tensor:
    return torch.arange(num_rows, dtype=torch.float32).unsqueeze(1)


def test_spans_that_tile_a_buffer_are_cuts_and_no_others() -> None:
    assert Cuts.of([(4, 6), (0, 4)]) == Cuts([4, 2], {0: 0, 4: 1, 6: 2}, 6)
    assert Cuts.of([]) == Cuts([], {0: 0}, 0)
    assert Cuts.of([(0, 4), (5, 6)]) is None  # a row is left out
    assert Cuts.of([(0, 4), (3, 6)]) is None  # one is there twice
    assert Cuts.of([(1, 4)]) is None


@pytest.mark.parametrize("schedule", ["serial", "peers", "chunks"])
def test_every_message_has_the_rows_of_its_span_and_empty_ones_are_left_out(schedule: str) -> None:
    layout = layout_of(schedule)
    for cuts, rows in ((layout.sent_cuts, "sent"), (layout.received_cuts, "received")):
        assert cuts is not None
        parts = numbered(cuts.num_rows).split(cuts.lengths)
        for piece, (own, others) in zip(layout.pieces, cuts.pieces, strict=True):
            spans = {peer: span for peer, span in getattr(piece, rows) if span[0] < span[1]}
            assert own == [] and RANK not in spans
            assert {peer: parts[place].flatten().tolist() for place, peer in others} == {
                peer: list(map(float, range(*span))) for peer, span in spans.items()
            }


def test_rows_that_stay_are_the_ranks_own() -> None:
    cuts = MessageCuts.of([[(0, (0, 2)), (1, (2, 5))], [(2, (5, 5)), (3, (5, 6))]], rank=1)
    assert cuts == MessageCuts([2, 3, 1], [([1], [(0, 0)]), ([], [(2, 3)])], 6)


@pytest.mark.parametrize("schedule", ["serial", "peers", "chunks"])
def test_views_of_runs_are_those_that_slices_give(schedule: str) -> None:
    layout = layout_of(schedule)
    buffers = Buffers.of(numbered(10), layout, TORUS.size)
    assert buffers.runs is not None and buffers.inputs_RD.shape[0] == 11
    buffers.inputs_RD.copy_(numbered(11))
    one_by_one = replace(buffers, runs=None)
    moved = RunViews(dict.fromkeys(buffers.runs.place_of, 0), buffers.runs.inputs, buffers.runs.outputs)

    def told(of: Buffers) -> list[tuple[int, slice, list[float], int]]:
        return [
            (expert, here, in_nD.flatten().tolist(), out_nD.data_ptr())
            for piece in layout.pieces
            for expert, here, in_nD, out_nD in of.runs_of(piece)
        ]

    assert told(buffers) == told(one_by_one)
    if len(buffers.runs.inputs) > 1:
        assert told(replace(buffers, runs=moved)) != told(one_by_one)  # the control: each run at the first one's place


def test_on_a_device_messages_share_their_views_and_on_the_host_they_have_none() -> None:
    layout = layout_of("peers")
    on_host, on_device = (Buffers.of(numbered(10).to(device), layout, TORUS.size) for device in ("cpu", "meta"))
    spans_of_pieces = [[span for _, span in rows.sent] for rows in layout.pieces]
    piece = next(index for index, spans in enumerate(spans_of_pieces) if any(start < stop for start, stop in spans))
    sent, again = (on_device.sent(on_device.sent_ND, layout, piece) for _ in range(2))
    assert isinstance(sent, CutMessages) and isinstance(again, CutMessages) and sent.views is again.views
    assert [len(message) for message in sent] == [stop - start for start, stop in spans_of_pieces[piece]]
    assert all(type(message) is Message for message in on_host.sent(on_host.sent_ND, layout, piece))
