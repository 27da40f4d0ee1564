"""Faults of a schedule, found without running it: deadlock, missing waits, rows lost, traffic in the open.

Deadlock is disproved by playing all ranks in the strictest order that any lanes keep: ops start in issue order, as with
one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), each once what it waits for and the op before it on its lane are
done, and a transfer is done once both ends of each of its messages have started. Nothing here is ever undone, so a rank
that runs faster, slower, or on looser lanes ends as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule import two_level
from ds_moe_ep.schedule.build import Offset, Op, OpKind, Schedule

TRANSFERS = (OpKind.DISPATCH, OpKind.SPREAD, OpKind.GATHER, OpKind.COMBINE)
NEVER = sys.maxsize  # the op that would hold the other end of a message that nobody sends or takes

Ends = list[list[list[tuple[int, int]]]]  # by rank and op: (peer, its op), the other ends of the op's messages
Key = tuple[str, int, int]  # lane, sender, receiver
Queue = dict[Key, list[tuple[int, str]]]  # the op's index and the rows of each message


def check(schedule: Schedule) -> list[str]:
    """The faults of a schedule that every rank runs, as sentences; empty for a sound one.

    1. Pieces and ops name what exists, each op once. 2. Each offset's rows are covered once, by pieces and by blocks of
    weight gradients. 3. Senders and receivers agree, and no rank waits forever. 4. Each op waits for what it needs, and
    with depth 0 for the op before. 5. With depth > 0 every transfer is issued before the compute that hides it, and can
    run beside it even where one queue holds all ops; the first `depth` dispatches and the last combine cannot.
    """
    return [*_check_names(schedule), *_check_each_once(schedule)] or [
        *_check_rows(schedule),
        *_check_torus(schedule.torus),
        *check_together([schedule] * schedule.torus.size),
        *_check_needs(schedule),
        *(_check_blocking(schedule) if schedule.depth == 0 else _check_issue_order(schedule)),
    ]


def check_together(schedules: Sequence[Schedule]) -> list[str]:
    """The faults between ranks of which rank r runs `schedules[r]`: orders, messages, endless ops."""
    partners, wrong = _meet(schedules)
    waits = [_waits(schedule.ops) for schedule in schedules]
    started = [0] * len(schedules)  # of each rank's ops, in issue order

    def is_done(rank: int, index: int) -> bool:
        return index < started[rank] and all(other < started[peer] for peer, other in partners[rank][index])

    moved = True
    while moved:
        moved = False
        for rank, schedule in enumerate(schedules):
            while started[rank] < len(schedule.ops) and all(is_done(rank, i) for i in waits[rank][started[rank]]):
                started[rank], moved = started[rank] + 1, True
    stuck: dict[str, list[int]] = {}
    for rank, schedule in enumerate(schedules):
        ops = ", ".join(str(op) for index, op in enumerate(schedule.ops) if not is_done(rank, index))
        stuck.setdefault(ops, []).append(rank)
    endless = [f"ranks {ranks} never complete: {ops}" for ops, ranks in stuck.items() if ops]
    return [*_check_equal_order(schedules), *wrong, *endless]


def _check_equal_order(schedules: Sequence[Schedule]) -> Iterator[str]:
    """Communicators demand it, those of collectives even where no message of two ranks is out of order."""
    for kind in TRANSFERS:
        orders = [[op.piece for op in schedule.ops if op.kind is kind] for schedule in schedules]
        for rank, order in enumerate(orders):
            if order != orders[0]:
                yield f"rank {rank} issues {kind.value} {order}, rank 0 {orders[0]}"


def _meet(schedules: Sequence[Schedule]) -> tuple[Ends, list[str]]:
    """The other end of each message, and what is wrong there. A lane joins messages of two ranks in issue order."""
    ends: Ends = [[[] for _ in schedule.ops] for schedule in schedules]
    wrong: dict[Key, str] = {}
    sent, received = _messages(schedules)
    for key in sorted({*sent, *received}):
        lane, sender, receiver = key
        ends_of_each = zip_longest(sent.get(key, ()), received.get(key, ()), fillvalue=(NEVER, "nothing"))
        for number, ((sent_by, rows), (taken_by, expected)) in enumerate(ends_of_each):
            if sent_by != NEVER:
                ends[sender][sent_by].append((receiver, taken_by))
            if taken_by != NEVER:
                ends[receiver][taken_by].append((sender, sent_by))
            if rows != expected:  # the messages behind it are off by the same
                what = f"{lane} message {number} from rank {sender} to rank {receiver}"
                wrong.setdefault(key, f"{what}: {rows} is sent, {expected} is expected")
    return ends, [*wrong.values()]


def _messages(schedules: Sequence[Schedule]) -> tuple[Queue, Queue]:
    """The messages that senders send, and those that receivers expect."""
    sent: Queue = {}
    received: Queue = {}
    for rank, schedule in enumerate(schedules):
        for index, op in enumerate(schedule.ops):
            if op.kind not in TRANSFERS:
                continue
            for to, rows in two_level.sends(op, rank, schedule):
                if to != rank:
                    sent.setdefault((op.kind.value, rank, to), []).append((index, rows))
            for come_from, rows in two_level.receives(op, rank, schedule):
                if come_from != rank:
                    received.setdefault((op.kind.value, come_from, rank), []).append((index, rows))
    return sent, received


def _waits(ops: Sequence[Op]) -> list[list[int]]:
    """The ops that must be done before each op starts: those that it names and the one before it on its lane."""
    last_on: dict[str, int] = {}
    waits = []
    for index, op in enumerate(ops):
        waits.append([*op.after, *([last_on[op.kind.lane]] if op.kind.lane in last_on else [])])
        last_on[op.kind.lane] = index
    return waits


def _check_names(schedule: Schedule) -> Iterator[str]:
    everywhere = set(schedule.torus.offsets())
    for index, piece in enumerate(schedule.pieces):
        if not piece.offsets:
            yield f"piece {index} is without an offset"
        for offset in piece.offsets:
            if offset not in everywhere:
                yield f"piece {index} names offset {offset}, which the torus does not have"
        if not 0 <= piece.cut < piece.num_cuts:
            yield f"piece {index} is cut {piece.cut} of {piece.num_cuts}"
    num_blocks = len(schedule.blocks)
    for index, op in enumerate(schedule.ops):
        if not 0 <= op.piece < (num_blocks if op.kind is OpKind.WEIGHTS else len(schedule.pieces)):
            yield f"op {index} ({op}) names a {'block' if op.kind is OpKind.WEIGHTS else 'piece'} that does not exist"
        for before in op.after:
            if not 0 <= before < len(schedule.ops):
                yield f"op {index} ({op}) waits for op {before}, which does not exist"


def _check_each_once(schedule: Schedule) -> Iterator[str]:
    """All three ops of each piece; in a backward pass, which is one with any weight gradients, each block of them.

    A leg inside of the node stands once where it stands at all, and for pieces that have each of their far nodes whole.
    """
    found = [(op.kind, op.piece) for op in schedule.ops]
    whole = (OpKind.DISPATCH, OpKind.COMPUTE, OpKind.COMBINE)
    expected = [(kind, p) for p in range(len(schedule.pieces)) for kind in whole]
    expected += [(OpKind.SPREAD, p) for p in schedule.spreads] + [(OpKind.GATHER, p) for p in schedule.gathers]
    if any(kind is OpKind.WEIGHTS for kind, _ in found):
        expected += [(OpKind.WEIGHTS, block) for block in range(len(schedule.blocks))]
    for kind, piece in expected:
        if found.count((kind, piece)) != 1:
            yield f"{kind.value} {piece} stands {found.count((kind, piece))} times, not once"


def _check_rows(schedule: Schedule) -> Iterator[str]:
    for index in sorted(schedule.spreads | schedule.gathers):
        cut = schedule.pieces[index]
        whole = {(node, place) for node in two_level.far_nodes(cut) for place in range(schedule.torus.node_size)}
        if not whole or not whole <= set(cut.offsets) or cut.num_cuts > 1:
            yield f"piece {index} has a leg inside of its node, and not the node's rows as a whole"
    covered: dict[Offset, list[tuple[int, int]]] = {offset: [] for offset in schedule.torus.offsets()}
    for piece in schedule.pieces:
        for offset in piece.offsets:
            covered[offset].append((piece.num_cuts, piece.cut))
    for offset, cuts in covered.items():
        num_cuts = cuts[0][0] if cuts else 0
        if sorted(cuts) != [(num_cuts, cut) for cut in range(num_cuts)] or not cuts:
            yield f"rows at offset {offset} are not covered once: cuts {sorted(cuts)}"
    blocks = schedule.blocks
    if sorted(offset for block in blocks for offset in block) != sorted(covered) or not all(blocks):
        yield f"blocks of weight gradients do not cover each offset once: {blocks}"


def _check_torus(torus: Torus) -> Iterator[str]:
    everyone = set(range(torus.size))
    for rank in everyone:
        if {torus.target(rank, offset) for offset in torus.offsets()} != everyone:
            yield f"rank {rank} does not meet every rank once"
    for offset in torus.offsets():
        for rank in everyone:
            if torus.source(torus.target(rank, offset), offset) != rank:
                yield f"at offset {offset} rank {rank} sends to a rank that expects another sender"


def _check_needs(schedule: Schedule) -> Iterator[str]:
    index_of = {(op.kind, op.piece): index for index, op in enumerate(schedule.ops)}
    behind: list[int] = []  # by op, a bit for each op that it waits for, itself or by way of another
    for index, op in enumerate(schedule.ops):
        behind.append(0)
        for before in op.after:
            if before < index:
                behind[index] |= 1 << before | behind[before]
            else:
                yield f"op {index} ({op}) waits for op {before}, which is not before it"
    for index, op in enumerate(schedule.ops):
        for needed in _needs(op, schedule):
            if not behind[index] >> index_of[needed] & 1:
                yield f"{op} does not wait for {needed[0].value} {needed[1]}"


def _needs(op: Op, schedule: Schedule) -> list[tuple[OpKind, int]]:
    """The ops whose results an op reads."""
    if op.kind is OpKind.WEIGHTS:
        block = set(schedule.blocks[op.piece])
        return [(OpKind.COMPUTE, p) for p, piece in enumerate(schedule.pieces) if block & set(piece.offsets)]
    order = [OpKind.DISPATCH, OpKind.COMPUTE, OpKind.COMBINE]
    order[1:1] = [OpKind.SPREAD] if op.piece in schedule.spreads else []
    order[-1:-1] = [OpKind.GATHER] if op.piece in schedule.gathers else []
    place = order.index(op.kind)
    return [(order[place - 1], op.piece)] if place else []


def _check_blocking(schedule: Schedule) -> Iterator[str]:
    for index, op in enumerate(schedule.ops):
        if index and index - 1 not in op.after:
            yield f"{op} does not wait for the op before, as depth 0 promises"


def _check_issue_order(schedule: Schedule) -> Iterator[str]:
    ops = schedule.ops
    index_of = {(op.kind, op.piece): index for index, op in enumerate(ops)}
    on_compute = [index for index, op in enumerate(ops) if op.kind.lane == "compute"]
    computed = [op.piece for op in ops if op.kind is OpKind.COMPUTE]
    for here, following in pairwise(computed):
        if index_of[OpKind.DISPATCH, following] > index_of[OpKind.COMPUTE, here]:
            yield f"dispatch {following} is issued after compute {here}, which should hide it"
    for piece in computed:
        compute, combine = index_of[OpKind.COMPUTE, piece], index_of[OpKind.COMBINE, piece]
        for late in (index for index in on_compute if compute < index < combine):
            yield f"combine {piece} is issued after {ops[late]}, which should hide it"
    if not any(max(op.after, default=-1) >= index for index, op in enumerate(ops)):
        yield from _check_one_queue(schedule, on_compute)


def _check_one_queue(schedule: Schedule, on_compute: Sequence[int]) -> Iterator[str]:
    """Checks that each transfer can run beside some compute where ops start in issue order.

    An op then waits for all that an op before it waits for. That costs the first `depth` dispatches, which fill the
    lane before the first compute; nothing can hide the last combine, if no weight gradients come behind it.
    """
    ops = schedule.ops
    behind: list[int] = []  # by op, a bit for each op that is done before it can start
    for index, waits in enumerate(_waits(ops)):
        behind.append(behind[index - 1] if index else 0)
        for before in waits:
            behind[index] |= 1 << before
    to_hide = [index for index, op in enumerate(ops) if op.kind is OpKind.DISPATCH][schedule.depth :]
    to_hide += [index for index, op in enumerate(ops) if op.kind is OpKind.COMBINE and index < on_compute[-1]]
    for index in to_hide:
        if all(behind[index] >> other & 1 or behind[other] >> index & 1 for other in on_compute):
            yield f"{ops[index]} runs beside no compute where one queue holds all ops"
