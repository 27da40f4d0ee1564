"""A Table in three writings: for a terminal, as Markdown, as HTML. `code` in a cell stands between backticks."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from rich import box
from rich.console import Console, Group, OverflowMethod
from rich.table import Table as Grid
from rich.text import Text

from ds_moe_ep.records.table import Table


def print_tables(tables: Iterable[Table], console: Console) -> None:
    """Prints tables, each behind an empty line."""
    for table in tables:
        console.print("", to_terminal(table), sep="\n")


def print_lines(lines: Iterable[str] | Mapping[str, str], console: Console, style: str = "") -> None:
    """Prints lines as they are, those of a mapping behind their names, without markup.

    What goes on for longer than the console's width is continued below the texts, not below the names.
    """
    if isinstance(lines, Mapping):
        width = max(map(len, lines), default=0)
        wrap = partial(textwrap.wrap, width=max(console.width, 2 * width), break_on_hyphens=False)
        named = [f"{name:<{width}}  {text}" for name, text in lines.items()]
        lines = [part for line in named for part in wrap(line, subsequent_indent=" " * (width + 2))]
    for line in lines:
        console.print(Text(line, style=style))


def to_terminal(table: Table, styles: Mapping[str, str] | None = None) -> Group:
    """The table for rich, its basis below it; a table whose head is empty has no rule under it.

    `styles` are those of whole cells, by their text.
    """
    has_head = any(table.head)
    grid = Grid(
        title=table.title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if has_head else None,
        show_header=has_head,
        pad_edge=False,
    )
    overflow: OverflowMethod = "fold" if table.text_columns >= len(table.head) else "ellipsis"
    for index, column in enumerate(table.head):
        grid.add_column(
            Text(column),
            justify="left" if index < table.text_columns else "right",
            overflow=overflow,
        )
    for index, row in enumerate(table.rows):
        style = "bold" if index in table.strong_rows else None
        cells = (Text(cell, style=(styles or {}).get(cell, "")) for cell in row)
        grid.add_row(*cells, style=style, end_section=index in table.ruled_rows)
    return Group(grid, *(Text(line, style="dim") for line in table.basis))


def to_markdown(table: Table) -> str:
    """The table as Markdown: title, rows and basis; a bar inside a cell is escaped."""
    rows = [
        [f"**{cell}**" for cell in row] if index in table.strong_rows else row for index, row in enumerate(table.rows)
    ]
    rule = [*["---"] * table.text_columns, *["---:"] * (len(table.head) - table.text_columns)]
    lines = "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in (table.head, rule, *rows))
    title = f"**{table.title}**" if table.title else ""
    return "\n\n".join(filter(None, [title, lines, markdown_basis(table.basis)]))


def markdown_basis(lines: Iterable[str]) -> str:
    """The lines below a table or a picture."""
    return "  \n".join(f"*{line}*" for line in lines)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def to_html(table: Table) -> str:
    """The table as a block of HTML, whose wide part may scroll.

    A table of text alone has each cell's head in the cell too, so that a narrow page can stack the cells.
    """
    is_text_alone = table.text_columns >= len(table.head)
    kinds = ["text" if index < table.text_columns else "number" for index in range(len(table.head))]
    heads = [f' data-head="{html.escape(head)}"' if is_text_alone else "" for head in table.head]
    rows = [_html_row("th", table.head, kinds, [""] * len(kinds))]
    for index, row in enumerate(table.rows):
        rows.append(_html_row("td", row, kinds, heads, strong=index in table.strong_rows))
    title = f"<h3>{html_text(table.title)}</h3>" if table.title else ""
    start = '<table class="stacked">' if is_text_alone else "<table>"
    body = f"{start}<thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody></table>"
    return f'<div class="table">{title}<div class="wide">{body}</div>{html_basis(table.basis)}</div>'


def _html_row(
    tag: str, cells: Sequence[str], kinds: Sequence[str], heads: Sequence[str], *, strong: bool = False
) -> str:
    inner = "".join(
        f'<{tag} class="{kind}"{head}>{html_text(cell)}</{tag}>'
        for cell, kind, head in zip(cells, kinds, heads, strict=True)
    )
    return f'<tr class="strong">{inner}</tr>' if strong else f"<tr>{inner}</tr>"


def html_basis(lines: Sequence[str]) -> str:
    """The lines below a table or a picture."""
    return '<p class="basis">' + "<br>".join(map(html_text, lines)) + "</p>" if lines else ""


def html_text(text: str) -> str:
    """Text with its `code` marked, its line ends kept, and the two ends of a range on one line."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)).replace("\n", "<br>")
    return re.sub(r"\d[\d,.]*\u2013\d[\d,.]*", r'<span class="range">\g<0></span>', marked)
