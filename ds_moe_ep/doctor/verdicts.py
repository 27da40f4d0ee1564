"""Verdicts: one per check, from good to bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "note", "warning", "problem")  # from good to bad
GROUPS = ("packages", "machine", "environment", "job", "links")


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor. A problem keeps the run from working, a warning slows or endangers it."""

    group: str
    name: str
    status: Status
    found: str
    fix: str = ""
    applies: bool = True  # False where it cannot matter on this machine: shown on demand alone

    def __post_init__(self) -> None:
        assert self.group in GROUPS, self.group
        assert self.applies or self.status == "ok", f"{self.name} matters"
        assert self.fix or self.status in ("ok", "note"), f"{self.name} has no fix"


def worst(verdicts: Iterable[Verdict]) -> Status:
    """The worst status among `verdicts`; ok without any."""
    return max((verdict.status for verdict in verdicts), key=STATUSES.index, default="ok")


def count(verdicts: Iterable[Verdict]) -> dict[Status, int]:
    """The number of verdicts of each status."""
    found = [verdict.status for verdict in verdicts]
    return {status: found.count(status) for status in STATUSES}


def to_dict(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """All verdicts as plain values, for JSON."""
    listed = list(verdicts)
    return {
        "verdict": worst(listed),
        "counts": count(listed),
        "verdicts": [dataclasses.asdict(verdict) for verdict in listed],
    }
