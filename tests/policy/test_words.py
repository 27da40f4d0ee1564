"""Docstrings begin with a noun or a verb, in the rooms whose pages were read for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.policy.sources import PACKAGE, ROOT, own_python

ROOMS = ("check", "comm", "doctor", "engine", "health", "kernels", "moe", "report", "schedule")
NOT_FIRST = {"What", "Whether"}  # a reader looks for the thing itself


def wrong_beginnings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(":,") in NOT_FIRST:
                yield getattr(node, "name", "the module")


def test_no_docstring_begins_with_what_or_whether() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in own_python()
        if PACKAGE in path.parents and path.relative_to(PACKAGE).parts[0] in ROOMS
        for name in wrong_beginnings(tree)
    ]
    assert wrong == []


def test_the_rule_sees_each_kind_of_docstring() -> None:
    source = '"""What it is."""\nclass A:\n    """Whether: so."""\n    def f(self):\n        """Whatever."""\n'
    assert sorted(wrong_beginnings(ast.parse(source))) == ["A", "the module"]
