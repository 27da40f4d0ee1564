"""The schedule as data: sound for every topology, and a planted fault in it is found."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.config import MoEConfig
from ds_moe_ep.schedule import Kind, Op, Piece, Schedule, backward_schedule, check, forward_schedule
from ds_moe_ep.topology import Torus

ANY_TORUS = st.builds(Torus, st.integers(1, 6), st.integers(1, 6))
ANY_KNOBS = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["serial", "chunks", "peers"]),
        "depth": st.integers(0, 5),
        "chunks": st.integers(1, 7),
        "row_cuts": st.integers(1, 4),
        "peer_group_size": st.integers(0, 9),
    }
)


@given(torus=ANY_TORUS, knobs=ANY_KNOBS)
def test_every_schedule_of_every_topology_is_sound(torus: Torus, knobs: dict[str, object]) -> None:
    config = MoEConfig(**knobs)
    for schedule in (forward_schedule(config, torus), backward_schedule(config, torus)):
        assert check(schedule) == []


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


def test_serial_is_one_piece_in_which_every_op_waits_for_the_one_before() -> None:
    schedule = backward_schedule(MoEConfig(schedule="serial"), Torus(4, 4))
    assert str(schedule) == "D0 E0 C0 W"
    assert [op.after for op in schedule.ops] == [(), (0,), (1,), (2,)]


def test_near_rows_bracket_the_far_ones_on_four_nodes_of_four() -> None:
    schedule = forward_schedule(MoEConfig(schedule="peers", depth=1), Torus(4, 4))
    near = tuple((0, place) for place in range(4))
    far = [tuple((node, place) for place in range(4)) for node in (1, 2, 3)]
    assert schedule.pieces == (Piece(near, 0, 2), *[Piece(group) for group in far], Piece(near, 1, 2))
    assert str(schedule) == "D0 D1 E0 C0 D2 E1 C1 D3 E2 C2 D4 E3 C3 E4 C4"


def test_on_one_node_the_own_rows_come_first_and_the_others_follow_together() -> None:
    schedule = forward_schedule(MoEConfig(schedule="peers", depth=2), Torus(1, 4))
    assert schedule.pieces == (Piece(((0, 0),)), Piece(((0, 1), (0, 2), (0, 3))))
    assert str(schedule) == "D0 D1 E0 C0 E1 C1"


def test_weight_gradients_come_last_and_wait_for_computes_alone() -> None:
    *_, combine, weights = backward_schedule(MoEConfig(schedule="peers"), Torus(2, 2)).ops
    assert combine.kind is Kind.COMBINE and weights.kind is Kind.WEIGHTS
    kinds = {backward_schedule(MoEConfig(schedule="peers"), Torus(2, 2)).ops[i].kind for i in weights.after}
    assert kinds == {Kind.COMPUTE}


def test_depth_zero_blocks_on_every_op_of_every_schedule() -> None:
    for name in ("serial", "chunks", "peers"):
        ops = forward_schedule(MoEConfig(schedule=name, depth=0), Torus(2, 4)).ops
        assert [op.after for op in ops] == [(i - 1,) if i else () for i in range(len(ops))]


SOUND = forward_schedule(MoEConfig(schedule="peers", depth=1), Torus(2, 2))


def _with_ops(*ops: Op) -> Schedule:
    return dataclasses.replace(SOUND, ops=ops)


FAULTS = {
    "waits for op 9": _with_ops(dataclasses.replace(SOUND.ops[0], after=(9,)), *SOUND.ops[1:]),
    "stands twice": _with_ops(*SOUND.ops, SOUND.ops[-1]),
    "lacks": _with_ops(*[op for op in SOUND.ops if op.piece != 1]),
    "does not wait for its DISPATCH": _with_ops(
        *[dataclasses.replace(op, after=()) if op.kind is Kind.COMPUTE else op for op in SOUND.ops]
    ),
    "not covered once": dataclasses.replace(SOUND, pieces=(Piece(SOUND.pieces[0].offsets), *SOUND.pieces[1:])),
    "nothing hides it": dataclasses.replace(
        forward_schedule(MoEConfig(schedule="peers", depth=0), Torus(2, 2)), depth=1
    ),
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_check_finds_a_planted_fault(complaint: str) -> None:
    assert check(SOUND) == []
    assert any(complaint in sentence for sentence in check(FAULTS[complaint]))
