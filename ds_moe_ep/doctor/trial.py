"""What a trial of the links is told, the same on every rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkTrial:
    """What is tried; the same on every rank."""

    groups: tuple[tuple[int, ...], ...]  # expert groups, which partition the world
    node_size: int
    seconds: float
    start_s: float  # how long ranks wait for each other
    patience_s: float = 20.0  # beyond the time that transfers should take

    @property
    def limit_s(self) -> float:
        """When a trial that started well counts as hung."""
        return self.patience_s + 4 * self.seconds
