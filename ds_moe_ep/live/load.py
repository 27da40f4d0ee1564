"""Load of one layer's experts and ranks in one report, and the figures that follow from it.

Rows are counted before any drop: a row is one choice of one token. The passes are those of training since the report
before, recomputed ones left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Guests = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Counts of one layer, over all ranks.

    `rank_rows_R` are the rows that each rank computed per pass, on average; with a capacity padded ones count, since
    they are computed too. `p50` and `p95` are, over the passes, the rows of the fullest rank over the mean of all.
    `guests_RS` are the experts in the replica slots of each rank, as `rank_rows_R` has the ranks; a free slot holds -1.
    """

    name: str
    num_passes: int
    rows_E: tuple[int, ...]
    dropped_E: tuple[int, ...]
    rank_rows_R: tuple[float, ...]
    p50: float
    p95: float
    guests_RS: Guests = ()

    @cached_property
    def num_rows(self) -> int:
        return sum(self.rows_E)

    @cached_property
    def share_E(self) -> tuple[float, ...]:
        """The share of the layer's rows that each expert gets; 0 where there were none."""
        return tuple(rows / max(self.num_rows, 1) for rows in self.rows_E)

    @property
    def max_over_mean(self) -> float:
        """Rows of the fullest expert over the mean: 1 is balanced, E is all to one; 0 without rows."""
        return max(self.share_E) * len(self.rows_E)

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """The experts that no token chose."""
        return tuple(expert for expert, rows in enumerate(self.rows_E) if rows == 0)

    @property
    def entropy_bits(self) -> float:
        """The entropy of the routing: log2 of E where all experts get alike, 0 where one gets all."""
        return sum(-share * math.log2(share) for share in self.share_E if share) + 0.0

    @property
    def dropped_percent(self) -> float:
        """The share of the rows that a capacity dropped."""
        return 100 * sum(self.dropped_E) / max(self.num_rows, 1)

    @property
    def num_replicas(self) -> int:
        """Slots that hold a replica."""
        return sum(guest >= 0 for guests in self.guests_RS for guest in guests)

    def rows_per_pass(self, expert: int) -> float:
        return self.rows_E[expert] / max(self.num_passes, 1)


def fullest_over_mean(rows_R: Sequence[float]) -> float:
    """Rows of the fullest rank over the mean: 1 is balanced, and so are ranks without rows."""
    total = sum(rows_R)
    return max(rows_R) * len(rows_R) / total if total else 1.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, between two of them in proportion. Of none: 1, as balanced."""
    if not values:
        return 1.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
