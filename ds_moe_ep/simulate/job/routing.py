"""Rows of the ranks of an expert group: even, by Zipf's law, or as they were counted."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import read_records

FIX = (
    "write even, zipf:1.0, or a file: a JSON list of each expert's rows, Records of a run with its load, or a record "
    "of routes (.safetensors, or a folder of each rank's)"
)
ROUTES = "ds_moe_ep.routes"  # the format of a record of routes, as `moe/replay/record.py` writes it


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
    """Rows of each expert: a JSON list, Records `....load.step<n>.layer<l>.expert<e>`, or a record of routes."""
    if path.is_dir() or path.suffix == ".safetensors":
        return _load_of_routes(path)
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


def _load_of_routes(path: Path) -> list[float]:
    """Rows of each expert over all passes of a record's first layer, before any drop; a folder's files are summed."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"load={str(path)!r}: a folder without a record of routes (*.safetensors); {FIX}")
    columns = [_rows_of_routes(file) for file in files]
    if len({len(rows) for rows in columns}) > 1:
        raise ConfigError(f"load={str(path)!r}: its records are of layers with other numbers of experts; {FIX}")
    return [float(sum(rows)) for rows in zip(*columns, strict=True)]


def _rows_of_routes(path: Path) -> list[int]:
    """The choices of each expert in one file, read by the layout of safetensors: a length, a JSON head, the numbers."""
    try:
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        head = json.loads(data[8 : 8 + length])
        told = head["__metadata__"]
        if (told.get("format"), told.get("version")) != (ROUTES, "1"):
            raise ConfigError(f"load={str(path)!r}: is no record of routes, format {told.get('format')!r}; {FIX}")
        name, layer = next(iter(json.loads(told["layers"]).items()))
        rows = [0] * layer["num_experts"]
        for index in range(layer["num_passes"]):
            tensor = head[f"{index}.{name}"]
            start, stop = (8 + length + offset for offset in tensor["data_offsets"])
            if tensor["dtype"] != "I32":
                raise ConfigError(f"load={str(path)!r}: routes are int32, not {tensor['dtype']}; {FIX}")
            for (choice,) in struct.iter_unpack("<i", data[start:stop]):
                if choice != -1:  # took no part; below it, a capacity dropped it
                    rows[choice if choice >= 0 else -2 - choice] += 1
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration, struct.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"load={str(path)!r}: no record of routes can be read ({error!r}); {FIX}") from error
    return rows
