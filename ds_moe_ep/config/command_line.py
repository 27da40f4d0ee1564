"""Command lines of every command: one parser that refuses by ConfigError, and the values that options take.

What cannot be is refused here, before any work begins: numbers out of their range, files that cannot be written. A
mistyped command, option or choice is answered by the nearest known one. No torch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ds_moe_ep.errors import ConfigError, MoEError, nearest

REFUSED = 2  # the exit code of a command that was given what cannot be
INTERRUPTED = 130  # after Ctrl-C, as shells count it
PROBE_BYTES = 1 << 16  # which a disk that is full does not take


class Parser(argparse.ArgumentParser):
    """argparse with whole names only, which raises ConfigError instead of ending the process.

    The parsers of its commands are of this class too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, which calls it for each command; refuses what neither the parser nor the command knows."""
        words: list[str] = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown(self._own_words(words))  # before an option that is missing for the same mistake is
        parsed, others = super().parse_known_args(words, namespace)
        self._refuse_unknown(others)
        if others:
            is_option = others[0].startswith("-")
            self.error(f"{others[0]}: unknown option" if is_option else f"{others[0]!r}: one argument too many")
        return parsed, others

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with argparse's message, in the package's form: a refused value stands behind "="."""
        words = message.removeprefix("argument ").replace(": =", "=", 1)
        raise ConfigError(f"{words}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = nearest(str(value), map(str, action.choices), "values")
            raise argparse.ArgumentError(action, f"={value}: {known}")

    def _own_words(self, words: Sequence[str]) -> Sequence[str]:
        """The words up to those of a command, or of what stands behind "--": their options are not this parser's."""
        passes_on = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        ends = (index for index, word in enumerate(words) if word == "--" or (passes_on and word[:1] != "-"))
        return words[: next(ends, len(words))]

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Raises ConfigError for the first option of which this parser knows nothing."""
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                options = [option for option in self._option_string_actions if option.startswith("--")]
                self.error(f"{name}: unknown option; {nearest(name, options, 'options')}")


def refused(error: MoEError, *, as_json: bool = False) -> int:
    """REFUSED, once the error is told: a line on stderr, or an object on stdout, where a program reads it."""
    kind = type(error).__name__
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": str(error)}}, indent=2))
    else:
        print(f"{kind}: {error}", file=sys.stderr)
    return REFUSED


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number in a range."""
    rule = f"from {least} to {most}" if most is not None else f"of {least} or more"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"={text}: give a whole number {rule}")
        return value

    return read


def slots(text: str) -> int | str:
    """The value of --replicas: a number of slots, or `auto`."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"={text}: give a number of slots, or auto")
    return text if text == "auto" else int(text)


def number(least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf) -> Callable[[str], float]:
    """The type of an option that takes a finite number in a range; `above` is the end that is not in it."""
    ends = ((above, "more than"), (least, "at least"), (most, "at most"))
    rule = " and ".join(f"{words} {end:g}" for end, words in ends if math.isfinite(end))

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f"={text}: give a number that is {rule or 'finite'}")
        return value

    return read


def output_file(text: str) -> Path:
    """The type of an option that names a file to write: it is tried, and nothing is left of the trial."""
    try:
        return writable_file(Path(text), "")
    except ConfigError as error:  # a ValueError, of which argparse would tell its own words
        raise argparse.ArgumentTypeError(str(error)) from None


def writable_file(path: Path, name: str) -> Path:
    """`path`, where a whole file can be put in its place later. Raises ConfigError in the name of the option `name`.

    Only ordinary files can: a device would be replaced by one.
    """
    try:
        if path.is_dir() or not path.name:
            raise ConfigError(f"{name}={path}: a folder; give the name of a file in it")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{name}={path}: no ordinary file; leave the option out, or give the name of one")
        if not path.parent.is_dir():
            raise ConfigError(f"{name}={path}: there is no folder {path.parent}; make it first")
        part = path.with_name(path.name + ".part")  # as writers of whole files call it
        with part.open("ab"):
            pass
        if part.stat().st_size == 0:
            part.unlink()
    except OSError as error:
        raise ConfigError(f"{name}={path}: cannot be written ({error.strerror}); give a file of your own") from None
    return path


def writable_folder(path: Path, name: str) -> Path:
    """`path`, made where it is missing, and tried with a little, on each rank of a job, say.

    Raises ConfigError in the name of the option `name`.
    """
    probe = path / f".probe.{socket.gethostname()}.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{name}={path}: cannot be written ({error.strerror}); name a folder of your own") from None
    return path
