"""A page as Markdown, which links its pictures."""

from __future__ import annotations

from ds_moe_ep.records import render
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.html import picture_tag
from ds_moe_ep.report.page import Block, Code, Lines, Page, Picture, Prose


def to_markdown(page: Page) -> str:
    """The page as Markdown; pictures are files in figures/ beside it, a narrow one for a phone."""
    parts = [f"# {page.title}", *page.headline]
    for section in page.sections:
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Prose):
        return block.text
    if isinstance(block, Lines):
        marks = (f"{place}." if block.is_numbered else "-" for place in range(1, len(block.items) + 1))
        return "\n".join(f"{mark} {item}" for mark, item in zip(marks, block.items, strict=True))
    if isinstance(block, Code):
        return "\n".join(("```bash", *block.lines, "```"))
    if isinstance(block, Table):
        return render.to_markdown(block)
    return _picture(block)


def _picture(picture: Picture) -> str:
    image = picture_tag(picture.title, f"figures/{picture.key}.svg", f"figures/{picture.key}_narrow.svg")
    caption = f"{picture.caption} ([PNG](figures/{picture.key}.png))"
    return "\n\n".join(filter(None, [image, caption, render.markdown_basis(picture.basis)]))
