"""A sweep as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import NONE, number, percent
from ds_moe_ep.records.render import print_lines, print_tables
from ds_moe_ep.records.table import Table
from ds_moe_ep.simulate.sweep.sweep import Sweep, SweepPoint
from ds_moe_ep.specification.laws import STATED_R2, r2_text

FOOT = "Simulated; nothing was measured. The bar: all of the cluster's ranges at their slower and at their faster ends."
HEAD = ("schedule", "EP", "tokens/s", "us/token", "busy", "MFU", "hidden", "GB")


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Prints the points of a sweep, the laws' fits beside what the specification states, and what it means."""
    tables = [_points(title, points) for total, title in TOTALS.items() if (points := sweep.of(total))]
    if any(sweep.law_fits(total) for total in TOTALS):
        tables.append(_fits(sweep))
    print_tables(tables, console)
    notes = [f"note: {note}" for note in sweep.notes]
    if not all(point.fits for point in sweep.points):
        notes.append("* more memory than a device has: times are of devices with enough")
    print_lines(notes, console, style="yellow")
    print_lines([FOOT], console, style="dim")


def _points(title: str, points: Sequence[SweepPoint]) -> Table:
    return Table(title, HEAD, tuple(map(_row, points)))


def _row(point: SweepPoint) -> tuple[str, ...]:
    its = point.quantities
    return (
        point.schedule,
        f"{point.ep} x {point.dp}" if point.dp > 1 else f"{point.ep}",
        its["tps"].text(digits=3),
        number(its["tpot"].value),
        its["busy"].percent(bar=False),
        its["mfu"].percent(bar=False),
        percent(its["hidden"].value) if "hidden" in its else NONE,
        f"{number(its['memory'].value / 1e9, digits=3)}{'' if point.fits else '*'}",
    )


def _fits(sweep: Sweep) -> Table:
    fits = {total: {its.law: its.r2 for its in sweep.law_fits(total)} for total in TOTALS}
    rows = []
    for law, title in LAWS.items():
        found = [fits[total].get(law) for total in TOTALS]
        rows.append((title, f"{STATED_R2[law]:g}", *(r2_text(r2, 3) for r2 in found)))
    return Table("R2 of the specification's laws", ("law", "stated", *TOTALS.values()), tuple(rows))
