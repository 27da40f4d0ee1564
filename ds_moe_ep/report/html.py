"""A page as one file of HTML: style and pictures are in it, nothing is fetched."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from ds_moe_ep.report.html_style import STYLE
from ds_moe_ep.report.page import Block, Code, Lines, Page, PageSection, Picture, Prose, Table


def to_html(page: Page) -> str:
    """The whole page, self-contained."""
    title = html.escape(page.title)
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{html.escape(s.title)}</a></li>' for s in page.sections)
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style></head>",
            f"<body><main><h1>{title}</h1>",
            f"<nav><ul>{contents}</ul></nav>",
            *map(_section, page.sections),
            "</main></body></html>",
            "",
        )
    )


def _section(section: PageSection) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f'<section id="{_anchor(section.title)}"><h2>{html.escape(section.title)}</h2>\n{blocks}</section>'


def _block(block: Block) -> str:
    if isinstance(block, Prose):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Lines):
        return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{html.escape(chr(10).join(block.lines))}</code></pre>"
    if isinstance(block, Table):
        return _table(block)
    return _picture(block)


def _table(table: Table) -> str:
    rows = [_row(table.head, "th", table.text_columns)]
    for index, row in enumerate(table.rows):
        rows.append(_row(row, "td", table.text_columns, strong=index in table.strong_rows))
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    body = f"<thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody>"
    return f'<div class="table">{title}<div class="wide"><table>{body}</table></div>{_basis(table.basis)}</div>'


def _row(cells: Sequence[str], tag: str, text_columns: int, *, strong: bool = False) -> str:
    kinds = ["text" if index < text_columns else "number" for index in range(len(cells))]
    inner = "".join(f'<{tag} class="{kind}">{_text(cell)}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))
    return f'<tr class="strong">{inner}</tr>' if strong else f"<tr>{inner}</tr>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.drawing.svg).decode()
    image = f'<img alt="{html.escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
    caption = f"<figcaption>{_text(picture.caption)}{_basis(picture.basis)}</figcaption>"
    return f'<figure id="figure-{picture.key}"><div class="wide">{image}</div>{caption}</figure>'


def _basis(lines: Sequence[str]) -> str:
    return '<p class="basis">' + "<br>".join(map(_text, lines)) + "</p>" if lines else ""


def _text(text: str) -> str:
    """Text with its `code` marked and its line ends kept."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)).replace("\n", "<br>")


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
