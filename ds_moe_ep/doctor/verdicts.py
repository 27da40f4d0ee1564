"""Verdicts: one per check, from good to bad; for people the conclusion first, then from bad to good."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from ds_moe_ep.records.quantity import counted
from ds_moe_ep.records.render import to_terminal
from ds_moe_ep.records.table import Table, table

Status = Literal["ok", "note", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "note", "warning", "problem")  # from good to bad
URGENT: tuple[Status, ...] = ("problem", "warning")
STYLES: dict[str, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
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


def print_verdicts(verdicts: Sequence[Verdict], console: Console, *, verbose: bool = False) -> None:
    """Prints the conclusion, problems and warnings, then the rest. What does not apply here needs `verbose`."""
    shown = [verdict for verdict in verdicts if verdict.applies or verbose]
    urgent = [verdict for status in URGENT for verdict in shown if verdict.status == status]
    rest = [verdict for group in GROUPS for verdict in shown if verdict.group == group and verdict not in urgent]
    console.print(Text(conclusion(verdicts), style=STYLES[worst(verdicts)]))
    for verdict_table in filter(None, (_urgent_table(urgent), _rest_table(rest))):
        console.print("", to_terminal(verdict_table, STYLES), sep="\n")
    if hidden := len(verdicts) - len(shown):
        told = counted(hidden, "check does", "checks do")
        console.print("", Text(f"{told} not matter on this machine; --verbose shows all", style="dim"), sep="\n")


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The verdict of all, in one line: ready, ready with warnings, or the number of problems."""
    counts = count(verdicts)
    told = [counted(counts[status], status) for status in URGENT if counts[status]]
    if worst(verdicts) == "problem":
        return f"{', '.join(told)}: it cannot run as it is"
    return ", ".join(["ready", *told])


def _urgent_table(verdicts: Sequence[Verdict]) -> Table | None:
    rows = [(verdict.status, verdict.name, _told(verdict)) for verdict in verdicts]
    return table("", [""] * 3, rows, text_columns=3) if rows else None


def _rest_table(verdicts: Sequence[Verdict]) -> Table | None:
    """All verdicts in one table; each group is named in its first row."""
    groups = [verdict.group for verdict in verdicts]
    rows = [
        (each.group if index == groups.index(each.group) else "", each.status, each.name, _told(each))
        for index, each in enumerate(verdicts)
    ]
    return table("", [""] * 4, rows, text_columns=4) if rows else None


def _told(verdict: Verdict) -> str:
    return f"{verdict.found}\nfix: {verdict.fix}" if verdict.fix else verdict.found
