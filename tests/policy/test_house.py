"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter

from tests.policy.sources import PACKAGE, ROOT, own_files, own_python

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MODULES = 15  # of a folder: what is more needs a structure of its own
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
# Split, so that this file does not name what it forbids.
MACHINE_PATHS = ["/" + top + "/" for top in ("root", "work", "home", "opt", "mnt")]
REGISTRIES = ["py" + "pi.", "python" + "hosted.org", "download." + "pytorch.org", "conda." + "anaconda"]


def name_of(path: object) -> str:
    return str(path).removeprefix(f"{ROOT}/")


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path, _ in own_python()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = [
        f"{name_of(path)}: {node.name} has {length} lines"
        for path, tree in own_python()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_a_folder_of_the_package_has_at_most_fifteen_modules() -> None:
    numbers = Counter(path.parent for path, _ in own_python() if PACKAGE in path.parents)
    assert numbers
    assert {name_of(folder): number for folder, number in numbers.items() if number > MAX_MODULES} == {}


def test_a_public_class_name_has_one_meaning() -> None:
    homes: dict[str, list[str]] = {}
    for path, tree in own_python():
        if PACKAGE in path.parents:
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(name_of(path))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_no_function_rebinds_a_module_global() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path, tree in own_python()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert wrong == []


def test_the_package_reads_no_environment_variable_outside_its_doors() -> None:
    """The launcher's like LOCAL_WORLD_SIZE are read where processes start."""
    doors = ("engine", "bench", "training", "doctor", "verification", "comm/open.py")
    wrong = [
        name_of(path)
        for path, tree in own_python()
        if PACKAGE in path.parents and not str(path.relative_to(PACKAGE)).startswith(doors)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert wrong == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [name_of(path) for path in own_files() if path.stem.lower() in VAGUE_NAMES] == []


def test_nothing_names_a_path_of_one_machine_or_a_registry() -> None:
    forbidden = re.compile("|".join(map(re.escape, MACHINE_PATHS + REGISTRIES)))
    wrong = [
        f"{name_of(path)}:{number}: {match[0]}"
        for path in own_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := forbidden.search(line))
    ]
    assert wrong == []


def test_shell_scripts_parse() -> None:
    scripts = [path for path in own_files() if path.suffix == ".sh" or name_of(path) == ".ci/run"]
    assert scripts
    for path in scripts:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
