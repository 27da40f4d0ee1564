"""`Table`: rows of text under a head, which render.py writes for a terminal, as Markdown, and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.records.quantity import NONE, Quantity


@dataclass(frozen=True)
class Table:
    """Rows under a head; a cell may have several lines. The first `text_columns` are text, the others numbers.

    `basis` are lines below it, for what the numbers rest on; a row after which a rule stands is in `ruled_rows`.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    basis: tuple[str, ...] = ()
    text_columns: int = 1
    strong_rows: frozenset[int] = frozenset()
    ruled_rows: frozenset[int] = frozenset()


def quantity_table(
    title: str,
    columns: Mapping[str, Sequence[Quantity]],
    *,
    digits: int | None = None,
    first: Sequence[str] = ("", "unit"),
) -> Table:
    """A row for each name in the order of its first appearance, a column for each title of `columns`."""
    named = [{quantity.name: quantity for quantity in quantities} for quantities in columns.values()]
    rows = {name: quantity for its in reversed(named) for name, quantity in its.items()}
    order = dict.fromkeys(name for its in named for name in its)
    cells = (
        (rows[name].title, rows[name].unit, *(its[name].text(digits=digits) if name in its else NONE for its in named))
        for name in order
    )
    return Table(title, (*first, *columns), tuple(cells), text_columns=2)


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]], *basis: str, text_columns: int = 1) -> Table:
    """A Table of any iterables."""
    return Table(title, tuple(head), tuple(map(tuple, rows)), basis, text_columns)
