"""The public names: each resolves, has a docstring, and is known to type checkers."""

from __future__ import annotations

import ast
import inspect

import pytest

import ds_moe_ep
from tests.policy.sources import PACKAGE, own_python

CONSTANTS = {"MEDIUM", "MODELS", "SMALL", "SPECIFICATION", "__version__"}


@pytest.mark.parametrize("name", ds_moe_ep.__all__)
def test_every_public_name_resolves_and_has_a_docstring(name: str) -> None:
    value = getattr(ds_moe_ep, name)
    if name not in CONSTANTS:
        assert (inspect.getdoc(value) or "").strip()


def test_lazy_names_and_the_names_for_type_checkers_are_all_public() -> None:
    lazy = {name for names in ds_moe_ep._HOMES.values() for name in names}
    assert lazy | {"__version__"} == set(ds_moe_ep.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checked = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for inner in node.body
        if isinstance(inner, ast.ImportFrom)
        for alias in inner.names
    }
    assert checked == lazy


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match=r"ds_moe_ep.*no attribute 'Moe'"):
        ds_moe_ep.Moe  # noqa: B018


def test_public_functions_and_classes_of_the_package_have_docstrings() -> None:
    bare = []
    for path, tree in own_python():
        if PACKAGE not in path.parents:
            continue
        if tree.body and not ast.get_docstring(tree):
            bare.append(f"{path.name}: the file")
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                bare.append(f"{path.name}: {node.name}")
    assert bare == []
