"""`Record`: one measured number with everything needed to believe it, as one JSON line.

Bench writes records, report and README read them; no number reaches paper without one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ds_moe_ep.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured or simulated number. Raises ConfigError when a field cannot be true."""

    name: str  # dotted path of what was measured: layer.k1_even.native.time
    value: float  # the median, or the one value
    unit: str  # ms, bytes, ratio, ...
    spread: tuple[float, float]  # lower and upper quartile, or (value, value) for a counted number
    n: int  # samples behind the value
    command: str  # what to type to get it again
    commit: str  # revision of the sources, "-dirty" behind it where they were changed
    hardware: str  # processor, cores, ranks, versions
    emulated: bool  # a device or a link was simulated or shaped
    notes: str = ""

    def __post_init__(self) -> None:
        for text in ("name", "unit", "command", "commit", "hardware"):
            given = getattr(self, text)
            if not isinstance(given, str) or not given.strip():
                raise ConfigError(f"record.{text}={given!r}: a number without it proves nothing; give a text")
        notes: Any = self.notes
        if not isinstance(notes, str) or "\n" in notes:
            raise ConfigError(f"record.notes={self.notes!r}: notes are one line of text; join the lines")
        emulated, n = cast(Any, self.emulated), cast(Any, self.n)
        if not isinstance(emulated, bool):
            raise ConfigError(f"record.emulated={self.emulated!r}: say true or false")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"record.n={self.n!r}: a record needs one sample or more")
        _check_numbers(self.value, self.spread)
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "spread", (float(self.spread[0]), float(self.spread[1])))

    def to_json(self) -> str:
        """The record as one line of JSON, without a newline."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str, path: str = "record") -> Record:
        """The record that `line` holds. Raises ConfigError for a broken line or an unknown key."""
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}={line[:40]!r}: not a line of JSON ({error}); drop the line") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}={line[:40]!r}: a record is an object; write {{...}}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"{path}.{name}={values[name]!r}: unknown key; {nearest(name, fields)}")
        for name, declared in fields.items():
            if name not in values and declared.default is dataclasses.MISSING:
                raise ConfigError(f"{path}.{name}: missing; a record states all of {', '.join(fields)}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _check_numbers(value: Any, spread: Any) -> None:
    pair = tuple(spread) if isinstance(spread, tuple | list) else ()
    for number in (value, *pair):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ConfigError(f"record.value={value!r}, spread={spread!r}: finite numbers only; leave it out")
    if len(pair) != 2 or not pair[0] <= value <= pair[1]:
        raise ConfigError(
            f"record.spread={spread!r}: two numbers with value={value!r} between them; give (value, value) "
            "for a number that was counted"
        )


def write_records(path: str | Path, records: Iterable[Record], *, append: bool = False) -> int:
    """Number of records written to `path`, one per line; each line is flushed whole."""
    written = 0
    with open(path, "a" if append else "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(record.to_json() + "\n")
            lines.flush()
            written += 1
    return written


def write_whole(records: Iterable[Record], path: Path | None) -> None:
    """Replaces the file at `path` by these records at once: it is never half written. Without a path nothing."""
    if path is not None:
        replace_file(path, "".join(record.to_json() + "\n" for record in records))


def replace_file(path: Path, content: str | bytes) -> None:
    """Puts a whole file in the place of what is at `path`: it is never half written. Raises OSError."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file in its order. Raises ConfigError, with the line's number, for a broken one."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record.from_json(line, f"{path}:{number}")
