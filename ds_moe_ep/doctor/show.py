"""The verdicts as a table a group, with the way out beneath what is not well."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.doctor.verdicts import GROUPS, STATUSES, Status, Verdict, count, worst

STYLES: dict[Status, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}
CONCLUSIONS: dict[Status, str] = {
    "ok": "all is well",
    "note": "all is well",
    "warning": "it can run; see the warnings",
    "problem": "it cannot run as it is",
}


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Prints one table a group, and the conclusion."""
    width = max((len(verdict.name) for verdict in verdicts), default=0)
    for group in GROUPS:
        rows = [verdict for verdict in verdicts if verdict.group == group]
        if rows:
            console.print(_table(group, rows, width), "")
    console.print(Text(conclusion(verdicts), style=STYLES[worst(verdicts)]))


def _table(group: str, rows: Sequence[Verdict], width: int) -> Table:
    table = Table(title=group, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(width=max(map(len, STATUSES)), no_wrap=True)
    table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        found = Text(row.found)
        if row.way_out:
            found.append(f"\n-> {row.way_out}", style="bold")
        table.add_row(Text(row.status, style=STYLES[row.status]), row.name, found)
    return table


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The last line: the verdict of all."""
    counts = count(verdicts)
    listed = [f"{number} {status}{'' if status == 'ok' or number == 1 else 's'}" for status, number in counts.items()]
    return f"verdict: {CONCLUSIONS[worst(verdicts)]} ({', '.join(listed)})"
