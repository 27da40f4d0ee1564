"""Nobody outside writes a dispatcher's attributes: its methods change it, so that its schedules follow."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.policy.sources import PACKAGE, ROOT, own_python


def writes_of_dispatchers(tree: ast.AST) -> Iterator[int]:
    """Lines that assign to, or delete, an attribute of what is called a dispatcher."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
            continue
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if "dispatcher" in owner:
            yield node.lineno


def private_state(tree: ast.AST) -> set[str]:
    """The attributes that the class Dispatcher sets on itself."""
    (cls,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Dispatcher")
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }


def test_nobody_outside_writes_a_dispatchers_attributes() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in own_python()
        if PACKAGE in path.parents
        for line in writes_of_dispatchers(tree)
    ]
    assert wrong == []


def test_the_state_of_a_dispatcher_is_private_so_that_no_other_name_can_write_it() -> None:
    state = private_state(ast.parse((PACKAGE / "moe" / "dispatcher.py").read_text(encoding="utf-8")))
    assert state and all(name.startswith("_") for name in state)


def test_the_rule_sees_each_way_of_writing() -> None:
    source = (
        "layer.dispatcher.name = 1\ndispatcher.clock, x = 1, 2\ndel a.b.dispatcher.choice\nprint(dispatcher.name)\n"
    )
    assert sorted(writes_of_dispatchers(ast.parse(source))) == [1, 2, 3]
