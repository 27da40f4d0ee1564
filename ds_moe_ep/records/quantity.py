"""`Quantity`: one result with its unit and bar; and the one way in which the package writes numbers.

Everything that a benchmark measured or a simulation foretold is a Quantity. Its Record, its values in JSON and its text
in a table follow from it: see provenance.py for Records and render.py for tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record

DASH, TIMES = "\u2013", "\u00d7"
NONE = DASH  # a cell without a number

SCALES: dict[str, tuple[str, float]] = {  # kind of a unit, and how many of the kind's first unit it is
    "us": ("time", 1.0),
    "ms": ("time", 1e3),
    "s": ("time", 1e6),
    "tokens/s": ("rate", 1.0),
    "ratio": ("share", 1.0),
    "percent": ("share", 0.01),
    "bytes": ("size", 1.0),
    "kB": ("size", 1e3),
    "MB": ("size", 1e6),
    "MiB": ("size", 2.0**20),
    "GB": ("size", 1e9),
    "GiB": ("size", 2.0**30),
    "loss": ("loss", 1.0),
    "rows": ("rows", 1.0),
}
SPELLINGS = {
    "\u00b5s": "us",
    "us/token": "us",
    "us a token": "us",
    "ms/token": "ms",
    "s/token": "s",
    "tokens a second": "tokens/s",
    "%": "percent",
    "share": "ratio",
    "B": "bytes",
    "nats": "loss",
    "tokens": "rows",
    "count": "rows",
}
JSON_UNITS = {"tokens/s": "tokens_per_s", "%": "percent", "1/s": "per_s"}  # of keys; other units are as they are


@dataclass(frozen=True)
class Quantity:
    """One number with its unit and bar.

    `low` and `high` are quartiles of samples, or the ends of a prediction; both are the value of an exact number.
    `name` is the end of its Record's name, `title` is for people, `n` the samples behind the value, `note` one line on
    how it came about.
    """

    name: str
    title: str
    unit: str
    value: float
    low: float
    high: float
    n: int = 1
    note: str = ""

    @classmethod
    def of(
        cls, value: float, *ends: float, unit: str = "", name: str = "", title: str = "", note: str = ""
    ) -> Quantity:
        """The value with a bar that spans it and its ends; an exact number where there are none."""
        low, high = min(value, *ends, value), max(value, *ends, value)
        return cls(name, title, unit, value, low, high, note=note)

    @classmethod
    def of_record(cls, record: Record, title: str = "") -> Quantity:
        """The number of a Record, under the Record's whole name."""
        return cls(record.name, title, record.unit, record.value, *record.spread, record.n, record.notes)

    def named(self, name: str, title: str = "", unit: str | None = None) -> Quantity:
        """The same number under a name; also says the unit of a number that had none."""
        return dataclasses.replace(self, name=name, title=title, unit=self.unit if unit is None else unit)

    def scaled(self, factor: float, unit: str | None = None) -> Quantity:
        """The number times a factor, which changes its unit where one is given."""
        ends = {end: factor * getattr(self, end) for end in ("value", "low", "high")}
        return dataclasses.replace(self, unit=self.unit if unit is None else unit, **ends)

    def into(self, unit: str) -> Quantity:
        """The number in another unit of its kind. Raises ConfigError where its own measures something else."""
        kind, scale = SCALES[unit]
        own = SPELLINGS.get(self.unit, self.unit)
        own_kind, own_scale = SCALES.get(own, ("", 1.0))
        if kind in ("loss", "rows") and own == "ratio":  # a number without a unit
            own_kind = kind
        if own_kind != kind:
            fitting = ", ".join(name for name, (of, _) in SCALES.items() if of == kind)
            raise ConfigError(f"{self.name}.unit={self.unit!r}: not a unit of {kind}; write it in one of {fitting}")
        return self.scaled(own_scale / scale, unit)

    @property
    def bar(self) -> list[float]:
        """[value, low, high], as JSON has it."""
        return [self.value, self.low, self.high]

    @property
    def key(self) -> str:
        """The key of the number in JSON: its name and unit."""
        return f"{self.name}_{JSON_UNITS.get(self.unit, self.unit)}"

    @property
    def is_spread(self) -> bool:
        """True where the bar says more than the value."""
        return self.low < self.high

    def text(self, decimals: int | None = None, *, digits: int | None = None, bar: bool = True) -> str:
        """The value, and its bar in brackets where that reads differently: 321,000 (261,000-378,000)."""
        value, low, high = (number(each, decimals, digits=digits) for each in self.bar)
        return f"{value} ({low}{DASH}{high})" if bar and low != high else value

    def percent(self, decimals: int = 1, *, bar: bool = True) -> str:
        """A share in percent: 98.4 (98.3-98.6) %."""
        return f"{self.into('percent').text(decimals, bar=bar)} %"


@dataclass(frozen=True)
class Row:
    """Numbers of one thing: a row of a table, an object in JSON. `labels` say what they are of."""

    labels: Mapping[str, Any]
    quantities: tuple[Quantity, ...]

    @property
    def title(self) -> str:
        """The values of the labels."""
        return ", ".join(map(str, self.labels.values()))

    def __getitem__(self, key: str) -> Quantity:
        """The number of a key of JSON, like `step_ms`."""
        return next(quantity for quantity in self.quantities if quantity.key == key)

    def to_json(self, *exact: str) -> dict[str, Any]:
        """The labels, and [value, low, high] of each number; the value alone where its key is in `exact`."""
        return {**self.labels, **{q.key: q.value if q.key in exact else q.bar for q in self.quantities}}


def number(
    value: float, decimals: int | None = None, *, digits: int | None = None, significant: int | None = None
) -> str:
    """A number for people: with so many decimals, or with three or more digits that count (450,120, 45.3, 0.0123).

    `digits` also rounds whole numbers, to so many digits: 412,000. `significant` leaves so many digits, and no zero
    at the end: 1.5, 0.02.
    """
    size = abs(value)
    if significant is not None:
        return f"{rounded(value, significant):,.15g}"
    if decimals is not None:
        return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: no "-0.0"
    if size == 0 or math.isinf(size):
        return f"{value:.0f}"
    if size < 0.001:
        return f"{value:.2e}"
    if digits is not None and size >= 10**digits - 0.5:
        scale = 10 ** (len(f"{size:.0f}") - digits)
        return f"{scale * round(value / scale):,}"
    decimals = next((count for bound, count in ((99.95, 0), (9.995, 1), (0.9995, 2), (0.09995, 3)) if size >= bound), 4)
    return f"{value:,.{decimals}f}"


def rounded(value: float, significant: int) -> float:
    """The number that so many digits tell."""
    return float(f"{value:.{significant}g}")


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 rank, 16 ranks, 2 copies; `many` is the plural of a noun that takes more than an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def size(num_bytes: float, decimals: int = 2) -> str:
    """Bytes in the unit that reads well (1 GB = 1e9 bytes)."""
    for unit in ("GB", "MB", "kB"):
        if num_bytes >= SCALES[unit][1]:
            return f"{number(num_bytes / SCALES[unit][1], decimals)} {unit}"
    return f"{num_bytes:.0f} B"


def gigabytes(num_bytes: float, decimals: int = 1) -> str:
    """Bytes in GB whatever their size, for numbers that a reader compares."""
    return f"{number(num_bytes / SCALES['GB'][1], decimals)} GB"


def percent(share: float, decimals: int = 1) -> str:
    """A share of 1 in percent."""
    return f"{number(100 * share, decimals)} %"


def convert(record: Record, unit: str) -> Quantity:
    """The number of a Record in a unit of the reader's choice. Raises ConfigError as `into` does."""
    return Quantity.of_record(record).into(unit)


def cell(record: Record | None, unit: str, decimals: int | None = None, *, bar: bool = False) -> str:
    """A table's cell: the Record in `unit`, with its quartiles if they are asked for; a dash where there is none."""
    return NONE if record is None else convert(record, unit).text(decimals, bar=bar)


def bar_below(text: str) -> str:
    """A number's text with its bar in a line of its own, for a narrow cell."""
    return text.replace(" (", "\n(", 1)


def to_json(quantities: Iterable[Quantity]) -> dict[str, list[float]]:
    """[value, low, high] of each, by its name and unit."""
    return {quantity.key: quantity.bar for quantity in quantities}
