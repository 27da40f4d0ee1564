"""The figures of the house are counted, and they are better than those of the package without rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.policy import figures
from tests.policy.figures import BEFORE, TITLES, count, double_names, formatters, replaced_methods, roundings, table
from tests.policy.test_house import MAX_MODULES


def test_the_house_has_few_loose_files_short_folders_and_names_of_one_meaning() -> None:
    now = count()
    assert set(vars(now)) == set(TITLES) == set(BEFORE)
    assert (now.loose_files, now.double_names) == (3, 0)  # __init__, __main__, errors
    assert now.most_files <= MAX_MODULES < BEFORE["most_files"]
    assert (now.formatters, now.roundings) == (0, 0)
    assert now.readme_lines <= 200
    printed = table(now, {"seconds of the suite": 480.4, "seconds of the demo": 19.6})
    assert f"| {TITLES['files']} | {BEFORE['files']:,} | {now.files:,} |" in printed
    assert "| seconds of the suite | 1,068 | 480 |\n| seconds of the demo | none | 20 |" in printed


def test_what_is_run_is_timed_and_its_worlds_are_counted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    of_the_suite = "import time; from tests.ranks import note_start; time.sleep(1); note_start(2); note_start(4)"
    commands = {"suite": [sys.executable, "-c", of_the_suite], "demo": [sys.executable, "-c", "print('a step')"]}
    monkeypatch.setattr(figures, "COMMANDS", commands)
    monkeypatch.setattr(sys, "argv", ["figures", "--time", "suite", "demo"])
    figures.main()
    rows = dict(line.strip("| ").split(" | ", 1) for line in capfd.readouterr().out.splitlines())
    assert set(TITLES.values()) < set(rows)
    before, seconds = rows["seconds of the suite"].split(" | ")
    assert before == "1,068" and int(seconds) >= 1
    assert rows["worlds of ranks in the suite"] == "about 280 | 2"
    assert rows["seconds of the demo"].startswith("none | ")


def test_a_run_that_fails_gives_no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "COMMANDS", {"demo": [sys.executable, "-c", "raise SystemExit(3)"]})
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        figures.timed("demo")


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("def a(x: float) -> str:\n    return f'{x:.2f} s'", 1),
        ("def a(x: int | None) -> str:\n    return f'{x:,}'", 1),
        ("def a(x: float, digits: int) -> str:\n    return f'{x:.{digits}f}'", 1),
        ("def a(x: float) -> str:\n    return f'{x} s'", 0),
        ("def a(x: str) -> str:\n    return f'{x:>8}'", 0),
        ("def a(x: float) -> float:\n    return x", 0),
    ],
)
def test_a_formatter_gets_a_number_and_gives_a_text_in_a_format_of_its_own(source: str, number: int) -> None:
    assert len(list(formatters({Path("some.py"): ast.parse(source)}))) == number
    assert not list(formatters({Path("records/quantity.py"): ast.parse(source)}))


@pytest.mark.parametrize(
    ("text", "number"),
    [("{x:.1f} and {100 * y:.0%}", 2), ("{x:,.{digits}f}", 1), ("{x:,} of {x:g} in step{i:05d}, {name:>8}", 0)],
)
def test_a_text_that_rounds_a_number_by_itself_is_found(text: str, number: int) -> None:
    assert len(list(roundings(ast.parse(f"told = f'{text}'")))) == number


def test_each_method_of_an_engine_that_is_replaced_counts() -> None:
    functions = "def step(): ...\ndef save(): ...\n"
    wraps = "engine.step, self._engine.save = step, save\nsetattr(engine, name, wrapped(save))"
    tree = ast.parse(functions + wraps + "\nengine.flag = True\nsetattr(engine, FLAG, True)\nother.step = step")
    assert sorted(replaced_methods({Path("engine/some.py"): tree})) == ["name", "save", "step"]
    assert not list(replaced_methods({Path("bench/some.py"): tree}))


def test_a_name_with_two_homes_is_found() -> None:
    tree = ast.parse("class Plan: ...\nclass _Plan: ...")
    assert list(double_names({Path("a.py"): tree, Path("b.py"): tree})) == ["Plan"]
