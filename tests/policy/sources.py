"""The repository's own files, for the tests that read them as text or syntax trees."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ds_moe_ep"
FOLDERS = ("ds_moe_ep", "tests", "examples", "ds_configs", ".ci")
TEXT = {"", ".py", ".sh", ".md", ".json", ".txt", ".toml", ".ini", ".cfg"}


def own_files() -> Iterator[Path]:
    """Every text file of the project: its folders, and the files at the top level."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found += [path for path in ROOT.iterdir() if path.name != ".git"]  # in a worktree of git it is a file
    for path in sorted(found):
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
            yield path


@functools.cache
def own_python() -> tuple[tuple[Path, ast.Module], ...]:
    """Every Python file of the project with its syntax tree, read once: a dozen tests look at all of them."""
    paths = [path for path in own_files() if path.suffix == ".py"]
    gc.disable()  # of 650,000 nodes, which all stay, none is garbage
    try:
        return tuple((path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))) for path in paths)
    finally:
        gc.freeze()
        gc.enable()


def imports_of(path: Path, tree: ast.Module) -> Iterator[str]:
    """Dotted names of the modules that `tree` imports anywhere, relative ones made absolute."""
    home = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(home[: len(home) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
