"""Docstrings begin with a noun or a verb, and what is counted is counted per thing, not "a" thing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.policy.sources import PACKAGE, ROOT, own_python

NOT_FIRST = {"What", "Whether"}  # a reader looks for the thing itself
# Words that are no verbs where another noun follows: "names a rank" and "runs a layer" stay.
COUNTED = (
    "rows tokens bytes bits numbers parameters gradients experts layers micro-batches sequences exchanges messages "
    "peers chunks pieces cores threads GPUs ranks nodes links us ms nats flops FLOP GFLOP kB MB GB KiB MiB GiB once "
    "twice one parameter gradient expert file process thread link uplink lane rank product all-reduce all-to-all sync"
).split()
UNITS = (
    "rank layer token expert node peer step pass row GPU device host group stage micro-batch lane round exchange "
    "message link process thread choice piece cut op call direction machine kernel launch head sequence batch copy run "
    "second microsecond module parameter"
).split()
PER = re.compile(rf"(?<![\w-])(?:{'|'.join(COUNTED)}) an? (?:{'|'.join(UNITS)})(?![\w-])")
LINE_END = re.compile(r"\s*\n[ \t]*(?:# ?|[-*] )?")
PAGES = ("README.md", "CHANGELOG.md", "examples/README.md", "ds_moe_ep/ARCHITECTURE.md")


def wrong_beginnings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(":,") in NOT_FIRST:
                yield getattr(node, "name", "the module")


def counted_a_thing(text: str) -> list[str]:
    """Each "rows an expert" in a text, whose lines may end anywhere."""
    return PER.findall(LINE_END.sub(" ", text))


def own_pages() -> list[Path]:
    return [ROOT / name for name in PAGES] + sorted((PACKAGE / "docs").rglob("*.md"))


def test_no_docstring_begins_with_what_or_whether() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in own_python()
        if PACKAGE in path.parents
        for name in wrong_beginnings(tree)
    ]
    assert wrong == []


def test_the_rule_sees_each_kind_of_docstring() -> None:
    source = '"""What it is."""\nclass A:\n    """Whether: so."""\n    def f(self):\n        """Whatever."""\n'
    assert sorted(wrong_beginnings(ast.parse(source))) == ["A", "the module"]


def test_what_is_counted_is_counted_per_thing() -> None:
    paths = [path for path, _ in own_python() if path != Path(__file__)] + own_pages()
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in paths
        if (found := counted_a_thing(path.read_text(encoding="utf-8")))
    }
    assert wrong == {"ds_moe_ep/records/quantity.py": ["us a token", "tokens a second"]}, (
        "units of other releases' Records"
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,024 rows an expert, one\n    # a device and 24 GB a rank.", 3),
        ("rows per expert; it moves a rank, sends rows to a rank, and asks one of a node", 0),
    ],
)
def test_the_rule_sees_a_for_per_across_lines(text: str, number: int) -> None:
    assert len(counted_a_thing(text)) == number
