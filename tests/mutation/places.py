"""Where mutants are worth their time, and the operator that the library does not have: a call left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cosmic_ray.operators.operator import Operator
from parso.python.tree import Keyword

TRIVIAL = ("Eq_Is", "NotEq_IsNot", "Is_Eq", "IsNot_NotEq", "VariableReplacer", "VariableInserter", "RemoveDecorator")
NEVER = ("fstring", "raise_stmt", "assert_stmt", "tfpdef", "decorator")
TOLD = ("log", "logger", "logging", "warnings", "print")


class RemoveCall(Operator):  # type: ignore[misc]
    """A statement that is one call becomes `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and node.children[0].type in ("atom_expr", "power"):
            call = node.children[0]
            if call.children[-1].type == "trailer" and call.children[-1].children[0].value == "(":
                yield call.start_pos, call.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.children[0]
        node.children[0] = Keyword("pass", first.start_pos, first.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def is_worth_it(operator: str) -> bool:
    """True where an operator's mutants differ from the original other than by chance."""
    return not operator.endswith(TRIVIAL)


def has_mutants(node: Any) -> bool:
    """True for a place that is code that runs, and no annotation, no assertion, no decorator, no text of an error."""
    below = None
    while node is not None:
        if node.type in NEVER or _is_told(node):
            return False
        if node.type == "annassign" and below is node.children[1]:
            return False
        if node.type == "funcdef" and below is node.annotation and below is not None:
            return False
        if node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING":
            return False
        below, node = node, node.parent
    return True


def _is_told(node: Any) -> bool:
    """A call that makes an error, or prints."""
    if node.type == "simple_stmt":
        node = node.children[0]
    if node.type not in ("atom_expr", "power"):
        return False
    name = node.children[0].get_code().strip()
    return name.endswith("Error") or name in TOLD
