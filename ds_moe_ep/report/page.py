"""Parts of a page. Text is plain; `code` in it stands between backticks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.known_names import place_of

NOTE = "Note: "  # before a Record's note, until `notes_once` numbers it
EMULATED, SIMULATED, REAL = "Emulated.", "Simulated.", "Not emulated."


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Lines:
    """A list of short lines."""

    items: tuple[str, ...]
    is_numbered: bool = False


@dataclass(frozen=True)
class Code:
    """Commands to type, one per line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """One picture in both formats, and as SVG for a phone, drawn when it is first asked for."""

    svg: bytes
    png: bytes
    narrow: Callable[[], bytes]


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
    """The whole report; its headline is a few sentences that say what it comes to."""

    title: str
    headline: tuple[str, ...]
    sections: tuple[PageSection, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def basis_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Lines beside a figure or table that rests on these Records: emulated or not, and their notes."""
    records = list(records)
    notes = dict.fromkeys(note for record in records for note in record.notes.split("; ") if note)
    return (emulation_of(records), *(NOTE + note for note in notes))


def emulation_of(records: Iterable[Record]) -> str:
    """Emulated or not: a device or a link was simulated or shaped under these Records; where under some, which.

    Simulated where nothing ran at all.
    """
    places: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for record in records:
        places[record.emulated][place_of(record.name)] = None
    emulated, real = ([*places[is_emulated]] for is_emulated in (True, False))
    if emulated and real:
        emulated = [f"{place} (in part)" if place in real else place for place in emulated]
        real = [place for place in real if place not in places[True]]
        if not real:
            return f"{EMULATED[:-1]}: {'; '.join(emulated)}."
        return f"{EMULATED[:-1]}: {'; '.join(emulated)}. {REAL[:-1]}: {'; '.join(real)}."
    if emulated:
        return SIMULATED if all(place.startswith("simulated ") for place in emulated) else EMULATED
    if real:
        return REAL
    return "No Record says whether a device or a link was emulated."


def notes_once(sections: Sequence[PageSection]) -> tuple[PageSection, ...]:
    """The sections with numbers for their notes, and a section behind them that tells each note once."""
    numbers: dict[str, int] = {}
    numbered = [
        dataclasses.replace(section, blocks=tuple(_with_numbers(block, numbers) for block in section.blocks))
        for section in sections
    ]
    if numbers:
        numbered.append(PageSection("Notes", (Lines(tuple(numbers), is_numbered=True),)))
    return tuple(numbered)


def _with_numbers(block: Block, numbers: dict[str, int]) -> Block:
    """The block with one line instead of its notes: their numbers, which `numbers` gets for those not yet in it."""
    if not isinstance(block, Table | Picture):
        return block
    notes = [line.removeprefix(NOTE) for line in block.basis if line.startswith(NOTE)]
    own = sorted(numbers.setdefault(note, len(numbers) + 1) for note in notes)
    words = f"Note{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}." if own else ""
    others = [line for line in block.basis if not line.startswith(NOTE)]
    basis = " ".join(filter(None, [*others, words]))
    return dataclasses.replace(block, basis=(basis,) if basis else ())
