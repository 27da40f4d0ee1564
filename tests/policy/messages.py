"""Texts of the package, and how much of a quoted message they hold: what a page quotes must be what users see."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from pathlib import Path

from tests.policy.sources import PACKAGE, ROOT, own_python

RUN = 3  # words in a row that are compared
HOLE = " {} "  # what a formatted value leaves


def words_of(text: str) -> list[str]:
    """The words of a text; numbers, values and what was left out (...) are holes."""
    return [word if word.isalpha() else "{}" for word in re.findall(r"[A-Za-z_']+(?:\.\w+)*|[^\sA-Za-z]+", text)]


def runs_of(text: str) -> set[tuple[str, ...]]:
    """Each RUN words in a row without a hole between them."""
    words = words_of(text)
    runs = (tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1))
    return {run for run in runs if "{}" not in run}


def literals(tree: ast.AST) -> Iterable[str]:
    """Every text that a file holds, formatted ones with holes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@functools.cache
def runs_in_package() -> frozenset[tuple[str, ...]]:
    """The runs of all texts of the package and the examples."""
    homes = (PACKAGE, ROOT / "examples")
    return frozenset(
        run
        for path, tree in own_python()
        if any(home in path.parents for home in homes)
        for text in literals(tree)
        for run in runs_of(text)
    )


def quoted(page: Path) -> list[str]:
    """The messages in the first column of a page's tables."""
    rows = re.findall(r"^\| (.*?) \| .* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row) if len(message.split()) > RUN]


def is_told(message: str) -> bool:
    """True where most of a message's runs are in the package's texts; one without runs has nothing to compare."""
    runs = runs_of(message)
    return not runs or 2 * len(runs & runs_in_package()) >= len(runs)
