"""The figures of the house, counted in its sources: `python -m tests.policy.figures --time suite demo`.

What is counted is what grew before the package had rooms: loose files, long folders, names with two meanings, functions
that write numbers in a way of their own, and functions put in the place of an engine's methods.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeGuard

from tests.policy.sources import ROOT, own_python
from tests.ranks import COUNTED_IN

ONE_FORMATTER = Path("records", "quantity.py")
NUMBER_FORMAT = re.compile(r"[,.\d]*[defgn%]|,")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The counts of one checkout."""

    lines: int
    files: int
    loose_files: int  # beside the package's folders
    most_files: int  # modules of one folder
    double_names: int  # public class names that several modules define
    formatters: int  # functions that make text of a number, outside the one place for it
    roundings: int  # places in a text that say how far a number is rounded, outside of it
    wrappers: int  # places that put a function where a method of an engine was
    wrapped_methods: int
    test_lines: int
    readme_lines: int


FLAT = "98a618d"  # a revision of the package before its rooms, and what this script counts there
BEFORE: Mapping[str, int] = {
    "lines": 27866,
    "files": 223,
    "loose_files": 29,
    "most_files": 43,
    "double_names": 17,
    "formatters": 18,
    "roundings": 139,
    "wrappers": 10,
    "wrapped_methods": 6,
    "test_lines": 21384,
    "readme_lines": 838,
}
TITLES: Mapping[str, str] = {
    "lines": "lines of the package",
    "files": "modules of the package",
    "loose_files": "modules beside its folders",
    "most_files": "modules of the fullest folder",
    "double_names": "public class names with two meanings",
    "formatters": "functions that write numbers, beside the one formatter",
    "roundings": "places in a text that round a number, beside the one formatter",
    "wrappers": "places that replace a method of an engine",
    "wrapped_methods": "methods that they replace",
    "test_lines": "lines of the tests",
    "readme_lines": "lines of the README",
}

COMMANDS: Mapping[str, list[str]] = {
    "suite": ["bash", "tests/run.sh"],
    "demo": [sys.executable, "-m", "ds_moe_ep", "demo"],
}
BEFORE_RUN: Mapping[str, str] = {  # in a clean clone on a quiet machine of 2 cores; there was no demo
    "seconds of the suite": "1,068",
    "worlds of ranks in the suite": "about 280",
    "seconds of the demo": "none",
}


def count(root: Path = ROOT) -> Figures:
    """The figures of the checkout at `root`."""
    package, trees = root / "ds_moe_ep", trees_of(root)
    wraps = list(replaced_methods(trees))
    return Figures(
        lines=num_lines(modules(package)),
        files=len(trees),
        loose_files=sum(len(path.parts) == 1 for path in trees),
        most_files=max(Counter(path.parent for path in trees).values()),
        double_names=len(double_names(trees)),
        formatters=len(list(formatters(trees))),
        roundings=sum(len(list(roundings(tree))) for path, tree in trees.items() if path != ONE_FORMATTER),
        wrappers=len(wraps),
        wrapped_methods=len(set(wraps)),
        test_lines=num_lines(modules(root / "tests")),
        readme_lines=num_lines([root / "README.md"]),
    )


def trees_of(root: Path) -> dict[Path, ast.Module]:
    """Syntax trees of the modules of the package, by their paths there; this checkout is parsed once for all tests."""
    package = root / "ds_moe_ep"
    if root == ROOT:
        return {path.relative_to(package): tree for path, tree in own_python() if package in path.parents}
    return {path.relative_to(package): ast.parse(path.read_text(encoding="utf-8")) for path in modules(package)}


def modules(folder: Path) -> list[Path]:
    """The Python files under a folder."""
    return sorted(folder.rglob("*.py"))


def num_lines(paths: list[Path]) -> int:
    """The lines of all files together."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def double_names(trees: Mapping[Path, ast.Module]) -> dict[str, list[Path]]:
    """Public class names that more than one module defines, with the modules."""
    homes: dict[str, list[Path]] = defaultdict(list)
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path)
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def formatters(trees: Mapping[Path, ast.Module]) -> Iterator[str]:
    """Functions that get a number and give a text, and write a number with a format of their own in between."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if path == ONE_FORMATTER or not isinstance(node, FUNCTIONS):
                continue
            numbers = {"int", "float"} & {word for given in node.args.args for word in words_of(given.annotation)}
            if numbers and words_of(node.returns) == {"str"} and writes_number(node):
                yield f"{path}: {node.name}"


def roundings(tree: ast.AST) -> Iterator[int]:
    """The line of each formatted text that says how many digits a number keeps: `.1f`, `.3g`, `.0%`.

    `:,` and `:g` keep a number as it was given, and `:05d` pads an index in a name.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
            spec = "".join(str(part.value) for part in node.format_spec.values if isinstance(part, ast.Constant))
            if "." in spec:
                yield node.lineno


def words_of(annotation: ast.expr | None) -> set[str]:
    """The names in an annotation."""
    return set() if annotation is None else set(re.findall(r"\w+", ast.unparse(annotation)))


def writes_number(function: ast.AST) -> bool:
    """True where a formatted text in the function has a format for numbers."""
    for node in ast.walk(function):
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
            if any(isinstance(part, ast.FormattedValue) for part in node.format_spec.values):
                return True
            spec = "".join(str(part.value) for part in node.format_spec.values if isinstance(part, ast.Constant))
            if NUMBER_FORMAT.search(spec):
                return True
    return False


def replaced_methods(trees: Mapping[Path, ast.Module]) -> Iterator[str]:
    """The name of a method for each place in engine/ that assigns a function to it on an engine."""
    for path, tree in trees.items():
        if path.parts[0] != "engine":
            continue
        functions = {node.name for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target, value in pairs(node):
                    if is_of_engine(target) and isinstance(value, ast.Name) and value.id in functions:
                        yield ast.unparse(target).rpartition(".")[2]
            elif is_call_of_setattr(node) and ast.unparse(node.args[0]).endswith("engine"):
                yield ast.unparse(node.args[1])


def is_call_of_setattr(node: ast.AST) -> TypeGuard[ast.Call]:
    """True where an attribute is set to what a call returns."""
    is_setattr = isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"
    return is_setattr and isinstance(node.args[2], ast.Call)


def pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target of an assignment with its value."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def is_of_engine(target: ast.expr) -> bool:
    """True for an attribute of a value that is called engine."""
    return isinstance(target, ast.Attribute) and ast.unparse(target.value).endswith("engine")


def table(now: Figures, runs: Mapping[str, float]) -> str:
    """The figures as a Markdown table, beside those of the flat package; `runs` by the titles of `BEFORE_RUN`."""
    rows = [f"| {TITLES[name]} | {BEFORE[name]:,} | {value:,} |" for name, value in vars(now).items()]
    rows += [f"| {title} | {BEFORE_RUN[title]} | {value:,.0f} |" for title, value in runs.items()]
    return "\n".join([f"| counted in the sources | at {FLAT}, without rooms | now |", "| --- | ---: | ---: |", *rows])


def timed(name: str, root: Path = ROOT) -> dict[str, float]:
    """Seconds that a command takes in the checkout at `root`, and the worlds of ranks that its tests start.

    Raises CalledProcessError where it fails.
    """
    with tempfile.NamedTemporaryFile("r") as worlds:
        start = time.perf_counter()
        environment = os.environ | {COUNTED_IN: worlds.name}
        subprocess.run(COMMANDS[name], cwd=root, check=True, stdout=sys.stderr, env=environment)
        found = {f"seconds of the {name}": time.perf_counter() - start}
        if name == "suite":
            found["worlds of ranks in the suite"] = len(worlds.readlines())
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.policy.figures", description="Counts the figures of the house."
    )
    parser.add_argument("--at", type=Path, default=ROOT, metavar="CHECKOUT", help="count there (default: here)")
    parser.add_argument("--time", nargs="+", choices=COMMANDS, default=(), help="run these, and print their seconds")
    parser.add_argument("--suite-s", type=float, help="seconds that `bash tests/run.sh` took before")
    parser.add_argument("--names", action="store_true", help="name what was found, too")
    given = parser.parse_args()
    runs = {} if given.suite_s is None else {"seconds of the suite": given.suite_s}
    for name in given.time:
        runs |= timed(name, given.at)
    print(table(count(given.at), runs))
    if given.names:
        trees = trees_of(given.at)
        print("", *double_names(trees), *formatters(trees), *replaced_methods(trees), sep="\n")


if __name__ == "__main__":
    assert set(TITLES) == {field.name for field in fields(Figures)}
    main()
