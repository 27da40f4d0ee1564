"""Tasks put together as ranks issue them: ops on lanes, what each waits for, and the spans that people see.

    program = Program()
    done = program.add("attention", rank, "compute", Load((Phase(80.0),)))
    program.run(capacities).spans()

An op is a chain of phases, then several chains side by side, then a delay: a transfer first costs the host some work,
then rows for near and far peers leave at once, and a latency later they are there. Its lane is free when they have
left: latency delays and occupies nothing (LogP: Culler et al., PPoPP 1993). `add_pass` puts a schedule's ops there, for
one rank that stands for all (even routing: all do the same at the same moment) or for each rank of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ds_moe_ep.schedule import events, two_level
from ds_moe_ep.schedule.build import Op, OpKind, Schedule
from ds_moe_ep.schedule.events import Phase, Task, Times
from ds_moe_ep.schedule.spans import NO_TAGS, Span, Tags

Event = tuple[int, ...]  # tasks that must have stopped
START: Event = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Load of an op: phases in a row, then chains of phases side by side, and a delay that leaves its lane free."""

    first: tuple[Phase, ...] = ()
    beside: tuple[tuple[Phase, ...], ...] = ()
    delay_us: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A program that has run."""

    program: Program
    times: Times

    @property
    def makespan_us(self) -> float:
        """When the last op stops."""
        return events.makespan_us(self.times)

    def stop_us(self, mark: Event) -> float:
        """When all of the mark is done."""
        return max((self.times[index][1] for index in mark), default=0.0)

    def spans(self) -> list[Span]:
        """One span an op that takes time, in the order of their starts."""
        found = []
        for name, rank, lane, tags, tasks in self.program.ops:
            start = min(self.times[index][0] for index in tasks)
            stop = max(self.times[index][1] for index in tasks)
            if stop > start:
                found.append(Span(name, rank, lane, start, stop, tags))
        return sorted(found, key=lambda span: (span.start_us, span.rank))


@dataclass
class Program:
    """Tasks in an order in which each stands behind those that it waits for."""

    tasks: list[Task] = field(default_factory=list)
    ops: list[tuple[str, int, str, Tags, Event]] = field(default_factory=list)

    def add(self, name: str, rank: int, lane: str, load: Load, after: Event = START, tags: Tags = NO_TAGS) -> Event:
        """The mark of an op that starts when `after` is done."""
        return self.add_apart(name, rank, lane, load, after, tags)[1]

    def add_apart(
        self, name: str, rank: int, lane: str, load: Load, after: Event = START, tags: Tags = NO_TAGS
    ) -> tuple[Event, Event]:
        """The marks of an op: its lane is free, and it is done."""
        first, chains = load.first, load.beside or ((),)
        head: Event = ()
        if first and len(chains) > 1:
            head = (self._task(name, rank, lane, first, after, tags),)
            first, after = (), head
        free = tuple(self._task(name, rank, lane, first + chain, after, tags) for chain in chains)
        done = free
        if load.delay_us:
            done = (self._task(name, rank, lane, (Phase(load.delay_us),), free, tags),)
        self.ops.append((name, rank, lane, tags, tuple(dict.fromkeys(head + free + done))))
        return free, done

    def join(self, marks: Iterable[Event]) -> Event:
        """A mark of one task, which takes no time, behind all the marks."""
        after = tuple(dict.fromkeys(index for mark in marks for index in mark))
        return after if len(after) <= 1 else (self._task("join", 0, "", (), after, NO_TAGS),)

    def run(self, capacities: Sequence[float] = ()) -> Outcome:
        """When everything happens."""
        return Outcome(self, events.run(self.tasks, capacities))

    def _task(self, name: str, rank: int, lane: str, phases: tuple[Phase, ...], after: Event, tags: Tags) -> int:
        self.tasks.append(Task(name, rank, lane, phases, after, tags))
        return len(self.tasks) - 1


LoadOf = Callable[[Op], Load]
Behind = Callable[[Op, int, Event], object]


def _unheard(op: Op, rank: int, end: Event) -> None:
    """Nobody hears of an op's end."""


NOBODY: Behind = _unheard


def add_pass(
    program: Program,
    schedule: Schedule,
    loads: Sequence[LoadOf],
    start: Event,
    tags: Tags,
    in_flight: int = 1,
    behind: Behind = NOBODY,
) -> Event:
    """The mark of one pass through the experts: the ops of `schedule` on each rank's lanes.

    `loads` has one entry, for a rank that stands for all, or one for each rank of the torus. A transfer is over when
    the rank's own rows have left and arrived, and every rank that it receives from has sent. Of a lane's transfers
    `in_flight` are on their way at once: one on a stream of NCCL's, two on the threads of a host. `behind` hears of the
    end of each op on each rank, op by op.
    """
    ranks = range(len(loads))
    marks: list[list[Event]] = [[] for _ in ranks]
    queues: list[dict[str, list[Event]]] = [{} for _ in ranks]  # of a lane: when it was free for the next, op by op
    for op in schedule.ops:
        lane = op.kind.lane
        width = 1 if lane == "compute" else in_flight
        tagged = Tags(tags.layer, tags.phase, "" if op.kind is OpKind.WEIGHTS else schedule.labels[op.piece])
        added = []
        for rank, load_of in enumerate(loads):
            queue = queues[rank].setdefault(lane, [])
            waits = [marks[rank][index] for index in op.after] + queue[-width : len(queue) - width + 1]
            after = tuple(dict.fromkeys(index for mark in waits for index in mark)) or start
            added.append(program.add_apart(str(op), rank, lane, load_of(op), after, tagged))
            queue.append(added[rank][0])
        for rank in ranks:
            peers = _heard_from(op, rank, schedule) if len(loads) > 1 else ()
            marks[rank].append(program.join([added[rank][1], *(added[peer][1] for peer in peers)]))
            behind(op, rank, marks[rank][-1])
    return program.join(mark for its in marks for mark in its)


def _heard_from(op: Op, rank: int, schedule: Schedule) -> Iterable[int]:
    """The ranks whose rows this transfer brings."""
    return () if op.kind.lane == "compute" else (end.peer for end in two_level.receives(op, rank, schedule))
