"""A page as Markdown, which links its pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.report.page import Block, Code, Lines, Page, Picture, Prose, Table


def to_markdown(page: Page) -> str:
    """The page as Markdown; pictures are links to figures/ beside it."""
    parts = [f"# {page.title}"]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Prose):
        return block.text
    if isinstance(block, Lines):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(("```bash", *block.lines, "```"))
    if isinstance(block, Table):
        return _joined(f"**{block.title}**" if block.title else "", _table(block), _basis(block.basis))
    return _picture(block)


def _picture(picture: Picture) -> str:
    image = f"![{picture.title}](figures/{picture.key}.png)"
    return _joined(image, f"{picture.caption} ([SVG](figures/{picture.key}.svg))", _basis(picture.basis))


def _table(table: Table) -> str:
    rows = [
        [f"**{cell}**" for cell in row] if index in table.strong_rows else row for index, row in enumerate(table.rows)
    ]
    numbers = len(table.head) - table.text_columns
    rule = [*["---"] * table.text_columns, *["---:"] * numbers]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (table.head, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _basis(lines: Sequence[str]) -> str:
    return "  \n".join(f"*{line}*" for line in lines)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
