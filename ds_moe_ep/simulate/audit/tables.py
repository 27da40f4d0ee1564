"""The audit as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.simulate.audit.audit import NONE, AuditRow


def print_audit(rows: Iterable[AuditRow], cluster_name: str, console: Console) -> None:
    """Prints the audit for people: the section of the document stands behind what it states."""
    table = Table(title=f"The specification's figures on {cluster_name}", box=SIMPLE_HEAD, show_lines=True)
    for column in ("figure", "stated (section)", "derived", "simulated", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        name, section, stated, *others = row.cells
        table.add_row(name, stated if stated == NONE else f"{stated} ({section})", *others)
    console.print(table)
    console.print(Text("Simulated, not measured; in brackets: all of the cluster's ranges at both ends.", style="dim"))
