"""Rows of random plans, moved by every schedule of every rank, against moving them one by one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config import MoEConfig
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.layout import RowLayout, lay_out
from ds_moe_ep.moe.plan import DispatchPlan
from ds_moe_ep.schedule import forward_schedule
from ds_moe_ep.topology import Torus

NO_MAPS = RowMaps(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64))


@settings(max_examples=60, deadline=None)
@given(
    torus=st.builds(Torus, st.integers(1, 3), st.integers(1, 3)),
    num_local=st.integers(1, 3),
    schedule=st.sampled_from(["serial", "chunks", "peers"]),
    cuts=st.integers(1, 3),
    data=st.data(),
)
def test_every_row_reaches_its_expert_in_source_order_and_is_computed_once(
    torus: Torus, num_local: int, schedule: str, cuts: int, data: st.DataObject
) -> None:
    size, counts = torus.size, st.integers(0, 5)
    rows = [
        [tuple(data.draw(counts) for _ in range(num_local)) for _ in range(size)] for _ in range(size)
    ]  # rows[source][destination][local expert]
    plans = [
        DispatchPlan(NO_MAPS, tuple(rows[rank]), tuple(rows[source][rank] for source in range(size)))
        for rank in range(size)
    ]
    pieces = forward_schedule(MoEConfig(schedule=schedule, row_cuts=cuts, chunks=cuts), torus).pieces
    layouts = [lay_out(plan, pieces, torus, rank) for rank, plan in enumerate(plans)]
    sent = [[(rank, d, e, i) for d in range(size) for e in range(num_local) for i in range(rows[rank][d][e])]
            for rank in range(size)]  # fmt: skip
    for rank in range(size):
        stacked = deliver(rank, layouts, sent)
        expected = [
            (source, rank, e, i)
            for e in range(num_local)
            for source in range(size)
            for i in range(rows[source][rank][e])
        ]
        assert stacked == expected
        spans = layouts[rank].expert_spans
        assert [stop - start for start, stop in spans] == [
            sum(rows[s][rank][e] for s in range(size)) for e in range(num_local)
        ]


def deliver(rank: int, layouts: list[RowLayout], sent: list[list[tuple[int, ...]]]) -> list[tuple[int, ...] | None]:
    """The rank's stacked rows after all pieces; asserts that messages match and each row is computed once."""
    layout = layouts[rank]
    wire: list[tuple[int, ...] | None] = [None] * layout.num_received
    stacked: list[tuple[int, ...] | None] = [None] * layout.num_received
    computed: list[int] = []
    for index, piece in enumerate(layout.pieces):
        for (start, stop), (to_start, to_stop) in piece.own:
            wire[to_start:to_stop] = sent[rank][start:stop]
        for source, (to_start, to_stop) in piece.received:
            ((_, (start, stop)),) = [m for m in layouts[source].pieces[index].sent if m[0] == rank]
            assert stop - start == to_stop - to_start, "both ends of a message agree on its size"
            wire[to_start:to_stop] = sent[source][start:stop]
        for start, to_start, num_rows in piece.moves:
            stacked[to_start : to_start + num_rows] = wire[start : start + num_rows]
        for expert, (start, stop) in piece.runs:
            first, last = layout.expert_spans[expert]
            assert first <= start < stop <= last
            computed += range(start, stop)
    assert sorted(computed) == list(range(layout.num_received))
    return wire if layout.is_stacked_on_arrival else stacked
