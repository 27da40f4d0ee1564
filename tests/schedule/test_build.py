"""The schedule as data: sound for every topology, and what it says on four nodes of four."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.build import OpKind, Piece, Schedule, backward_schedule, forward_schedule, weight_blocks
from ds_moe_ep.schedule.check import check

ANY_TORUS = st.one_of(
    st.builds(Torus, st.integers(1, 6), st.integers(1, 6)),
    st.sampled_from([Torus(1, 1), Torus(1, 16), Torus(16, 1), Torus(8, 2), Torus(2, 8)]),
)
ANY_KNOBS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["auto", "serial", "chunks", "peers"]),
        "depth": st.integers(0, 5),
        "chunks": st.integers(1, 7),
        "row_cuts": st.integers(1, 4),
        "weight_blocks": st.integers(1, 4),
        "bit_equal": st.booleans(),
        "peer_group_size": st.integers(0, 9),
    }
)


@settings(deadline=None)
@given(torus=ANY_TORUS, knobs=ANY_KNOBS)
@example(torus=Torus(16, 1), knobs={"schedule": "peers", "depth": 1, "row_cuts": 4})
@example(torus=Torus(1, 1), knobs={"schedule": "peers", "depth": 1, "row_cuts": 4})
@example(torus=Torus(4, 4), knobs={"schedule": "chunks", "depth": 1})
def test_every_schedule_of_every_topology_is_sound(torus: Torus, knobs: dict[str, object]) -> None:
    config = MoEConfig(**knobs)
    forward, backward = forward_schedule(config, torus), backward_schedule(config, torus)
    assert check(forward) == []
    assert check(backward) == []
    assert forward.pieces == backward.pieces, "both passes lay out the same rows"
    assert OpKind.WEIGHTS not in {op.kind for op in forward.ops}
    assert OpKind.WEIGHTS in {op.kind for op in backward.ops}


@given(torus=ANY_TORUS, knobs=ANY_KNOBS)
def test_every_pair_of_ranks_meets_once_a_cut(torus: Torus, knobs: dict[str, object]) -> None:
    schedule = forward_schedule(MoEConfig(**knobs), torus)
    pairs: dict[tuple[int, int], float] = {}
    for piece in schedule.pieces:
        for offset in piece.offsets:
            for rank in range(torus.size):
                pair = (rank, torus.target(rank, offset))
                pairs[pair] = pairs.get(pair, 0) + 1 / piece.num_cuts
    everyone = {(a, b) for a in range(torus.size) for b in range(torus.size)}
    assert set(pairs) == everyone
    assert all(share == pytest.approx(1) for share in pairs.values())


def forward(torus: Torus, **knobs: object) -> Schedule:
    return forward_schedule(MoEConfig(**knobs), torus)


def backward(torus: Torus, **knobs: object) -> Schedule:
    return backward_schedule(MoEConfig(**knobs), torus)


FOUR_BY_FOUR = Torus(4, 4)
NODE = [tuple((node, place) for place in range(4)) for node in range(4)]  # the offsets of one node, of a torus 4 wide


@pytest.mark.parametrize("name", ["serial", "auto"])
def test_serial_is_one_piece_in_which_every_op_waits_for_the_one_before(name: str) -> None:
    schedule = backward(FOUR_BY_FOUR, schedule=name, bit_equal=True)
    assert (schedule.pieces, schedule.depth) == ((Piece(tuple(FOUR_BY_FOUR.offsets())),), 0)
    assert str(forward(FOUR_BY_FOUR, schedule=name)) == "D0 E0 C0"
    assert str(schedule) == "D0 E0 C0 W0 W1 W2 W3"
    assert [op.after for op in schedule.ops] == [(), (0,), (1,), (2,), (3,), (4,), (5,)]
    assert str(backward(FOUR_BY_FOUR, schedule=name)) == "D0 E0 C0 W0"


def test_near_rows_bracket_the_far_ones_on_four_nodes_of_four() -> None:
    schedule = forward(FOUR_BY_FOUR, schedule="peers", depth=1)
    near, *far = NODE
    assert schedule.pieces == (Piece(near, 0, 2), *[Piece(group) for group in far], Piece(near, 1, 2))
    assert str(schedule) == "D0 D1 E0 C0 D2 E1 C1 D3 E2 C2 D4 E3 C3 E4 C4"


def test_backward_near_rows_come_first_and_weight_gradients_one_piece_late() -> None:
    schedule = backward(FOUR_BY_FOUR, schedule="peers", depth=1, weight_blocks=4)
    assert str(schedule) == "D0 D4 E0 C0 D1 E4 C4 W0 D2 E1 C1 D3 E2 C2 W1 E3 C3 W2 W3"
    afters = {str(op): [str(schedule.ops[i]) for i in op.after] for op in schedule.ops}
    for piece in range(5):
        assert afters[f"dispatch {piece}"] == []
        assert afters[f"compute {piece}"] == [f"dispatch {piece}"]
        assert afters[f"combine {piece}"] == [f"compute {piece}"]
    assert afters["weights 0"] == ["compute 0", "compute 4"]
    assert [afters[f"weights {block}"] for block in (1, 2, 3)] == [["compute 1"], ["compute 2"], ["compute 3"]]


def test_one_product_makes_a_weight_gradient_unless_more_blocks_are_asked_for() -> None:
    whole = "D0 D4 E0 C0 D1 E4 C4 D2 E1 C1 D3 E2 C2 E3 C3 W0"
    assert str(backward(FOUR_BY_FOUR, schedule="peers", depth=1)) == whole
    assert str(backward(FOUR_BY_FOUR, schedule="chunks", chunks=2, depth=1, weight_blocks=4)) == "D0 D1 E0 C0 E1 C1 W0"
    two = "D0 D4 E0 C0 D1 E4 C4 W0 D2 E1 C1 D3 E2 C2 E3 C3 W1"
    assert str(backward(FOUR_BY_FOUR, schedule="peers", depth=1, weight_blocks=2)) == two
    near, far = weight_blocks(FOUR_BY_FOUR, 2)
    assert (near, far) == (NODE[0], NODE[1] + NODE[2] + NODE[3])


def test_bit_equal_schedules_sum_over_blocks_of_the_torus_alone() -> None:
    for knobs in ({"schedule": "serial"}, {"schedule": "chunks"}, {"schedule": "peers", "weight_blocks": 2}):
        assert backward(FOUR_BY_FOUR, bit_equal=True, **knobs).blocks == tuple(NODE)


def test_depth_issues_that_many_dispatches_ahead() -> None:
    assert str(forward(FOUR_BY_FOUR, schedule="peers", depth=2)) == "D0 D1 D2 E0 C0 D3 E1 C1 D4 E2 C2 E3 C3 E4 C4"
    ahead = "D0 D4 D1 E0 C0 D2 E4 C4 W0 D3 E1 C1 E2 C2 W1 E3 C3 W2 W3"
    assert str(backward(FOUR_BY_FOUR, schedule="peers", depth=2, weight_blocks=4)) == ahead
    assert str(forward(FOUR_BY_FOUR, schedule="peers", depth=9)) == "D0 D1 D2 D3 D4 E0 C0 E1 C1 E2 C2 E3 C3 E4 C4"


def test_weight_gradients_of_chunks_come_last_since_each_chunk_has_rows_of_every_block() -> None:
    schedule = backward(FOUR_BY_FOUR, schedule="chunks", chunks=3, depth=1, bit_equal=True)
    assert str(schedule) == "D0 D1 E0 C0 D2 E1 C1 E2 C2 W0 W1 W2 W3"
    assert {schedule.ops[-1].after, schedule.ops[-4].after} == {(2, 5, 7)}


def test_weight_gradients_of_a_group_that_spans_two_blocks_wait_for_it_in_both() -> None:
    schedule = backward(
        FOUR_BY_FOUR, schedule="peers", depth=1, peer_group_size=8, weight_blocks=4
    )  # nodes 1 and 2, node 3
    assert str(schedule) == "D0 D3 E0 C0 D1 E3 C3 W0 D2 E1 C1 E2 C2 W1 W2 W3"
    assert [schedule.ops[i].after for i in (-3, -2, -1)] == [(9,), (9,), (11,)]


def test_on_one_node_the_own_rows_come_first_and_the_others_follow_together() -> None:
    schedule = forward(Torus(1, 4), schedule="peers", depth=2)
    assert schedule.pieces == (Piece(((0, 0),)), Piece(((0, 1), (0, 2), (0, 3))))
    assert str(schedule) == "D0 D1 E0 C0 E1 C1"
    assert str(backward(Torus(1, 4), schedule="peers", depth=2)) == "D0 D1 E0 C0 E1 C1 W0"


def test_row_cuts_divide_far_groups_alone() -> None:
    schedule = forward(Torus(2, 4), schedule="peers", row_cuts=2)
    assert schedule.pieces == (Piece(NODE[0], 0, 2), Piece(NODE[1], 0, 2), Piece(NODE[1], 1, 2), Piece(NODE[0], 1, 2))


@pytest.mark.parametrize("pass_of", [forward, backward])
def test_depth_zero_blocks_on_every_op_of_every_schedule(pass_of: Callable[..., Schedule]) -> None:
    for name in ("serial", "chunks", "peers"):
        ops = pass_of(Torus(2, 4), schedule=name, depth=0).ops
        assert [op.after for op in ops] == [(i - 1,) if i else () for i in range(len(ops))]


def test_a_block_of_weight_gradients_is_a_node_or_one_of_three_shares_of_the_far_ones() -> None:
    assert weight_blocks(FOUR_BY_FOUR) == NODE
    assert weight_blocks(Torus(1, 3)) == [((0, 0), (0, 1), (0, 2))]
    assert weight_blocks(Torus(2, 1)) == [((0, 0),), ((1, 0),)]
    assert [[node for node, _ in block] for block in weight_blocks(Torus(6, 1))] == [[0], [1], [2, 3], [4, 5]]


LABELS = [
    (FOUR_BY_FOUR, {"schedule": "serial"}, ("all peers",)),
    (FOUR_BY_FOUR, {"schedule": "chunks", "chunks": 2}, ("all peers (1/2)", "all peers (2/2)")),
    (FOUR_BY_FOUR, {"schedule": "peers"}, ("near (1/2)", "node +1", "node +2", "node +3", "near (2/2)")),
    (
        FOUR_BY_FOUR,
        {"schedule": "peers", "peer_group_size": 8},
        ("near (1/2)", "nodes +1 to +2", "node +3", "near (2/2)"),
    ),
    (Torus(2, 2), {"schedule": "peers", "row_cuts": 2}, ("near (1/2)", "node +1 (1/2)", "node +1 (2/2)", "near (2/2)")),
    (Torus(1, 4), {"schedule": "peers"}, ("own", "ranks +1 to +3")),
    (Torus(1, 4), {"schedule": "peers", "peer_group_size": 2}, ("own", "ranks +1 to +2", "rank +3")),
]


@pytest.mark.parametrize(("torus", "knobs", "labels"), LABELS)
def test_labels_tell_people_whose_rows_a_piece_has(
    torus: Torus, knobs: dict[str, object], labels: tuple[str, ...]
) -> None:
    assert forward(torus, **knobs).labels == labels
