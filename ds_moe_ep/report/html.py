"""A page as one file of HTML: style and pictures are in it, nothing is fetched."""

from __future__ import annotations

import base64
import html
import re

from ds_moe_ep.records import render
from ds_moe_ep.records.render import html_basis, html_text
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.html_style import STYLE
from ds_moe_ep.report.page import Block, Code, Lines, Page, PageSection, Picture, Prose


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
        return f"<p>{html_text(block.text)}</p>"
    if isinstance(block, Lines):
        return "<ul>" + "".join(f"<li>{html_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{html.escape(chr(10).join(block.lines))}</code></pre>"
    if isinstance(block, Table):
        return render.to_html(block)
    return _picture(block)


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.drawing.svg).decode()
    image = f'<img alt="{html.escape(picture.title)}" src="data:image/svg+xml;base64,{data}">'
    caption = f"<figcaption>{html_text(picture.caption)}{html_basis(picture.basis)}</figcaption>"
    return f'<figure id="figure-{picture.key}"><div class="wide">{image}</div>{caption}</figure>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
