"""Records of the layer benchmark as a table: for the terminal, and in Markdown for README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from ds_moe_ep.records.record import Record

COLUMNS = ("case", "side", "time, ms", "native = 1", "sent, MB", "peak, MB")
MEGABYTE = 1e6


@dataclass(frozen=True)
class LayerRow:
    """The records of one side of one case, by what they measure."""

    case: str
    side: str
    found: dict[str, Record]

    def cells(self) -> tuple[str, ...]:
        return (
            self.case,
            self.side,
            self._cell("time", 1.0, 1),
            self._cell("ratio", 1.0, 2),
            self._cell("bytes", MEGABYTE, 2, spread=False),
            self._cell("peak", MEGABYTE, 1, spread=False),
        )

    def _cell(self, what: str, scale: float, digits: int, spread: bool = True) -> str:
        record = self.found.get(what)
        if record is None:
            return "-"
        text = f"{record.value / scale:.{digits}f}"
        if spread:
            text += f" ({record.spread[0] / scale:.{digits}f}-{record.spread[1] / scale:.{digits}f})"
        return text


def rows_of(records: Iterable[Record]) -> list[LayerRow]:
    """One row a side and case, in the records' order. Names are layer.<case>.<side>.<what>."""
    rows: dict[tuple[str, str], LayerRow] = {}
    for record in records:
        parts = record.name.split(".")
        if len(parts) == 4 and parts[0] == "layer":
            _, case, side, what = parts
            rows.setdefault((case, side), LayerRow(case, side, {})).found[what] = record
    return list(rows.values())


def terminal_table(records: Sequence[Record]) -> Table:
    """A rich table; cases are set apart by a rule."""
    table = Table(title="Forward + backward of one layer: median (quartiles), slowest rank; bytes a rank")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    rows = rows_of(records)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].case != row.case
        table.add_row(*row.cells(), end_section=last)
    return table


def markdown_table(records: Sequence[Record]) -> str:
    """The same table for README, with the conditions in the last line."""
    lines = [_line(COLUMNS), _line(("---", "---", "---:", "---:", "---:", "---:"))]
    lines += [_line(row.cells()) for row in rows_of(records)]
    if records:
        first = records[0]
        lines += ["", f"`{first.command}` at {first.commit} on {first.hardware}."]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
