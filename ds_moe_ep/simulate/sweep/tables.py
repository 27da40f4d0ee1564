"""A sweep as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.simulate.step.predict import Estimate
from ds_moe_ep.simulate.sweep.records import schedule_of
from ds_moe_ep.simulate.sweep.sweep import Sweep, SweepPoint
from ds_moe_ep.specification.laws import STATED_R2, r2_text

FOOT = "Simulated; nothing was measured. The bar: all of the cluster's ranges at their slower and at their faster ends."


def print_sweep(sweep: Sweep, console: Console) -> None:
    """Prints the points of a sweep, the laws' fits beside what the specification states, and what it means."""
    for total, title in TOTALS.items():
        if points := sweep.of(total):
            console.print(_points(title, points))
    if any(sweep.law_fits(total) for total in TOTALS):
        console.print(_fits(sweep))
    for note in sweep.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if not all(point.fits for point in sweep.points):
        console.print(Text("* more memory than a device has: times are of devices with enough", style="yellow"))
    console.print(Text(FOOT, style="dim"))


def _points(title: str, points: Sequence[SweepPoint]) -> Table:
    table = _table(title, "EP", "schedule", "tokens/s", "bar", "us/token", "busy", "MFU", "hidden", "GB")
    for point in points:
        hidden, tps = point.prediction.step.hidden, point.value("tps")
        table.add_row(
            f"{point.ep} x {point.dp}" if point.dp > 1 else f"{point.ep}",
            schedule_of(point),
            _short(tps.value),
            _range(tps),
            f"{point.value('tpot').value:.3g}",
            _percent(point.value("busy").value),
            _percent(point.prediction.step.mfu),
            "-" if hidden is None else _percent(hidden),
            f"{point.memory.peak / 1e9:.3g}{'' if point.fits else '*'}",
        )
    return table


def _fits(sweep: Sweep) -> Table:
    table = _table("R2 of the specification's laws", "law", "stated", *TOTALS.values())
    fits = {total: {its.law: its for its in sweep.law_fits(total)} for total in TOTALS}
    for law, title in LAWS.items():
        found = [fits[total].get(law) for total in TOTALS]
        cells = (r2_text(None if its is None else its.r2, 3) for its in found)
        table.add_row(title, f"{STATED_R2[law]:g}", *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("law", "schedule") else "right", no_wrap=column == "bar")
    return table


def _range(tps: Estimate) -> str:
    """The bar with its unit once: 261-379 k."""
    low, high = _short(tps.low), _short(tps.high)
    if low == high:
        return "-"
    return f"{low.removesuffix(high[-2:])}-{high}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short(value: float) -> str:
    """Tokens a second: 18.7 k, 322 k, 1.29 M, 20.6 M."""
    scale, letter = (1e6, "M") if value >= 1e6 else (1e3, "k")
    size = value / scale
    return f"{size:,.{2 if size < 10 else 1 if size < 100 else 0}f} {letter}"
