"""Parts of a page. Text is plain; `code` in it stands between backticks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.known_names import place_of

MAX_NOTES = 3
EMULATED = "Emulated: a device or a link was simulated or shaped."
REAL = "Not emulated: no device and no link was simulated or shaped."


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Lines:
    """A list of short lines."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Commands to type, one per line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One picture in both formats."""

    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Picture:
    """A drawing with what a reader must know beside it; `key` is its file's name."""

    key: str
    title: str
    caption: str
    drawing: Drawing
    basis: tuple[str, ...] = ()


Block = Prose | Lines | Code | Table | Picture


@dataclass(frozen=True)
class PageSection:
    """Blocks under a title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    sections: tuple[PageSection, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def basis_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Lines beside a figure or table that rests on these Records: emulated or not, and their notes."""
    records = list(records)
    notes = list(dict.fromkeys(record.notes for record in records if record.notes))
    lines = [*emulation_of(records), *(f"Note: {note}" for note in notes[:MAX_NOTES])]
    if len(notes) > MAX_NOTES:
        lines.append(f"And {len(notes) - MAX_NOTES} more notes in the Records.")
    return tuple(lines)


def emulation_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Emulated or not: lines on devices and links that were simulated or shaped, and where only some were, on which."""
    places: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for record in records:
        places[record.emulated][place_of(record.name)] = None
    emulated, real = places[True], places[False]
    if emulated and real:
        return f"{EMULATED[:-1]} ({'; '.join(emulated)}).", f"Not emulated: {'; '.join(real)}."
    if emulated or real:
        return (EMULATED if emulated else REAL,)
    return ("No Record says whether a device or a link was emulated.",)
