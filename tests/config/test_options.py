"""Options from the fields of a dataclass: types, ends, choices and defaults; each beside what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ds_moe_ep.config.command_line import output_file
from ds_moe_ep.config.options import make_parser, option, parse
from ds_moe_ep.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """One option of each kind."""

    source: str = option(help="read", positional=True)
    cluster: str = option(help="needed")
    rounds: int = option(5, "measured rounds", least=1, most=9)
    seconds: float = option(2.5, "time", above=0)
    device: Literal["cpu", "cuda"] = option("cpu", "computes")
    sides: tuple[str, ...] = option(("serial", "auto"), "raced", choices=("serial", "auto", "wire"))
    memory: bool = option(True, "leave 5 % of memory out")
    json: bool = option(False, "print JSON", one_of="form")
    markdown: bool = option(False, "print Markdown", one_of="form")
    out: Path | None = option(None, "Records", type=output_file, flags=("-o", "--out"))
    given: tuple[str, ...] = ()


GIVEN = ["x", "--cluster", "c"]


def test_every_field_is_an_option_with_its_default() -> None:
    assert parse(RaceOptions, GIVEN) == RaceOptions(source="x", cluster="c", given=tuple(GIVEN))


def test_values_have_the_types_of_their_fields(tmp_path: Path) -> None:
    words = [*GIVEN, "--rounds", "9", "--seconds", "1e-3", "--device", "cuda", "--sides", "wire", "serial"]
    words += ["--no-memory", "--json", "-o", str(tmp_path / "x")]
    found = parse(RaceOptions, words)
    assert (found.rounds, found.seconds, found.device, found.sides) == (9, 1e-3, "cuda", ("wire", "serial"))
    assert (found.memory, found.json, found.markdown, found.out) == (False, True, False, tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: SOURCE, --cluster"),
        (["x"], "required: --cluster"),
        ([*GIVEN, "--rounds", "0"], "--rounds=0: give a whole number from 1 to 9"),
        ([*GIVEN, "--rounds", "2.5"], "--rounds=2.5: give a whole number"),
        ([*GIVEN, "--seconds", "0"], "--seconds=0: give a number that is more than 0"),
        ([*GIVEN, "--device", "cdua"], "--device=cdua: did you mean 'cuda'?"),
        ([*GIVEN, "--sides", "wire", "atuo"], "--sides=atuo: did you mean 'auto'?"),
        ([*GIVEN, "--memory"], "--memory: unknown option; did you mean '--no-memory'?"),
        ([*GIVEN, "--given", "x"], "--given: unknown option"),
        ([*GIVEN, "--json", "--markdown"], "--markdown: not allowed with argument --json"),
        ([*GIVEN, "--out", "/"], "-o/--out=/: a folder"),
    ],
)
def test_what_a_field_does_not_take_is_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(RaceOptions, words)
    assert told in str(refused.value)


def test_help_tells_defaults_once() -> None:
    told = " ".join(make_parser(RaceOptions, prog="race").format_help().split())
    for words in (
        "measured rounds (default: 5)",
        "time (default: 2.5)",
        "raced (default: serial auto)",
        "5 % of memory",
    ):
        assert told.count(words) == 1
    assert "print JSON (default" not in told and "Records (default" not in told
