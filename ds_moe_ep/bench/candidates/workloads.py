"""Routing workloads, from (workload, seed, step) alone: the rows of each expert and the tokens of each rank.

    W0 balanced          every expert alike
    W1 hot expert        one expert with 4 times the mean, the others alike
    W2 hot rank          all experts of one rank, 4 times the mean together
    W3 spread skew       Zipf's law with exponent 1, in an order that the seed draws
    W4 ragged sources    ranks with 1/4 to 7/4 of the mean tokens, experts alike
    W5 idle experts      a quarter of the experts without a token, the others alike
    W6 moving hot expert W1, whose hot expert is another one every MOVES_EVERY steps
    W7 bursts            W0, but every BURSTS_EVERY-th step is W1's

A step is one micro-batch. Nothing is drawn per token: every source sends the same shares, exact up to rounding, so that
two runs, and two systems, have the same loads.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.bench.candidates.cases import deal

HOT = 4.0  # rows of a hot expert, or of a hot rank, over the mean
EXPONENT = 1.0  # of Zipf's law
IDLE = 0.25  # of the experts
RAGGED = (0.25, 1.75)  # tokens of the ranks over the mean
MOVES_EVERY = 256  # steps that the hot expert of W6 stays
BURSTS_EVERY = 8

TITLES: Mapping[str, str] = {
    "W0": "balanced",
    "W1": "one hot expert",
    "W2": "one hot rank",
    "W3": "spread skew (Zipf)",
    "W4": "ragged sources",
    "W5": "experts without a token",
    "W6": "a hot expert that moves",
    "W7": "bursts",
}


@dataclass(frozen=True)
class Workload:
    """One of TITLES, for a layer of so many experts on so many ranks."""

    name: str
    num_experts: int
    num_ranks: int
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.name in TITLES, self.name

    def shares_E(self, step: int) -> list[float]:
        """Share of the rows of a step that goes to each expert, from every source alike."""
        experts, local = range(self.num_experts), self.num_experts // self.num_ranks
        order = self._draw(0).sample(experts, self.num_experts)
        name = self.name
        if name == "W7":
            name = "W1" if step % BURSTS_EVERY == BURSTS_EVERY - 1 else "W0"
        if name in ("W1", "W6"):
            turn = step // MOVES_EVERY if name == "W6" else 0
            return _hot([order[turn % self.num_experts]], self.num_experts)
        if name == "W2":
            first = order[0] // local * local
            return _hot(list(range(first, first + local)), self.num_experts)
        if name == "W3":
            weights = [0.0] * self.num_experts
            for place, expert in enumerate(order):
                weights[expert] = (1 + place) ** -EXPONENT
            return [weight / sum(weights) for weight in weights]
        if name == "W5":
            idle = set(order[: round(IDLE * self.num_experts)])
            return [0.0 if expert in idle else 1 / (self.num_experts - len(idle)) for expert in experts]
        return [1 / self.num_experts] * self.num_experts

    def num_tokens(self, rank: int, mean: int) -> int:
        """Tokens of a rank where the mean rank has `mean`; their sum over the ranks is exact."""
        if self.name != "W4" or self.num_ranks == 1:
            return mean
        low, high = RAGGED
        place = self._draw(1).sample(range(self.num_ranks), self.num_ranks).index(rank)
        return _rounded([low + (high - low) * at / (self.num_ranks - 1) for at in range(self.num_ranks)], mean)[place]

    def expert_ids(self, rank: int, step: int, num_tokens: int, top_k: int = 1) -> Tensor:
        """ids_TK of a rank's tokens in a step, distinct within a token."""
        rows_E = rows_of(self.shares_E(step), num_tokens * top_k, most=num_tokens)
        generator = torch.Generator().manual_seed(hash_of(self.seed, 2, step, rank))
        return deal(rows_E, top_k, generator)

    def _draw(self, purpose: int) -> random.Random:
        return random.Random(hash_of(self.seed, purpose))


def rows_of(shares_E: list[float], num_rows: int, most: int) -> list[int]:
    """Whole rows of each expert in proportion to its share, at most `most`; the largest remainders are rounded up.

    What is beyond `most`, the tokens of which each visits an expert once, goes to the others.
    """
    rows_E, left = [0] * len(shares_E), num_rows
    open_E = [expert for expert, share in enumerate(shares_E) if share > 0]
    while left and open_E:
        total = sum(shares_E[expert] for expert in open_E)
        exact = {expert: left * shares_E[expert] / total for expert in open_E}
        full = [expert for expert in open_E if exact[expert] >= most]
        if not full:
            by_remainder = sorted(open_E, key=lambda expert: (-(exact[expert] % 1), expert))
            floor = {expert: int(exact[expert]) for expert in open_E}
            for expert in by_remainder[: left - sum(floor.values())]:
                floor[expert] += 1
            for expert, rows in floor.items():
                rows_E[expert] = rows
            return rows_E
        for expert in full:
            rows_E[expert], left = min(most, left), left - min(most, left)
            open_E.remove(expert)
    assert not left, "too few experts with a share for so many choices of a token"
    return rows_E


def hash_of(*parts: int) -> int:
    """A seed that differs where any of the parts does."""
    value = 0
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**61 - 1)
    return value


def _hot(hot: list[int], num_experts: int) -> list[float]:
    """Shares where the hot experts have HOT times the mean rank's or expert's share together."""
    together = min(HOT * len(hot) / num_experts, 1.0)
    others = num_experts - len(hot)
    rest = (1 - together) / others if others else 0.0
    return [together / len(hot) if expert in hot else rest for expert in range(num_experts)]


def _rounded(weights: list[float], mean: int) -> list[int]:
    """Whole numbers in proportion to the weights, whose sum is `mean` times their number."""
    total, reached, found = sum(weights), 0.0, []
    for weight in weights:
        before = round(reached)
        reached += weight * mean * len(weights) / total
        found.append(round(reached) - before)
    return found
