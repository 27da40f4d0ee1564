"""A second `events.run`, written from its docstring: exact fractions, and everything found anew at each event.

It shares no code and no method with the first one. Rates come from bottlenecks (Bertsekas, Gallager: Data Networks,
section 6.5.2): the resource that offers least to each of its phases fixes them all, then the next one among the rest;
a phase's own rate is a resource that it alone uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import inf

from ds_moe_ep.schedule.events import Phase, Task

Rate = Fraction | None  # None is infinite
Sharing = Callable[[Mapping[int, Phase], Sequence[float]], dict[int, Rate]]


def simulate(
    tasks: Sequence[Task], capacities: Sequence[float], sharing: Sharing | None = None
) -> list[tuple[Fraction, Fraction]]:
    """(start, stop) of each task, exactly; `sharing` replaces max-min fairness."""
    share = sharing or bottleneck_rates
    now = Fraction(0)
    start: dict[int, Fraction] = {}
    stop: dict[int, Fraction] = {}
    rest: dict[int, list[tuple[Phase, Fraction]]] = {}  # phases ahead with what is left of each, the current one first
    while len(stop) < len(tasks):
        for index, task in enumerate(tasks):
            if index not in start and all(other in stop for other in task.after):
                start[index] = now
                rest[index] = [(phase, Fraction(phase.amount)) for phase in task.phases]
        active = {index: phases[0][0] for index, phases in rest.items() if phases}
        rates = share(active, capacities)
        over = [index for index in active if rates[index] is None or not rest[index][0][1]]
        done = [index for index, phases in rest.items() if not phases]
        if not over and not done:
            assert active, "tasks wait for each other in a circle"
            finite = {index: rate for index, rate in rates.items() if rate is not None}
            step = min(rest[index][0][1] / rate for index, rate in finite.items())
            now += step
            for index, rate in finite.items():
                phase, left = rest[index][0]
                rest[index][0] = (phase, left - step * rate)
        for index in over:
            rest[index].pop(0)
        for index in done:
            stop[index] = now
            del rest[index]
    return [(start[index], stop[index]) for index in range(len(tasks))]


def bottleneck_rates(active: Mapping[int, Phase], capacities: Sequence[float]) -> dict[int, Rate]:
    """Max-min fair rates."""
    uses = {index: _uses(index, phase, capacities) for index, phase in active.items()}
    free: dict[object, Fraction] = {i: Fraction(size) for i, size in enumerate(capacities) if size != inf}
    free |= {("own", index): Fraction(phase.rate) for index, phase in active.items() if phase.rate != inf}
    rates: dict[int, Rate] = {}
    while len(rates) < len(active):
        open_ones = [index for index in active if index not in rates]
        offers = {}
        for resource, size in free.items():
            used = sum((uses[i].get(resource, Fraction(0)) for i in open_ones), Fraction(0))
            if used:
                offers[resource] = size / used
        if not offers:
            return rates | dict.fromkeys(open_ones)
        least = min(offers, key=lambda resource: offers[resource])
        for index in open_ones:
            if uses[index].get(least):
                rates[index] = rate = offers[least]
                for resource, use in uses[index].items():
                    free[resource] -= rate * use
    return rates


def equal_split(active: Mapping[int, Phase], capacities: Sequence[float]) -> dict[int, Rate]:
    """A mistake to find: what one phase cannot take is not given to the others."""
    rates: dict[int, Rate] = {}
    uses = {index: _uses(index, phase, capacities) for index, phase in active.items()}
    for index, phase in active.items():
        bounds = [Fraction(phase.rate)] if phase.rate != inf else []
        for resource, use in uses[index].items():
            if isinstance(resource, int):
                users = sum(1 for other in active if resource in uses[other])
                bounds.append(Fraction(capacities[resource]) / users / use)
        rates[index] = min(bounds) if bounds else None
    return rates


def _uses(index: int, phase: Phase, capacities: Sequence[float]) -> dict[object, Fraction]:
    """Share that the phase takes of each resource that can bound it; of its own rate, 1."""
    uses: dict[object, Fraction] = {}
    for resource, use in phase.uses:
        if use and capacities[resource] != inf:
            uses[resource] = uses.get(resource, Fraction(0)) + Fraction(use)
    if phase.rate != inf:
        uses["own", index] = Fraction(1)
    return uses


def critical_path_us(tasks: Sequence[Task], capacities: Sequence[float] = ()) -> float:
    """The longest chain of tasks if each had all resources to itself: no run is shorter. Tasks stand in order."""
    stops: list[float] = []
    for task in tasks:
        start = max((stops[i] for i in task.after), default=0.0)
        stops.append(start + sum(alone_us(phase, capacities) for phase in task.phases))
    return max(stops, default=0.0)


def alone_us(phase: Phase, capacities: Sequence[float]) -> float:
    """Time of the phase with all resources to itself."""
    demand: dict[int, float] = {}
    for resource, use in phase.uses:
        demand[resource] = demand.get(resource, 0.0) + use
    rate = min([phase.rate, *(capacities[resource] / use for resource, use in demand.items() if use > 0)])
    return phase.amount / rate if phase.amount > 0 else 0.0
