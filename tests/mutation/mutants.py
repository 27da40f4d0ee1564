"""The mutants of a file: where they are, one drawn at each place, and those of an earlier record."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.mutation.places import RemoveCall, has_mutants, is_worth_it
from tests.ranks import REPOSITORY

EQUAL = Path(__file__).with_name("equal.txt")


@dataclass
class Mutant:
    """One change of one file, and what became of it: killed, timed out, survived or equal."""

    path: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str = ""
    because: str = ""  # the test that failed, or the reason why it is equal
    seconds: float = 0.0


def places_of(path: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """(line, column) of what can be changed: the operators that change it, with the occurrence."""
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast((REPOSITORY / path).read_text(encoding="utf-8"))))
    for name in ["RemoveCall", *filter(is_worth_it, operator_names())]:
        positions = ((node, start) for node in nodes for start, _ in operator_of(name).mutation_positions(node))
        for occurrence, (node, start) in enumerate(positions):
            if has_mutants(node):
                found.setdefault(start, []).append((name, occurrence))
    return found


def operator_of(name: str) -> Any:
    return RemoveCall() if name == "RemoveCall" else get_operator(name)()


def changed(path: str, name: str, occurrence: int) -> str:
    """The whole text of the mutant."""
    return str(mutate_code((REPOSITORY / path).read_text(encoding="utf-8"), operator_of(name), occurrence))


def mutant_of(path: str, line: int, name: str, occurrence: int) -> tuple[Mutant, str]:
    before, after = (REPOSITORY / path).read_text(encoding="utf-8"), changed(path, name, occurrence)
    diff = list(unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
    old, new = (" ".join(text[1:].strip() for text in diff if text[0] == sign) for sign in "-+")
    return Mutant(path, line, name.removeprefix("core/"), old, new), after


def drawn(paths: list[str], number: int, seed: int) -> list[tuple[Mutant, str]]:
    """A mutant at each of `number` places (0: of all), in the order of the files; prints how many there are."""
    places = [(path, *at, choices) for path in paths for at, choices in sorted(places_of(path).items())]
    generator = random.Random(seed)
    chosen = sorted(generator.sample(range(len(places)), number)) if 0 < number < len(places) else range(len(places))
    print(f"{len(chosen)} of {len(places)} places, {sum(len(p[-1]) for p in places)} mutants in {len(paths)} files")
    return [mutant_of(places[i][0], places[i][1], *generator.choice(places[i][-1])) for i in chosen]


def survivors_of(record: Path) -> list[tuple[Mutant, str]]:
    """Those that survived then, found again by the text of their lines."""
    wanted = {
        (m["path"], m["before"], m["after"]) for m in json.loads(record.read_text()) if m["outcome"] == "survived"
    }
    lines = {(path, " ".join(before.split())) for path, before, _ in wanted}
    found = {}
    for path in sorted({path for path, _, _ in wanted}):
        text = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
        for (line, _), choices in places_of(path).items():
            near = " ".join(text[line - 1].split())
            if any(path == other and near in before for other, before in lines):
                for mutant, after in (mutant_of(path, line, *choice) for choice in choices):
                    found[mutant.path, mutant.before, mutant.after] = mutant, after
    return [found[key] for key in found if key in wanted]


def equal_ones() -> dict[tuple[str, str, str], str]:
    """(file, line, mutated line): why no test can tell them apart. Lines of a file: `- `, `+ `, `= `."""
    path, block, found = "", [""] * 2, {}
    for line in EQUAL.read_text(encoding="utf-8").splitlines():
        if line.startswith(("- ", "+ ")):
            block["-+".index(line[0])] = line[2:]
        elif line.startswith("= "):
            found[path, block[0], block[1]] = line[2:]
        elif line and line[0] != "#":
            path = line
    return found
