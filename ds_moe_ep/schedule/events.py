"""Discrete events: tasks that wait for each other and share links, and when each of them starts and stops.

1. A task starts when all tasks that it is `after` have stopped. The order of a lane is an edge like any other.
2. It goes through its phases one by one. A phase is an amount that leaves at `rate` a microsecond at most: microseconds
   of a device at rate 1, bytes at a link's rate, core-microseconds of a host at one core.
3. Phases on one resource share it by max-min fairness: all rise alike until a resource is full or a phase has its own
   rate (Bertsekas, Gallager: Data Networks, section 6.5.2).
4. The clock jumps to the next end of a phase. No step is sampled, nothing is drawn: equal input gives equal times.

`price.py` prices one pass for the tuner with it, `simulate/` whole training steps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.schedule.spans import NO_TAGS, Tags

REST = 1e-9  # share of an amount that rounding may leave


@dataclass(frozen=True, slots=True)
class Phase:
    """`amount` that leaves at `rate` a microsecond at most; of each unit, `uses` takes so much of each resource.

    An infinite rate is for amounts that only resources bound; with none of them the phase takes no time.
    """

    amount: float
    rate: float = 1.0
    uses: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """Work on `lane` of `rank`. `after` are the indices of tasks that must have stopped before."""

    name: str
    rank: int
    lane: str
    phases: tuple[Phase, ...]
    after: tuple[int, ...] = ()
    tags: Tags = NO_TAGS


Times = list[tuple[float, float]]


def run(tasks: Sequence[Task], capacities: Sequence[float] = ()) -> Times:
    """(start, stop) of every task in microseconds; resource i moves `capacities[i]` units a microsecond.

    Raises ValueError where tasks wait for each other in a circle.
    """
    return _Run(tasks, capacities).times()


def makespan_us(times: Times) -> float:
    """When the last task stops; 0 where there is none."""
    return max((stop for _, stop in times), default=0.0)


class _Run:
    """One run: the tasks that are under way, in phases that end at a known moment or flow over resources."""

    def __init__(self, tasks: Sequence[Task], capacities: Sequence[float]) -> None:
        self._tasks, self._capacities = tasks, capacities
        self._missing = [len(set(task.after)) for task in tasks]
        self._followers: list[list[int]] = [[] for _ in tasks]
        for index, task in enumerate(tasks):
            for before in set(task.after):
                self._followers[before].append(index)
        self._phase = [0] * len(tasks)
        self._starts, self._stops = [0.0] * len(tasks), [math.nan] * len(tasks)
        self._timed: list[tuple[float, int]] = []  # (end, task), a heap
        self._left: dict[int, float] = {}  # what is left of phases that flow
        self._rates: dict[int, float] = {}  # empty when they must be shared out anew
        self._now = 0.0

    def times(self) -> Times:
        self._go_on(index for index, missing in enumerate(self._missing) if not missing)
        while self._timed or self._left:
            self._go_on(self._ended())
        for task, stop in zip(self._tasks, self._stops, strict=True):
            if math.isnan(stop):
                raise ValueError(f"events: tasks wait for each other in a circle, and {task.name!r} with them")
        return list(zip(self._starts, self._stops, strict=True))

    def _go_on(self, indices: Iterable[int]) -> None:
        """Takes tasks into their next phase; those without one stop, and let others start."""
        waiting = list(indices)
        while waiting:
            index = waiting.pop()
            if self._enter(index):
                continue
            self._stops[index] = self._now
            for follower in self._followers[index]:
                self._missing[follower] -= 1
                if not self._missing[follower]:
                    self._starts[follower] = self._now
                    waiting.append(follower)

    def _enter(self, index: int) -> bool:
        """True where the task has a phase left that takes time; it is in it then."""
        phases = self._tasks[index].phases
        while self._phase[index] < len(phases):
            phase = phases[self._phase[index]]
            if phase.amount > 0 and phase.uses:
                self._left[index] = phase.amount
                self._rates = {}
                return True
            if phase.amount > 0 and not math.isinf(phase.rate):
                heapq.heappush(self._timed, (self._now + phase.amount / phase.rate, index))
                return True
            self._phase[index] += 1
        return False

    def _ended(self) -> list[int]:
        """Moves the clock to the next end of a phase; the tasks whose phases end there."""
        if self._left and not self._rates:
            flowing = {index: self._tasks[index].phases[self._phase[index]] for index in self._left}
            self._rates = fair_rates(flowing, self._capacities)
        next_us = min((left / self._rates[index] for index, left in self._left.items()), default=math.inf)
        stop = min(self._now + next_us, self._timed[0][0] if self._timed else math.inf)
        step_us = next_us if stop == self._now + next_us else stop - self._now
        ended = []
        for index, rate in self._rates.items():
            self._left[index] = 0.0 if math.isinf(rate) else self._left[index] - step_us * rate
            if self._left[index] <= REST * self._tasks[index].phases[self._phase[index]].amount:
                ended.append(index)
        if ended:
            self._rates = {}
        for index in ended:
            del self._left[index]
        self._now = stop
        while self._timed and self._timed[0][0] <= stop:
            ended.append(heapq.heappop(self._timed)[1])
        for index in ended:
            self._phase[index] += 1
        return ended


def fair_rates(phases: Mapping[int, Phase], capacities: Sequence[float]) -> dict[int, float]:
    """The max-min fair rate of each phase: all rise alike until one has its own, or a resource of its is full.

    A resource that moves infinitely much bounds nobody; a phase that nothing bounds moves at once.
    """
    free = list(capacities)
    rates: dict[int, float] = {}
    rising = dict(phases)
    level = 0.0
    while rising:
        demand: dict[int, float] = {}
        for phase in rising.values():
            for resource, use in phase.uses:
                demand[resource] = demand.get(resource, 0.0) + use
        steps = {resource: free[resource] / use for resource, use in demand.items() if use > 0}
        own = min(phase.rate for phase in rising.values())
        step = min(min(steps.values(), default=math.inf), own - level)
        if math.isinf(step):
            return rates | dict.fromkeys(rising, math.inf)
        level += step
        full = {resource for resource, its in steps.items() if its <= step * (1 + REST)}
        for resource, use in demand.items():
            free[resource] = 0.0 if resource in full else free[resource] - step * use
        for index, phase in list(rising.items()):
            has_own = phase.rate <= level * (1 + REST)
            if has_own or any(resource in full and use > 0 for resource, use in phase.uses):
                rates[index] = level
                del rising[index]
    return rates
