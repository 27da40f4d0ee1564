"""A Record in the unit that a page wants, and how a page writes numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record

DASH, TIMES = "\u2013", "\u00d7"
NONE = DASH  # a cell without a Record

# What a unit measures, and how many of the first unit of its kind it is.
SCALES: dict[str, tuple[str, float]] = {
    "us": ("time", 1.0),
    "ms": ("time", 1e3),
    "s": ("time", 1e6),
    "tokens/s": ("rate", 1.0),
    "ratio": ("share", 1.0),
    "percent": ("share", 0.01),
    "bytes": ("size", 1.0),
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


@dataclass(frozen=True)
class Quantity:
    """A Record's value with its quartiles, in a unit of the reader's choice."""

    value: float
    low: float
    high: float

    @property
    def is_spread(self) -> bool:
        """Whether the quartiles say more than the value."""
        return self.low < self.high


def convert(record: Record, unit: str) -> Quantity:
    """The Record in `unit`. Raises ConfigError where its own unit measures something else."""
    kind, scale = SCALES[unit]
    own = SPELLINGS.get(record.unit, record.unit)
    own_kind, own_scale = SCALES.get(own, ("", 1.0))
    if kind in ("loss", "rows") and own == "ratio":  # a number without a unit
        own_kind = kind
    if own_kind != kind:
        fitting = ", ".join(name for name, (of, _) in SCALES.items() if of == kind)
        raise ConfigError(f"{record.name}.unit={record.unit!r}: not a unit of {kind}; write it in one of {fitting}")
    factor = own_scale / scale
    return Quantity(record.value * factor, record.spread[0] * factor, record.spread[1] * factor)


def number(value: float) -> str:
    """A number with three or more digits that count: 450,120, 45.3, 0.0123."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.001:
        return f"{value:.2e}"
    decimals = next((count for bound, count in ((99.95, 0), (9.995, 1), (0.9995, 2), (0.09995, 3)) if size >= bound), 4)
    return f"{value:,.{decimals}f}"


def with_quartiles(quantity: Quantity) -> str:
    """The value, and its quartiles in brackets where they say more."""
    low, high = number(quantity.low), number(quantity.high)
    return number(quantity.value) + (f" ({low}{DASH}{high})" if low != high else "")


def cell(record: Record | None, unit: str, *, quartiles: bool = False) -> str:
    """A table's cell: the Record in `unit`, or a dash where there is none."""
    if record is None:
        return NONE
    quantity = convert(record, unit)
    return with_quartiles(quantity) if quartiles else number(quantity.value)
