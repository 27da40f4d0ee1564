"""A page as one file of HTML: style and pictures are in it, nothing is fetched.

One column. On a phone pictures have panels in one column, and a table that is wider scrolls in a box of its own, its
first column in sight. Page and pictures follow the reader's choice of light or dark.
"""

from __future__ import annotations

import base64
import html
import re

from ds_moe_ep.records import render
from ds_moe_ep.records.render import html_basis, html_text
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.page import Block, Code, Lines, Page, PageSection, Picture, Prose

PHONE = "(max-width: 44rem)"
STYLE = """
:root { color-scheme: light dark;
  --ground: #fff; --ink: #1d2126; --faint: #5c6670; --line: #dfe3e7; --shade: #f4f6f8; --mark: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #e4e7ea; --faint: #9aa4ae; --line: #343a41; --shade: #1e2329; --mark: #56b4e9 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100% }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.75rem 0 .4rem }
p, ul, ol, pre { margin: .75rem 0 }
ul, ol { padding-left: 1.4rem }
li { margin: .2rem 0 }
a { color: var(--mark) }
.headline { font-size: 1.2rem; line-height: 1.45; padding-left: .9rem; border-left: 3px solid var(--mark) }
nav { margin: 1.75rem 0 0 }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; padding: 0; font-size: .92rem }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
code { overflow-wrap: anywhere }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap }
pre code { display: block; font-size: 1em; padding-left: 2ch; text-indent: -2ch; overflow-wrap: break-word }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--faint); font-weight: 600; border-bottom-color: var(--faint); vertical-align: bottom }
th.number, td.number { text-align: right }
td.number, .range { white-space: nowrap }
td.text { min-width: 7.5rem; overflow-wrap: normal }
td.text:first-child { min-width: 12rem }
tr.strong td { font-weight: 650; background: var(--shade) }
.basis { color: var(--faint); font-size: .84rem; margin: .4rem 0 0 }
figure { margin: 1.5rem 0 }
figure .wide { border: 1px solid var(--line); border-radius: 6px }
figure img { display: block; width: 100%; padding: .6rem }
figcaption { font-size: .92rem; margin-top: .5rem }
@media PHONE {
  main { padding: 1.5rem 1rem 3rem }
  h1 { font-size: 1.5rem }
  .headline { font-size: 1.08rem }
  figure img { padding: .3rem }
  table { font-size: .82rem }
  .wide { background: linear-gradient(to left, var(--ground) 30%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / .6rem 100% no-repeat scroll }
  th, td { padding: .35rem .4rem }
  .wide tr > :first-child { position: sticky; left: 0; background: var(--ground) }
  .wide tr.strong > :first-child { background: var(--shade) }
  td.text:first-child { min-width: 7rem }
  .stacked thead { display: none }
  .stacked, .stacked tbody, .stacked tr, .stacked td { display: block }
  .stacked tr { padding: .5rem 0; border-bottom: 1px solid var(--line) }
  .stacked td { padding: .1rem 0 .1rem 7.8rem; border: 0; overflow-wrap: break-word }
  .stacked td::before { content: attr(data-head); float: left; margin-left: -7.8rem; color: var(--faint) }
  .stacked td:first-child { padding-left: 0; font-weight: 650 }
  .stacked td:first-child::before { content: none }
  .stacked td:empty { display: none }
}
@media print {
  :root { --ground: #fff; --ink: #000; --faint: #444; --line: #ccc; --shade: #f4f4f4; --mark: #000;
    color-scheme: light }
  main { max-width: none; padding: 0 }
  nav { display: none }
  figure, tr, .table { break-inside: avoid }
  h2, h3 { break-after: avoid }
  table { font-size: 8pt }
}
""".replace("PHONE", PHONE)


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
            *(f'<p class="headline">{html_text(sentence)}</p>' for sentence in page.headline),
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
        tag = "ol" if block.is_numbered else "ul"
        return f"<{tag}>" + "".join(f"<li>{html_text(item)}</li>" for item in block.items) + f"</{tag}>"
    if isinstance(block, Code):
        return "<pre>" + "".join(f"<code>{html.escape(line)}</code>" for line in block.lines) + "</pre>"
    if isinstance(block, Table):
        return render.to_html(block)
    return _picture(block)


def _picture(picture: Picture) -> str:
    wide, narrow = map(_data, (picture.drawing.svg, picture.drawing.narrow()))
    image = picture_tag(picture.title, wide, narrow)
    caption = f"<figcaption>{html_text(picture.caption)}{html_basis(picture.basis)}</figcaption>"
    return f'<figure id="figure-{picture.key}"><div class="wide">{image}</div>{caption}</figure>'


def picture_tag(title: str, wide: str, narrow: str) -> str:
    """A picture by two sources, of which a phone takes the narrow one."""
    image = f'<img alt="{html.escape(title)}" src="{wide}">'
    return f'<picture><source media="{PHONE}" srcset="{narrow}">{image}</picture>'


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
