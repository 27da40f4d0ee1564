"""Options of a command: each is a field of a frozen dataclass, as each knob of the configuration is.

    @dataclass(frozen=True, kw_only=True)
    class DrawOptions:
        rounds: int = option(5, "measured rounds", least=1)         # --rounds N, refused below 1
        device: Literal["cpu", "cuda"] = option("cpu", "computes")  # --device, one of these
        out: Path | None = option(None, "Records", type=output_file)
        memory: bool = option(True, "leave memory out")             # --no-memory

    options = parse(DrawOptions, words, prog="ds_moe_ep bench draw")

A field's type gives the option's: numbers have ends (least, most, above), a Literal has choices, a bool takes no value,
a tuple takes several. A field without a default is required. Help, defaults and refusals follow from the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ds_moe_ep.config.command_line import Parser, number, whole

O = TypeVar("O")  # noqa: E741
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class OptionRule:
    """Rule of an option beyond its field's type and default."""

    help: str
    type: Callable[[str], Any] | None
    least: float | None
    most: float | None
    above: float | None
    choices: tuple[Any, ...] | None
    metavar: str | None
    flags: tuple[str, ...]
    positional: bool
    one_of: str
    rest: bool


def option(
    default: Any = REQUIRED,
    help: str = "",
    *,
    type: Callable[[str], Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    flags: Sequence[str] = (),
    positional: bool = False,
    one_of: str = "",
    rest: bool = False,
) -> Any:
    """A dataclass field that is an option, or an argument where it is `positional`.

    `type` reads the text where the field's own type does not say how; `above` is an end that is not in the range;
    `flags` stand in place of the field's name; of the options with one word in `one_of` only one may be given; an
    argument with `rest` takes all words behind it.
    """
    chosen = tuple(choices) if choices is not None else None
    rule = OptionRule(
        help=help,
        type=type,
        least=least,
        most=most,
        above=above,
        choices=chosen,
        metavar=metavar,
        flags=tuple(flags),
        positional=positional,
        one_of=one_of,
        rest=rest,
    )
    return field(default=default, metadata={"option": rule})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the options of a dataclass to a parser; fields without `option` are none."""
    hints, groups = typing.get_type_hints(options), dict[str, Any]()
    for its in dataclasses.fields(options):
        rule: OptionRule | None = its.metadata.get("option")
        if rule is None:
            continue
        into: Any = parser
        if rule.one_of:
            into = groups.setdefault(rule.one_of, None) or parser.add_mutually_exclusive_group()
            groups[rule.one_of] = into
        names, given = _argument(its, hints[its.name], rule)
        into.add_argument(*names, **given)


def read(options: type[O], parsed: argparse.Namespace) -> O:
    """The dataclass with what a parser read; fields that it does not know keep their defaults.

    Words of another program come without the "--" in front of them.
    """
    values: dict[str, Any] = {}
    for its in dataclasses.fields(options):  # type: ignore[arg-type]
        if hasattr(parsed, its.name):
            value = getattr(parsed, its.name)
            rule: OptionRule | None = its.metadata.get("option")
            is_behind = rule is not None and rule.rest and list(value[:1]) == ["--"]
            values[its.name] = tuple(value[is_behind:]) if isinstance(value, list) else value
    return options(**values)


def parse(options: type[O], words: Sequence[str], **about: Any) -> O:
    """The dataclass of a command line; `about` are a parser's prog, description and epilog. Raises ConfigError."""
    return read(options, make_parser(options, **about).parse_args(list(words), argparse.Namespace(given=list(words))))


def make_parser(options: type, **about: Any) -> Parser:
    """The parser of a dataclass's options."""
    parser = Parser(**about)
    add_options(parser, options)
    return parser


@dataclass(frozen=True)
class Command(Generic[O]):
    """A command: its options as a dataclass, and the function that runs with them and returns the exit code."""

    name: str
    help: str
    options: type[O]
    run: Callable[[O], int]
    description: str
    example: str = ""
    epilog: str = ""

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:
        """Adds the command to those of a parser, which stores its function as `run`."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=textwrap.fill(self.description, 78) if self.epilog else self.description,
            epilog=self.epilog or (f"example: {self.example}" if self.example else None),
            formatter_class=argparse.RawDescriptionHelpFormatter if self.epilog else argparse.HelpFormatter,
        )
        add_options(parser, self.options)
        parser.set_defaults(run=lambda parsed: self.run(read(self.options, parsed)))


def _argument(its: dataclasses.Field[Any], hint: Any, rule: OptionRule) -> tuple[list[str], dict[str, Any]]:
    """Names and values of `add_argument` for a field."""
    hint = _without_none(hint)
    shown = f"{rule.help}{_default(its, rule)}".replace("%", "%%")
    name = its.name.replace("_", "-")
    if hint is bool:
        prefix, action = ("--no-", "store_false") if its.default is True else ("--", "store_true")
        return list(rule.flags) or [prefix + name], {"action": action, "dest": its.name, "help": shown}
    is_many, choices = typing.get_origin(hint) is tuple, rule.choices
    if is_many:
        hint = typing.get_args(hint)[0]
    if choices is None and typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
    given: dict[str, Any] = {"help": shown, "type": _reader(hint, rule), "choices": choices, "metavar": rule.metavar}
    if is_many:
        given["nargs"] = argparse.REMAINDER if rule.rest else "+"
    if rule.positional:
        given["metavar"] = rule.metavar or its.name.upper()
        return [its.name], given
    is_required = its.default is REQUIRED
    return list(rule.flags) or [f"--{name}"], {
        **given,
        "dest": its.name,
        "required": is_required,
        "default": None if is_required else its.default,
    }


def _reader(hint: Any, rule: OptionRule) -> Callable[[str], Any] | None:
    """The function that reads the option's text, by the field's type."""
    if rule.type is not None:
        return rule.type
    if hint is int and (rule.least is not None or rule.most is not None):
        return whole(int(rule.least or 0), None if rule.most is None else int(rule.most))
    if hint is float:
        ends = [end if end is not None else inf for end, inf in ((rule.least, -math.inf), (rule.most, math.inf))]
        return number(*ends, above=-math.inf if rule.above is None else rule.above)
    return hint if isinstance(hint, type) and hint is not str else None


def _default(its: dataclasses.Field[Any], rule: OptionRule) -> str:
    """The default behind a help text that does not speak of it."""
    value = its.default
    if value is REQUIRED or value is None or isinstance(value, bool) or value in ((), "") or "default" in rule.help:
        return ""
    told = (
        " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
    )
    return f" (default: {told})"


def _without_none(hint: Any) -> Any:
    """The type of a value that may be None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    others = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return others[0] if len(others) == 1 else str
