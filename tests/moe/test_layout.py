"""Rows of random plans, moved by every schedule of every rank, against moving them one by one."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.layout import LastLayout, RowLayout, lay_out
from ds_moe_ep.schedule.build import forward_schedule

NO_MAPS = RowMaps(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64))


@settings(max_examples=60, deadline=None)
@given(
    torus=st.builds(Torus, st.integers(1, 3), st.integers(1, 3)),
    num_local=st.integers(1, 3),
    schedule=st.sampled_from(["serial", "chunks", "peers"]),
    cuts=st.integers(1, 3),
    bit_equal=st.booleans(),
    data=st.data(),
)
def test_every_row_reaches_its_expert_and_is_computed_once_in_an_order_that_bit_equal_schedules_share(
    torus: Torus, num_local: int, schedule: str, cuts: int, bit_equal: bool, data: st.DataObject
) -> None:
    size = torus.size
    rows = draw_rows(data, size, num_local)
    made = forward_schedule(MoEConfig(schedule=schedule, row_cuts=cuts, chunks=cuts, bit_equal=bit_equal), torus)
    layouts = [lay_out(plan, made, rank) for rank, plan in enumerate(plans_of(rows))]
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
        spans = layouts[rank].expert_spans
        if bit_equal:
            assert stacked == expected
        else:
            assert [sorted(stacked[start:stop]) for start, stop in spans] == [expected[a:b] for a, b in spans]
            for piece in layouts[rank].pieces:
                experts = [expert for expert, _ in piece.runs]
                assert len(experts) == len({*experts}), "a piece's rows of an expert are one run"
        assert [stop - start for start, stop in spans] == [
            sum(rows[s][rank][e] for s in range(size)) for e in range(num_local)
        ]


@settings(max_examples=60, deadline=None)
@given(
    torus=st.builds(Torus, st.integers(1, 6), st.integers(1, 2)),
    num_local=st.integers(1, 3),
    schedule=st.sampled_from(["serial", "chunks", "peers"]),
    data=st.data(),
)
def test_weight_runs_are_each_blocks_rows_by_expert_in_every_schedule(
    torus: Torus, num_local: int, schedule: str, data: st.DataObject
) -> None:
    rows = draw_rows(data, torus.size, num_local)
    made = forward_schedule(MoEConfig(schedule=schedule, bit_equal=True), torus)
    for rank, plan in enumerate(plans_of(rows)):
        layout = lay_out(plan, made, rank)
        stacked = [
            (e, source) for e in range(num_local) for source in range(torus.size) for _ in range(rows[source][rank][e])
        ]
        for block, runs in zip(made.blocks, layout.weight_runs, strict=True):
            sources = {torus.source(rank, offset) for offset in block}
            expected = [(e, index) for index, (e, source) in enumerate(stacked) if source in sources]
            assert [(e, index) for e, (start, stop) in runs for index in range(start, stop)] == expected


@settings(deadline=None)
@given(
    torus=st.builds(Torus, st.integers(1, 4), st.integers(1, 3)),
    schedule=st.sampled_from(["serial", "chunks", "peers"]),
    cuts=st.integers(1, 5),
    num_tokens=st.integers(0, 9),
)
def test_the_shared_expert_takes_each_token_once_beside_rows_of_the_first_weight_block(
    torus: Torus, schedule: str, cuts: int, num_tokens: int
) -> None:
    made = forward_schedule(MoEConfig(schedule=schedule, row_cuts=cuts, chunks=cuts), torus)
    no_rows, pieces = ((0,),) * torus.size, made.pieces
    layout = lay_out(DispatchPlan(NO_MAPS, no_rows, no_rows), made, 0, num_tokens)
    tokens = [token for rows in layout.pieces for token in range(*rows.tokens)]
    assert sorted(tokens) == list(range(num_tokens))
    near = set(made.blocks[0])  # whose weight gradients the shared expert's come with
    assert all(near & set(p.offsets) for p, rows in zip(pieces, layout.pieces, strict=True) if range(*rows.tokens))


@settings(max_examples=40, deadline=None)
@given(
    torus=st.builds(Torus, st.integers(1, 5), st.integers(1, 2)),
    num_local=st.integers(1, 3),
    schedule=st.sampled_from(["serial", "chunks", "peers"]),
    num_blocks=st.integers(1, 4),
    cuts=st.integers(1, 3),
    data=st.data(),
)
def test_a_block_of_weight_gradients_is_one_run_per_expert(
    torus: Torus, num_local: int, schedule: str, num_blocks: int, cuts: int, data: st.DataObject
) -> None:
    knobs = MoEConfig(schedule=schedule, weight_blocks=num_blocks, row_cuts=cuts, chunks=cuts)
    made = forward_schedule(knobs, torus)
    rows = draw_rows(data, torus.size, num_local)
    for rank, plan in enumerate(plans_of(rows)):
        layout = lay_out(plan, made, rank)
        for block, runs in zip(made.blocks, layout.weight_runs, strict=True):
            sources = [torus.source(rank, offset) for offset in block]
            rows_L = [sum(plan.recv_rows_PL[source][e] for source in sources) for e in range(num_local)]
            assert [(e, stop - start) for e, (start, stop) in runs] == [(e, n) for e, n in enumerate(rows_L) if n]


def draw_rows(data: st.DataObject, size: int, num_local: int) -> list[list[tuple[int, ...]]]:
    """How many rows each source [first index] has for each destination, by local expert."""
    counts = st.tuples(*[st.integers(0, 5)] * num_local)
    return data.draw(st.lists(st.lists(counts, min_size=size, max_size=size), min_size=size, max_size=size))


def plans_of(rows: list[list[tuple[int, ...]]]) -> list[DispatchPlan]:
    return [
        DispatchPlan(NO_MAPS, tuple(rows[rank]), tuple(rows[source][rank] for source in range(len(rows))))
        for rank in range(len(rows))
    ]


def test_the_layout_of_the_last_pass_serves_the_next_one_with_its_counts_alone() -> None:
    torus, last = Torus(1, 2), LastLayout()
    serial, peers = (forward_schedule(MoEConfig(schedule=name), torus) for name in ("serial", "peers"))
    few, many = (plans_of([[(n, 1), (2, n)], [(1, n), (n, 3)]]) for n in (4, 5))
    asked = [(few[0], serial, 0, 0), (few[1], serial, 1, 0), (many[0], serial, 0, 0), (many[0], peers, 0, 0)]
    asked += [(many[0], peers, 0, 6), (few[0], serial, 0, 0)]
    for plan, schedule, rank, tokens in asked:
        expected = lay_out(plan, schedule, rank, tokens)
        again = replace(plan, maps=NO_MAPS)
        made = last.of(plan, schedule, rank, tokens, ())
        assert made == expected and last.of(again, schedule, rank, tokens, ()) is made


def deliver(rank: int, layouts: list[RowLayout], sent: list[list[tuple[int, ...]]]) -> list[tuple[int, ...] | None]:
    """The rank's stacked rows after all pieces; asserts that messages match and each row is computed once."""
    layout = layouts[rank]
    wire: list[tuple[int, ...] | None] = [None] * layout.num_received
    stacked: list[tuple[int, ...] | None] = [None] * layout.num_received
    computed: list[int] = []
    for index, piece in enumerate(layout.pieces):
        for source, (to_start, to_stop) in piece.received:
            ((_, (start, stop)),) = [m for m in layouts[source].pieces[index].sent if m[0] == rank]
            assert stop - start == to_stop - to_start, "both ends of a message agree on its size"
            wire[to_start:to_stop] = sent[source][start:stop]
        for start, to_start, num_rows in piece.moves:
            stacked[to_start : to_start + num_rows] = wire[start : start + num_rows]
        for (expert, (start, stop)), parts in zip(piece.runs, piece.run_parts, strict=True):
            first, last = layout.expert_spans[expert]
            assert first <= start < stop <= last
            computed += range(start, stop)
            moves = [piece.moves[part] for part in parts]
            moved = [row for _, to_start, num_rows in moves for row in range(to_start, to_start + num_rows)]
            assert layout.is_stacked_on_arrival or moved == list(range(start, stop))
    assert sorted(computed) == list(range(layout.num_received))
    return wire if layout.is_stacked_on_arrival else stacked
