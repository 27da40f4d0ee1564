"""Verdicts on an engine: one line each, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from ds_moe_ep.records.quantity import counted, number
from ds_moe_ep.records.render import to_terminal
from ds_moe_ep.records.table import table

short = partial(number, significant=4)  # numbers in verdicts
TrainingStatus = Literal["ok", "note", "problem"]
STYLES = {"ok": "green", "note": "cyan", "problem": "bold red"}
CHECKS = (
    "groups",
    "routing",
    "balance",
    "gradients",
    "movement",
    "norm",
    "loss scale",
    "replicas",
    "checkpoint",
    "run",
)


@dataclass(frozen=True)
class TrainingVerdict:
    """The outcome of one check: of all parameters where it is ok, of one parameter on one rank where it is a problem.

    A note tells what could not be looked at, and why.
    """

    check: str
    status: TrainingStatus
    found: str
    fix: str = ""
    parameter: str = ""
    rank: int | None = None

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check
        assert self.fix or self.status != "problem", f"{self.check} has no fix"

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.parameter, "" if self.rank is None else f"on rank {self.rank}")))
        return f"{where}: {self.found}" if where else self.found


def problem(check: str, found: str, fix: str, parameter: str = "") -> TrainingVerdict:
    """A problem that this rank found, with the way out."""
    return TrainingVerdict(check, "problem", found, fix, parameter, dist.get_rank())


@dataclass(frozen=True)
class EngineReport:
    """All verdicts on an engine, the same on every rank."""

    verdicts: tuple[TrainingVerdict, ...]

    @property
    def is_ok(self) -> bool:
        """True where no check found a problem."""
        return not self.problems

    @property
    def problems(self) -> tuple[TrainingVerdict, ...]:
        """The verdicts that found something wrong."""
        return tuple(verdict for verdict in self.verdicts if verdict.status == "problem")

    @property
    def exit_code(self) -> int:
        """0, or 1 where there is a problem."""
        return int(not self.is_ok)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "verdict": "ok" if self.is_ok else "problem",
            "problems": len(self.problems),
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
        }

    def __str__(self) -> str:
        return "\n".join(f"{v.status} {v.check}: {v}" + (f"; {v.fix}" if v.fix else "") for v in self.verdicts)

    def print(self, console: Console) -> None:
        """Prints the conclusion, then a line per verdict, problems first."""
        told = "it trains what it says" if self.is_ok else counted(len(self.problems), "problem")
        rows = [
            (each.status, each.check, f"{each}\nfix: {each.fix}" if each.fix else str(each))
            for each in sorted(self.verdicts, key=lambda each: each.status != "problem")
        ]
        console.print(Text(told, style=STYLES["ok" if self.is_ok else "problem"]), "", sep="\n")
        console.print(to_terminal(table("", [""] * 3, rows, text_columns=3), STYLES))


MAX_TOLD = 4  # problems of one check that get a line each


def concluded(check: str, problems: Iterable[TrainingVerdict], told: str) -> list[TrainingVerdict]:
    """The problems of a check, few of them one by one; or one verdict that all is well."""
    listed: Sequence[TrainingVerdict] = list(problems)
    if not listed:
        return [TrainingVerdict(check, "ok", told)]
    rest = len(listed) - MAX_TOLD
    if rest <= 0:
        return list(listed)
    last = listed[MAX_TOLD - 1]
    return [*listed[: MAX_TOLD - 1], dataclasses.replace(last, found=f"{last.found} (and {rest} more like it)")]
