"""`check` finds what is wrong: every rule of it catches a planted fault."""

from __future__ import annotations

import dataclasses
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.build import Offset, Op, OpKind, Piece, Schedule, backward_schedule, forward_schedule
from ds_moe_ep.schedule.check import check, check_together

LETTERS = {"D": OpKind.DISPATCH, "E": OpKind.COMPUTE, "C": OpKind.COMBINE, "W": OpKind.WEIGHTS}


def peers(depth: int = 1) -> MoEConfig:
    return MoEConfig(schedule="peers", depth=depth, weight_blocks=4)


FORWARD = forward_schedule(peers(), Torus(2, 2))  # near/2, far, near/2
BACKWARD = backward_schedule(peers(), Torus(2, 2))
BLOCKING = backward_schedule(peers(depth=0), Torus(2, 2))
ON_ONE_NODE = forward_schedule(peers(), Torus(1, 4))  # own, others
CHUNKS = forward_schedule(MoEConfig(schedule="chunks", chunks=4, depth=1), Torus(2, 2))
SOUND = (FORWARD, BACKWARD, BLOCKING, ON_ONE_NODE, CHUNKS)


def issued(order: str, like: Schedule) -> Schedule:
    """The schedule with ops in another order, each waiting for what it needs, wherever that stands."""
    names = order.split()

    def needed(name: str) -> list[str]:
        if name.startswith("W"):
            return [other for other in names if other.startswith("E")]
        return [{"E": "D", "C": "E"}[name[0]] + name[1:]] if name[0] in "EC" else []

    ops = [Op(LETTERS[n[0]], int(n[1:]), tuple(names.index(o) for o in needed(n) if o in names)) for n in names]
    return dataclasses.replace(like, ops=tuple(ops))


def changed(schedule: Schedule, name: str, **values: object) -> Schedule:
    """The schedule with other values in the op of this name, such as "compute 1"."""
    ops = tuple(dataclasses.replace(op, **values) if str(op) == name else op for op in schedule.ops)
    assert ops != schedule.ops
    return dataclasses.replace(schedule, ops=ops)


def with_piece(index: int, **values: object) -> Schedule:
    pieces = list(FORWARD.pieces)
    pieces[index] = dataclasses.replace(pieces[index], **values)
    return dataclasses.replace(FORWARD, pieces=tuple(pieces))


class OneWay(Torus):
    """A torus on which what a rank sends to one place is not what that place expects."""

    def source(self, rank: int, offset: Offset) -> int:
        return self.target(rank, offset)


class Nearby(Torus):
    """A torus on which everything goes to the next rank."""

    def target(self, rank: int, offset: Offset) -> int:
        return (rank + 1) % self.size


FAULTS = {
    # pieces and ops name what exists, each op once
    "piece 1 is without an offset": with_piece(1, offsets=()),
    "piece 1 names offset (3, 0), which the torus does not have": with_piece(1, offsets=((3, 0), (1, 1))),
    "piece 1 is cut 1 of 1": with_piece(1, cut=1),
    "piece 1 is cut 0 of 0": with_piece(1, num_cuts=0),
    "op 0 (dispatch 7) names a piece that does not exist": changed(FORWARD, "dispatch 0", piece=7),
    "op 10 (weights 2) names a block that does not exist": changed(BACKWARD, "weights 1", piece=2),
    "waits for op 99, which does not exist": changed(FORWARD, "compute 1", after=(99,)),
    "combine 2 stands 2 times": dataclasses.replace(FORWARD, ops=(*FORWARD.ops, FORWARD.ops[-1])),
    "compute 1 stands 0 times": issued("D0 D1 E0 C0 D2 C1 E2 C2", FORWARD),
    "weights 1 stands 0 times": issued("D0 D2 E0 C0 D1 E2 C2 W0 E1 C1", BACKWARD),
    # each offset's rows are covered once
    "rows at offset (0, 0) are not covered once": with_piece(0, num_cuts=1),
    "rows at offset (1, 1) are not covered once: cuts []": with_piece(1, offsets=((1, 0),)),
    "rows at offset (1, 0) are not covered once": with_piece(1, offsets=((1, 0), (1, 0), (1, 1))),
    # senders and receivers agree, and no rank waits forever
    "sends to a rank that expects another sender": dataclasses.replace(ON_ONE_NODE, torus=OneWay(1, 4)),
    "rank 0 does not meet every rank once": dataclasses.replace(FORWARD, torus=Nearby(2, 2)),
    "is sent, nothing is expected": dataclasses.replace(FORWARD, torus=Nearby(2, 2)),
    "ranks [0, 1, 2, 3] never complete: combine 0, compute 0, dispatch 1, ": issued(
        "D0 C0 E0 D1 E1 C1 D2 E2 C2", FORWARD
    ),
    # each op waits for what it needs
    "op 1 (combine 0) waits for op 2, which is not before it": issued("D0 C0 E0 D1 E1 C1 D2 E2 C2", FORWARD),
    "compute 1 does not wait for dispatch 1": changed(FORWARD, "compute 1", after=(0,)),
    "combine 1 does not wait for compute 1": changed(FORWARD, "combine 1", after=(1,)),
    "weights 0 does not wait for compute 2": changed(BACKWARD, "weights 0", after=(2,)),
    "combine 1 does not wait for the op before": changed(BLOCKING, "combine 1", after=(3, 0)),
    # every transfer is issued before the compute that hides it, and can run beside it
    "dispatch 1 is issued after compute 0": issued("D0 E0 C0 D1 E1 C1 D2 E2 C2", FORWARD),
    "dispatch 1 is issued after compute 2": issued("D0 D2 E0 C0 E2 C2 D1 W0 E1 C1 W1", BACKWARD),
    "combine 0 is issued after compute 1": issued("D0 D1 E0 D2 E1 C0 C1 E2 C2", FORWARD),
    "combine 2 is issued after weights 0": issued("D0 D2 E0 C0 D1 E2 W0 C2 E1 C1 W1", BACKWARD),
    "dispatch 2 runs beside no compute": issued("D0 D1 E0 C0 D2 D3 E1 C1 E2 C2 E3 C3", CHUNKS),
    "dispatch 1 runs beside no compute": changed(FORWARD, "compute 0", after=(0, 1)),
    "combine 0 runs beside no compute": changed(FORWARD, "dispatch 2", after=(3,)),
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_check_finds_a_planted_fault(complaint: str) -> None:
    assert [check(schedule) for schedule in SOUND] == [[]] * len(SOUND)
    found = check(FAULTS[complaint])
    assert any(complaint in sentence for sentence in found), found


@pytest.mark.parametrize("blocks", [[((0, 0), (0, 1))], [((0, 0), (0, 1)), ((0, 1), (1, 0), (1, 1))]])
def test_blocks_of_weight_gradients_that_do_not_cover_each_offset_once_are_found(
    blocks: list[tuple[Offset, ...]],
) -> None:
    wrong = dataclasses.replace(FORWARD, blocks=tuple(blocks))
    assert any("blocks of weight gradients do not cover" in sentence for sentence in check(wrong))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_wait_is_needed_and_missed(depth: int) -> None:
    schedule = backward_schedule(peers(depth), Torus(3, 2))
    for op in schedule.ops:
        for wait in op.after:
            left = tuple(other for other in op.after if other != wait)
            assert check(changed(schedule, str(op), after=left)) != [], (str(op), wait)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_op_is_missed(depth: int) -> None:
    schedule = backward_schedule(peers(depth), Torus(3, 2))
    for gone in range(len(schedule.ops)):
        ops = [
            dataclasses.replace(op, after=tuple(i - (i > gone) for i in op.after if i != gone))
            for index, op in enumerate(schedule.ops)
            if index != gone
        ]
        assert check(dataclasses.replace(schedule, ops=tuple(ops))) != [], str(schedule.ops[gone])


# Three ranks in a ring: the own rows, those for the next rank, those for the one after it.
RING = Schedule("ring", Torus(3, 1), tuple(Piece(((node, 0),)) for node in range(3)), (), 1)


def test_ranks_with_other_orders_wait_forever_and_are_named() -> None:
    orders = ["D0 D1 D2", "D0 D2 D1", "D0 D2 D1"]
    found = check_together([issued(order, RING) for order in orders])
    assert "rank 1 issues dispatch [0, 2, 1], rank 0 [0, 1, 2]" in found
    assert "ranks [0] never complete: dispatch 1, dispatch 2" in found
    assert "ranks [1, 2] never complete: dispatch 2, dispatch 1" in found


def test_a_rank_that_leaves_a_dispatch_out_stalls_those_that_await_it() -> None:
    found = check_together([issued(order, RING) for order in ("D0 D1", "D0", "D0 D1")])
    assert "dispatch message 0 from rank 1 to rank 2: nothing is sent, cut 0 of 1 at offset (1, 0) is expected" in found
    assert "ranks [0, 2] never complete: dispatch 1" in found


def test_messages_of_two_ranks_meet_in_issue_order_on_a_lane() -> None:
    halves = dataclasses.replace(CHUNKS, pieces=CHUNKS.pieces[:2], torus=Torus(2, 1))
    halves = dataclasses.replace(halves, pieces=tuple(Piece(((1, 0),), cut, 2) for cut in range(2)))
    found = check_together([issued("D0 D1", halves), issued("D1 D0", halves)])
    assert any("rank 0 to rank 1: cut 0 of 2 at offset (1, 0) is sent, cut 1 of 2" in sentence for sentence in found)


ANY_ORDER = st.permutations([1] * 3 + [2] * 3).map(
    lambda pieces: " ".join(f"{'DEC'[pieces[:i].count(p)]}{p}" for i, p in enumerate(pieces))
)


@settings(deadline=None)
@given(orders=st.tuples(ANY_ORDER, ANY_ORDER, ANY_ORDER))
def test_a_deadlock_is_a_circle_in_the_graph_of_waits(orders: tuple[str, ...]) -> None:
    """The play against graph theory: each op's start and end are nodes; a message joins two ends to two starts."""
    graph: TopologicalSorter[tuple[int, str, str]] = TopologicalSorter()
    for rank, order in enumerate(orders):
        names = order.split()
        for index, name in enumerate(names):
            start, end = (rank, name, "start"), (rank, name, "end")
            graph.add(end, start)
            if index:
                graph.add(start, (rank, names[index - 1], "start"))
            same_lane = [other for other in names[:index] if other[0] == name[0]]
            needed = [{"E": "D", "C": "E"}[name[0]] + name[1]] if name[0] != "D" else []
            graph.add(start, *[(rank, other, "end") for other in same_lane + needed])
            if name[0] != "E":  # offset k joins each rank with the one k further and the one k back
                graph.add(end, *[((rank + shift * int(name[1])) % 3, name, "start") for shift in (1, -1)])
    try:
        graph.prepare()
        is_deadlock = False
    except CycleError:
        is_deadlock = True
    found = check_together([issued(order, RING) for order in orders])
    assert any("never complete" in sentence for sentence in found) == is_deadlock
