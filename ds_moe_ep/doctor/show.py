"""The verdicts for people: the conclusion, problems and warnings with their fixes, then all else by group."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.doctor.verdicts import GROUPS, STATUSES, Status, Verdict, count, worst

STYLES: dict[Status, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
URGENT: tuple[Status, ...] = ("problem", "warning")


def print_verdicts(verdicts: Sequence[Verdict], console: Console, *, verbose: bool = False) -> None:
    """Prints the conclusion, then the verdicts from bad to good. Those that do not apply here need `verbose`."""
    shown = [verdict for verdict in verdicts if verdict.applies or verbose]
    console.print(Text(conclusion(verdicts), style=STYLES[worst(verdicts)]), highlight=False)
    urgent = [verdict for status in URGENT for verdict in shown if verdict.status == status]
    width = max((len(verdict.name) for verdict in shown), default=0)
    if urgent:
        console.print("", _table("", urgent, width))
    for group in GROUPS:
        rest = [verdict for verdict in shown if verdict.group == group and verdict.status not in URGENT]
        if rest:
            console.print("", _table(group, rest, width))
    if hidden := len(verdicts) - len(shown):
        what = "1 check does" if hidden == 1 else f"{hidden} checks do"
        console.print("", Text(f"{what} not matter on this machine; --verbose shows all", style="dim"), sep="\n")


def _table(title: str, rows: Sequence[Verdict], width: int) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    table.add_column(width=max(map(len, STATUSES)), no_wrap=True)
    table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        found = Text(row.found)
        if row.fix:
            found.append(f"\nfix: {row.fix}", style="bold")
        table.add_row(Text(row.status, style=STYLES[row.status]), row.name, found)
    return table


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The verdict of all, in one line: ready, ready with warnings, or the number of problems."""
    counts = count(verdicts)
    told = [f"{counts[status]} {status}{'' if counts[status] == 1 else 's'}" for status in URGENT if counts[status]]
    if worst(verdicts) == "problem":
        return f"{', '.join(told)}: it cannot run as it is"
    return ", ".join(["ready", *told])
