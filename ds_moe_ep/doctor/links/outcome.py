"""A trial of links as values: what ranks are to try, and what is known when they have. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LinkTrial:
    """The order for a trial of links; the same on every rank."""

    groups: tuple[tuple[int, ...], ...]  # expert groups, which partition the world
    node_size: int
    seconds: float
    start_s: float  # how long ranks wait for each other
    patience_s: float = 20.0  # beyond the time that transfers should take

    @property
    def limit_s(self) -> float:
        """When a trial that started well counts as hung."""
        return self.patience_s + 4 * self.seconds


@dataclass(frozen=True)
class TriedLink:
    """Measurements of one pair of ranks; `low` is the lower rank."""

    low: int
    high: int
    latency_us: float  # half the median round trip of one byte
    gb_per_s: float  # one way, of a large message

    @property
    def name(self) -> str:
        return f"{self.low}-{self.high}"


@dataclass(frozen=True, kw_only=True)
class Presence:
    """A rank's account of itself when it is up."""

    host: str = ""
    has_gpu: bool = False
    versions: Mapping[str, str | None] = field(default_factory=dict)
    variables: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LinksOutcome:
    """All that is known after the ranks have measured, or have failed to."""

    world_size: int
    backend: str = "gloo"
    up: Mapping[int, Presence] = field(default_factory=dict)
    waited_s: float = 0.0  # until the last of them was up, or until nobody waited longer
    links: tuple[TriedLink, ...] = ()
    failed: Mapping[int, str] = field(default_factory=dict)
    silent: tuple[int, ...] = ()  # ranks that were up and did not end in time
    hung: tuple[int, int] | None = None  # the pair at which they stand: pairs are tried one after the other
    stuck: bool = False  # this process holds a transfer that does not end

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank not in self.up]

    def to_json(self) -> str:
        """The outcome as text, for the process that prints it."""
        values = {**vars(self), "up": {rank: vars(presence) for rank, presence in self.up.items()}}
        return json.dumps({**values, "links": [vars(link) for link in self.links]})


def outcome_from(text: str) -> LinksOutcome:
    """The outcome of `to_json`."""
    values: dict[str, Any] = json.loads(text)
    values["up"] = {int(rank): Presence(**presence) for rank, presence in values["up"].items()}
    values["failed"] = {int(rank): error for rank, error in values["failed"].items()}
    values["links"] = tuple(TriedLink(**link) for link in values["links"])
    values["hung"] = tuple(values["hung"]) if values["hung"] else None
    return LinksOutcome(**{**values, "silent": tuple(values["silent"])})
