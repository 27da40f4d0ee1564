"""The systems benchmark's results as tables for a terminal; `report` draws the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table

from ds_moe_ep.records.names import BASELINE, MODES, SYSTEMS, bed_title
from ds_moe_ep.records.record import Record

COLUMNS = (
    ("step, ms", "step", 0),
    ("tokens/s", "tps", 0),
    ("us/token", "tpot", 1),
    ("busy, %", "busy", 0),
    (f"{SYSTEMS[BASELINE]} = 1", f"ratio_to_{BASELINE}", 2),
    ("serial = 1", "ratio_to_ep16_serial", 2),
    ("native = 1", "ratio_to_native_ep16", 2),
    ("AutoEP = 1", "ratio_to_autoep_ep16", 2),
    ("hidden, %", "hidden", 0),
)


def summary_tables(records: Iterable[Record]) -> Iterator[Table]:
    """A table a bed and mode: throughput of each system, and how many times that of the others it is."""
    found: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    for record in records:
        kind, bed, mode, system, *what = record.name.split(".")
        if kind == "system" and mode in MODES and len(what) == 1:
            found.setdefault((bed, mode), {}).setdefault(system, {})[what[0]] = record
    for (bed, mode), systems in found.items():
        table = Table(title=f"{bed_title(bed)}, {MODES[mode]}: median (quartiles); higher ratios are faster")
        table.add_column("system")
        for title, _, _ in COLUMNS:
            table.add_column(title, justify="right")
        for system, cells in systems.items():
            table.add_row(SYSTEMS[system], *(_cell(cells.get(what), digits) for _, what, digits in COLUMNS))
        yield table


def _cell(record: Record | None, digits: int) -> str:
    if record is None:
        return "-"
    low, high = record.spread
    return f"{record.value:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"
