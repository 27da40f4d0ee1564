"""Links, anchors and commands of a Markdown page, as a reader on a code host finds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")  # a picture has a source per ground
ELSEWHERE = ("http://", "https://", "mailto:")
MADE = re.compile(r"<!-- made by: .*?<!-- end -->", re.DOTALL)
PROGRAM = re.compile(r"\s*(?:\$ |(?:sudo |env |[A-Z_]+=\S+ )*(?:python|deepspeed|torchrun|mpirun|bash) )")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of commands, and the reason why no test runs it."""

    page: Path
    text: str
    not_run: str


def without_fences(text: str) -> str:
    """The page without blocks of code."""
    return FENCE.sub("", text)


def prose(text: str) -> str:
    """The page without code."""
    return re.sub(r"`[^`\n]+`", "", without_fences(text))


def links(path: Path) -> list[str]:
    """Targets of the page's links that lead into the repository."""
    found = (link or source for link, source in LINK.findall(prose(path.read_text(encoding="utf-8"))))
    return [to for to in found if not to.startswith(ELSEWHERE)]


def anchors(path: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub and GitLab make them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", without_fences(path.read_text(encoding="utf-8")), re.MULTILINE):
        name, number = anchor_of(title), 0
        while (anchor := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found


def anchor_of(title: str) -> str:
    """The anchor of a heading, where no other one on its page has its words."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")


def is_broken(path: Path, link: str) -> bool:
    """True where a link of the page leads nowhere."""
    to, _, anchor = link.partition("#")
    target = (path.parent / to).resolve() if to else path
    return not target.exists() or bool(anchor and anchor not in anchors(target))


def commands(path: Path) -> Iterator[Block]:
    """The page's fenced blocks of commands."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == "bash":
            above = NOT_RUN.search(text[: match.start()].rstrip())
            yield Block(path, match[2], above[1] if above else "")


def hidden_commands(text: str) -> list[str]:
    """Commands in fences that are none of commands, where no test would run them; generated parts have theirs."""
    by_hand = MADE.sub("", text)
    lines = [line for match in FENCE.finditer(by_hand) if match[1] != "bash" for line in match[2].splitlines()]
    return [line for line in lines if PROGRAM.match(line)]
