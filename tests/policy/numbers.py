"""Where a page's numbers come from: measured ones name a command, a test or a table of the results, tables their run.

A block is a paragraph, a list or a table with the paragraph before it. A number that was measured has a unit of time,
of rate or of share, or quartiles behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.policy.links import FENCE, MADE, anchor_of, without_fences

MEASURED = re.compile(
    r"\d[\d,.]*(?: \([\d.,–\- to]+\))? ?(?:(?:ms|us|s|times|seconds|minutes)\b|%|[MG]B/s|tokens/s|tokens per second)"
    r"|\d[\d,.]* \(\d[\d,.]*(?:-|–| to )\d[\d,.]*\)"
)
SOURCE = re.compile(
    r"results\.md|\(#[\w-]+\)|`[^`]*(?:python -m\s|bash )[^`]*`|test_\w+\.py|[Ss]imulated|[Dd]erived|[Bb]y arithmetic"
    r"|`(?:plan|check-config|audit)`|[Tt]ests? holds?\b|by a test\b|\(theirs\)"
)
COMMAND = re.compile(r"`[^`]*(?:python -m\s|bash )[^`]*`|```(?:bash|console)\n|made by:")
COMMIT = re.compile(r"(?<![\d.,])\b(?=[a-f]*\d)[0-9a-f]{7}\b")
NOT_MEASURED = re.compile(r"[Ss]imulated|made by:|as of this page|its own output|foretold")


@dataclass(frozen=True)
class Part:
    """The text below a heading, up to the next one, and the heading of the second level that it stands under."""

    title: str
    level: int
    above: str
    text: str


def parts(page: str) -> Iterator[Part]:
    """The parts of a page; a `#` in a block of code is no heading."""
    held = FENCE.sub(lambda block: block[0].replace("\n#", "\n\0"), page)
    above = ""
    for text in re.split(r"^(?=#+ )", held, flags=re.MULTILINE):
        head = re.match(r"(#+) (.*)", text)
        level, title = (len(head[1]), head[2]) if head else (0, "")
        above = title if level <= 2 else above
        yield Part(title, level, above, text.replace("\n\0", "\n#"))


def has_table(text: str) -> bool:
    """True where a table stands outside of blocks of code."""
    return re.search(r"^\| ?:?-{3}", without_fences(text), re.MULTILINE) is not None


def index_of(page: str) -> dict[str, tuple[str, str, str]]:
    """(command, commit, Records) of the first table's rows, by the anchor that a row links to."""
    rows = re.findall(r"^\| \[[^\]]*\]\(#([\w-]+)\) \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    return {anchor: (command.strip(), commit.strip(), records.strip()) for anchor, command, commit, records in rows}


def tables_without_source(page: str) -> list[str]:
    """The headings of results whose tables do not say by which command and at which commit, or of what Records.

    A heading of the second level has its commit and its Records in the index, a lower one names its commit itself.
    """
    index, found = index_of(page), []
    for part in parts(page):
        if part.level < 2 or not has_table(part.text):
            continue
        command, commit, records = index.get(anchor_of(part.above), ("", "", ""))
        known = commit if part.level == 2 else part.text
        is_told = COMMAND.search(part.text) and (COMMIT.search(known) or NOT_MEASURED.search(known))
        if not (is_told and "`" in command and records):
            found.append(part.title)
    return found


def measured_outside_of_the_index(page: str) -> list[str]:
    """The headings of results that hold a measured number, with a table or without, and whose section has no run."""
    index = index_of(page)
    measured = [part for part in parts(page) if part.level >= 2 and MEASURED.search(without_fences(part.text))]
    return [part.title for part in measured if "`" not in index.get(anchor_of(part.above), ("",))[0]]


def blocks(text: str) -> Iterator[str]:
    """The blocks of a part: its code left out, each table joined to what stands before it."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", FENCE.sub("", MADE.sub("", text))):
        if found and block.startswith("|"):
            found[-1] += f"\n{block}"
        else:
            found.append(block)
    return iter(found)


def numbers_without_source(page: str, settings: Mapping[str, str]) -> list[str]:
    """The first lines of the blocks that hold a measured number and say nowhere, nor their part's first block, of what.

    `settings` are beginnings of lines in which numbers are none that were measured.
    """
    found = []
    for part in parts(page):
        all_blocks = [*blocks(part.text)]
        for block in all_blocks:
            measured = [line for line in block.splitlines() if MEASURED.search(line)]
            if not measured or SOURCE.search(block) or SOURCE.search(all_blocks[0]):
                continue
            found += [line for line in measured if not any(line.startswith(known) for known in settings)]
    return found
