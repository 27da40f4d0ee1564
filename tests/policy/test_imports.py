"""The floors of the house: imports go down only, DeepSpeed has one door, and importing the package is free."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.policy.sources import PACKAGE, ROOT, imports_of, own_python

FLOORS = {
    **dict.fromkeys(("errors", "kernels"), 1),
    **dict.fromkeys(("config", "records"), 2),
    **dict.fromkeys(("schedule", "live"), 3),
    "sizing": 4,
    **dict.fromkeys(("health", "specification"), 5),
    "check": 6,
    **dict.fromkeys(("comm", "simulate", "report"), 7),
    "moe": 8,
    "model": 9,
    "parallel": 10,
    "engine": 11,
    **dict.fromkeys(("bench", "training"), 12),
    **dict.fromkeys(("doctor", "verification"), 13),
    **dict.fromkeys(("cli", "__main__"), 14),
}
TOP = 14
WINGS = {"simulate", "report"}  # they know no torch, and nobody below the command line calls them
GROUND = {room for room, floor in FLOORS.items() if floor <= 6} - {"kernels", "health"}
OUTSIDE_FLOORS = {"", "__init__"}  # the lazy public names look up at every floor
MAY_IMPORT_DEEPSPEED = {"engine", "bench", "training"}
NO_TORCH = GROUND | WINGS | OUTSIDE_FLOORS | {"cli", "__main__"}
STANDARD_LIBRARY_ALONE = GROUND
MAY_IMPORT_RICH = "ds_moe_ep/records/render.py"  # writes every table, for a terminal too


@functools.cache
def imported() -> dict[Path, frozenset[str]]:
    """The names that each file of the package imports: above, in a function, or for annotations alone."""
    return {path: frozenset(imports_of(path, tree)) for path, tree in own_python() if PACKAGE in path.parents}


def rooms() -> Iterator[tuple[str, str, frozenset[str]]]:
    """(file, its room, what it imports) of every file of the package."""
    for path, names in imported().items():
        first = path.relative_to(PACKAGE).with_suffix("").parts[0]
        yield str(path.relative_to(ROOT)), first, names


def rooms_imported(names: Set[str]) -> set[str]:
    """The rooms of the package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("ds_moe_ep.")}


def why_not(importer: str, imported: str) -> str | None:
    """Why the room `importer` must not import the room `imported`, or None where it may."""
    if importer == imported:
        return None
    if imported in WINGS and FLOORS[importer] != TOP:
        return "only the command line calls a wing"
    if FLOORS[imported] > FLOORS[importer]:
        return "imports go down only"
    if FLOORS[imported] == FLOORS[importer] != TOP:
        return "peers do not import each other"
    return None


def test_a_plan_runs_no_audit() -> None:
    """The audit simulates eight jobs more; the command `audit` is the one that asks for it."""
    asking = {file for file, _, names in rooms() if any(name.startswith("ds_moe_ep.simulate.audit") for name in names)}
    assert "ds_moe_ep/cli/main.py" in asking, "or nothing was looked at"
    assert {file for file in asking if "/simulate/plan/" in file} == set()


def test_every_file_stands_on_a_known_floor() -> None:
    homeless = {file for file, room, _ in rooms() if room not in {*FLOORS, *OUTSIDE_FLOORS}}
    assert homeless == set(), "give the room a floor in FLOORS and in ARCHITECTURE.md"


def test_imports_go_down_only() -> None:
    wrong = [
        f"{file} imports {other}: {reason}"
        for file, room, names in rooms()
        if room not in OUTSIDE_FLOORS
        for other in sorted(rooms_imported(names) & FLOORS.keys())
        if (reason := why_not(room, other))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("moe", "model"), ("config", "moe"), ("comm", "simulate"), ("simulate", "moe"), ("engine", "bench")],
)
def test_the_floor_rule_refuses_what_it_should(importer: str, imported: str) -> None:
    assert why_not(importer, imported) is not None


def imports_by_module() -> dict[str, set[str]]:
    """The package's modules that each of them imports: above, in a function, or for annotations alone."""
    trees = {
        module_name(path.relative_to(ROOT)): (path, tree) for path, tree in own_python() if PACKAGE in path.parents
    }
    del trees[PACKAGE.name]  # its lazy names look up at every floor
    found: dict[str, set[str]] = {}
    for name, (path, tree) in trees.items():
        named = {each if each in trees else each.rpartition(".")[0] for each in imports_of(path, tree)}
        found[name] = (named & trees.keys()) - {name}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def circle(imports: Mapping[str, Set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at its end; none where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_modules_import_each_other_in_a_circle_not_even_for_annotations_or_late() -> None:
    imports = imports_by_module()
    assert sum(map(len, imports.values())) > 1000
    assert circle(imports) == []


def test_a_circle_of_late_imports_would_be_found() -> None:
    imports = imports_by_module()
    assert "ds_moe_ep.bench.demo.ranks" in imports["ds_moe_ep.bench.demo.command"], "inside of a function"
    imports["ds_moe_ep.moe.routes"] |= {"ds_moe_ep.moe.router"}
    assert {"ds_moe_ep.moe.routes", "ds_moe_ep.moe.router"} <= {*circle(imports)}


def test_deepspeed_has_one_door() -> None:
    wrong = [
        file
        for file, room, names in rooms()
        if room not in MAY_IMPORT_DEEPSPEED and any(name.split(".")[0] == "deepspeed" for name in names)
    ]
    assert wrong == []


def test_ground_and_command_line_know_no_torch() -> None:
    wrong = [
        (file, name)
        for file, room, names in rooms()
        if room in NO_TORCH and room not in OUTSIDE_FLOORS
        for name in names
        if name.split(".")[0] in {"torch", "numpy", "triton"}
    ]
    assert wrong == []


def test_ground_needs_the_standard_library_alone() -> None:
    allowed = sys.stdlib_module_names | {"ds_moe_ep"}
    wrong = [
        (file, name)
        for file, room, names in rooms()
        if room in STANDARD_LIBRARY_ALONE
        for name in names
        if name.split(".")[0] not in allowed | ({"rich"} if file == MAY_IMPORT_RICH else set())
    ]
    assert wrong == []


def test_importing_the_package_is_free_and_loads_no_torch() -> None:
    script = (
        "import sys, time; start_s = time.process_time(); import ds_moe_ep\n"
        "print(time.process_time() - start_s, 'torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    least_s = 1.0  # of processor time: others on the machine slow a process down, none makes it faster
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
        took_s, loaded = done.stdout.split()
        assert loaded == "False"
        least_s = min(least_s, float(took_s))
        if least_s < 0.1:
            break
    assert least_s < 0.1
