"""The way of gradient sums from an expert's hosts to its home: in rounds, along a binomial tree.

A home that took in every host's sums would need memory for each of them at once, and its link would carry them all.
Hosts therefore add up among themselves: of n hosts a home takes in about log2(n + 1) sums, one after the other.

1. The home and its hosts, in the order of ranks, are numbered from 0. Number i sends to i without its lowest bit.
2. A rank sends an expert's sums once all that go through it are there.
3. In a round a rank takes in one expert's sums at most, so that one buffer is enough.

All of it is a function of what all ranks know, so all come to the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Sums of one expert from one rank of the group to another. `weights`: a bit for each weight that has some."""

    expert: int
    source: int
    target: int
    weights: int
    is_summed: bool  # over several hosts


def rounds_home(owed: Mapping[tuple[int, int], int], home: Callable[[int], int]) -> tuple[tuple[Move, ...], ...]:
    """The moves of each round, where `owed` has the weights' bits of each (expert, host) that has sums."""
    parties: dict[int, list[int]] = {}
    for expert, host in sorted(owed):
        parties.setdefault(expert, [home(expert)]).append(host)
    waiting = sorted((i & -i, expert, i) for expert, ranks in parties.items() for i in range(1, len(ranks)))
    weights = {
        (expert, i): owed.get((expert, rank), 0) for expert, its in parties.items() for i, rank in enumerate(its)
    }
    to_come = dict.fromkeys(weights, 0)
    for lowest_bit, expert, i in waiting:
        to_come[expert, i - lowest_bit] += 1
    is_summed: set[tuple[int, int]] = set()
    rounds = []
    while waiting:
        taken: dict[int, tuple[int, int, int]] = {}  # by the rank that takes it in
        for edge in waiting:
            lowest_bit, expert, i = edge
            if not to_come[expert, i]:
                taken.setdefault(parties[expert][i - lowest_bit], edge)
        moves = []
        for target, (_, expert, i) in taken.items():
            moves.append(Move(expert, parties[expert][i], target, weights[expert, i], (expert, i) in is_summed))
        for lowest_bit, expert, i in taken.values():
            to_come[expert, i - lowest_bit] -= 1
            weights[expert, i - lowest_bit] |= weights[expert, i]
            is_summed.add((expert, i - lowest_bit))
        waiting = [edge for edge in waiting if edge not in taken.values()]
        rounds.append(tuple(moves))
    return tuple(rounds)
