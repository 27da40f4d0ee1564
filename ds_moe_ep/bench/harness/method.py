"""The one method of measurement: several candidates in one run, alternating, compared round by round.

1. Every candidate runs `warm_ups` times, untimed.
2. A round runs every candidate once. The order is rotated from round to round, and turned round after each
   full rotation, so that none always runs first or always after the same neighbour.
3. Before a candidate is timed it prepares itself (untimed), and all ranks meet at a barrier.
4. Its time in a round is the time of the slowest rank on a monotonic clock.
5. The lowest and the highest 5 % of the rounds are dropped; the median and the quartiles are reported.
6. Two candidates are compared by their ratio *within a round*, which slow drifts of the machine cannot touch;
   the ratio's median and quartiles are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import Quantity

DROPPED_FRACTION = 0.05  # at each end (the specification, section 5.2)


def _nothing() -> None:
    return None


class Candidate(Protocol):
    """One of the things compared on this rank. Its passes may be collective."""

    def prepare(self) -> object:
        """Makes ready for a run; not timed."""

    def run(self) -> object:
        """The work that is timed; waits for its device."""


@dataclass(frozen=True)
class Ranks:
    """How the ranks that measure together meet: a barrier, and the largest of each number over all ranks."""

    barrier: Callable[[], object]
    slowest: Callable[[Sequence[float]], Sequence[float]]


ALONE = Ranks(barrier=_nothing, slowest=tuple)


Round = dict[str, float]  # seconds of every candidate in one round


def rotation(names: Sequence[str], round_index: int) -> tuple[str, ...]:
    """The order of the candidates in a round: rotated by one each round, reversed in every second rotation."""
    cycle, offset = divmod(round_index, len(names))
    turned = tuple(names[offset:]) + tuple(names[:offset])
    return turned[::-1] if cycle % 2 else turned


def measure(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    warm_ups: int,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int, Round], object] | None = None,
) -> list[Round]:
    """Seconds of every candidate in every round, of the slowest rank; the same list on every rank.

    Collective over `ranks`. `on_round(index, times)` is called after each round, untimed. Raises
    ConfigError without a candidate or a round.
    """
    if not candidates or rounds < 1 or warm_ups < 0:
        raise ConfigError(
            f"bench.candidates={list(candidates)}, rounds={rounds}, warm_ups={warm_ups}: one candidate and one round "
            "at least, and no negative warm-ups"
        )
    names = tuple(candidates)
    for index in range(warm_ups):
        for name in rotation(names, index):
            _timed(candidates[name], ranks, clock)
    measured: list[Round] = []
    for index in range(rounds):
        here = {name: _timed(candidates[name], ranks, clock) for name in rotation(names, index)}
        everywhere = ranks.slowest([here[name] for name in names])
        measured.append(dict(zip(names, everywhere, strict=True)))
        if on_round is not None:
            on_round(index, measured[-1])
    return measured


def _timed(candidate: Candidate, ranks: Ranks, clock: Callable[[], float]) -> float:
    candidate.prepare()
    ranks.barrier()
    start = clock()
    candidate.run()
    return clock() - start


def trimmed(values: Sequence[float], fraction: float = DROPPED_FRACTION) -> list[float]:
    """The values in ascending order, without the lowest and the highest `fraction` of them (rounded down)."""
    ordered = sorted(values)
    dropped = int(len(ordered) * fraction)
    return ordered[dropped : len(ordered) - dropped]


def summarize(values: Sequence[float]) -> Quantity:
    """Median and quartiles of the trimmed values. Raises ConfigError for no values."""
    if not values:
        raise ConfigError("bench.rounds=0: there is nothing to summarize; let one round finish")
    kept = trimmed(values)
    if len(kept) == 1:
        return Quantity.of(kept[0])
    low, middle, high = statistics.quantiles(kept, n=4, method="inclusive")
    return Quantity("", "", "", middle, low, high, len(kept))
