"""Rows of the ranks of an expert group: even, by Zipf's law, or as they were counted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import read_records

FIX = "write even, zipf:1.0, or a file: a JSON list of each expert's rows, or Records of a run with its load"


def read_loads(text: str, num_experts: int, ep_size: int) -> tuple[float, ...]:
    """Rows of each rank over the mean, by `text` as `read_rows` has it. () is even."""
    rows = read_rows(text, num_experts)
    return loads_of(rows, ep_size) if rows else ()


def read_rows(text: str, num_experts: int) -> list[float]:
    """Rows of each expert, by `text`: `even`, `zipf:<exponent>` or a file. [] is even.

    Raises ConfigError for anything else, or another number of experts.
    """
    kind, _, rest = text.partition(":")
    if kind == "even" and not rest:
        return []
    if kind == "zipf":
        try:
            exponent = float(rest or 1.0)
        except ValueError:
            raise ConfigError(f"load={text!r}: {rest!r} is no exponent; {FIX}") from None
        return zipf(num_experts, exponent)
    rows = _recorded(Path(text))
    if len(rows) != num_experts:
        raise ConfigError(f"load={text!r}: rows of {len(rows)} experts, and the layer has {num_experts}; {FIX}")
    return rows


def zipf(num_experts: int, exponent: float) -> list[float]:
    """Shares of the rows in proportion to 1 / rank**exponent, the most loaded expert first (Zipf, 1949)."""
    if not exponent >= 0:
        raise ConfigError(f"load.exponent={exponent:g}: Zipf's law falls with the rank; give 0 (even) or more")
    weights = [(1 + index) ** -exponent for index in range(num_experts)]
    return [weight / sum(weights) for weight in weights]


def loads_of(rows: Sequence[float], ep_size: int) -> tuple[float, ...]:
    """Rows of each rank over the mean, from the rows of each expert. Consecutive experts lie on one rank."""
    total, local = sum(rows), len(rows) // ep_size
    if not 0 < total < math.inf or min(rows) < 0:
        raise ConfigError(f"load={list(rows)!r}: rows are not negative and some expert has one; {FIX}")
    return tuple(sum(rows[i : i + local]) * ep_size / total for i in range(0, len(rows), local))


def _recorded(path: Path) -> list[float]:
    """Rows of each expert: a JSON list of them, or Records `....load.step<n>.layer<l>.expert<e>` of a run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"load={str(path)!r}: cannot be read ({error}); {FIX}") from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"load={str(path)!r}: no JSON ({error}); {FIX}") from error
        if not values or not all(type(value) in (int, float) for value in values):
            raise ConfigError(f"load={str(path)!r}: needs a list of numbers; {FIX}")
        return [float(value) for value in values]
    return _load_of_records(path)


def _load_of_records(path: Path) -> list[float]:
    """Rows of each expert in the last step and first layer of the first system that has some."""
    found: dict[str, dict[tuple[int, int], dict[int, float]]] = {}
    for record in read_records(path):
        head, word, place = record.name.partition(".load.step")
        if word and place.count(".") == 2:
            step, layer, expert = place.split(".")
            key = (int(step), -int(layer.removeprefix("layer")))
            its = found.setdefault(head, {}).setdefault(key, {})
            its[int(expert.removeprefix("expert"))] = record.value
    if not found:
        raise ConfigError(f"load={str(path)!r}: no Records of a load in there; {FIX}")
    of_system = next(iter(found.values()))
    rows = of_system[max(of_system)]
    return [rows[expert] for expert in sorted(rows)]
