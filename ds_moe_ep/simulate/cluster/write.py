"""A cluster as the JSON that `load_cluster` reads: each number with its unit, source and range."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import rounded
from ds_moe_ep.records.record import replace_file
from ds_moe_ep.simulate.cluster.cluster import PARTS, SCALES, Cluster

UNKNOWN = "unknown"  # the source of a number that has none


def write_cluster(path: str | os.PathLike[str], cluster: Cluster, notes: str = "") -> None:
    """Replaces the file at `path` at once: it is never half written. Raises ConfigError where it cannot be."""
    text = json_of(cluster_values(cluster, notes))
    try:
        replace_file(Path(path), text)
    except OSError as error:
        raise ConfigError(f"out={os.fspath(path)!r}: cannot be written ({error.strerror}); choose another") from error


def cluster_values(cluster: Cluster, notes: str = "") -> dict[str, Any]:
    """The cluster as plain values. Numbers that nobody gave, and that are as without a file's word, are left out."""
    values: dict[str, Any] = {"name": cluster.name, **({"notes": notes} if notes else {})}
    values |= {"num_nodes": cluster.num_nodes, "node_size": cluster.node_size, "computes_on": cluster.computes_on}
    for name in PARTS:
        part = getattr(cluster, name)
        values[name] = {
            f.name: _quantity(cluster, f"{name}.{f.name}", getattr(part, f.name), f.metadata["kind"])
            for f in dataclasses.fields(part)
            if getattr(part, f.name) != f.default or _is_given(cluster, f"{name}.{f.name}", f.default)
        }
    return {key: value for key, value in values.items() if value or key != "host"}


def _is_given(cluster: Cluster, path: str, default: Any) -> bool:
    """True where a number that equals its default was written all the same; JSON has none that is infinite."""
    return path in cluster.sources and default != math.inf


def _quantity(cluster: Cluster, path: str, value: float, kind: str) -> dict[str, Any]:
    pair = cluster.ranges.get(path)
    if not all(math.isfinite(number) for number in (value, *(pair or ()))):
        raise ConfigError(f"cluster.{path}={value!r}, range={pair!r}: a file holds finite numbers; leave it out")
    unit = unit_of(value, kind)
    scale = SCALES[kind][unit]
    written: dict[str, Any] = {"value": _plain(value / scale), "unit": unit}
    if pair is not None:
        written["range"] = [_plain(number / scale) for number in pair]
    return {**written, "source": cluster.sources.get(path) or UNKNOWN}


def unit_of(value: float, kind: str) -> str:
    """The unit in which a number is easily read: the first in which it is 1 to 10,000, else the first of all."""
    scales: Mapping[str, float] = SCALES[kind]
    if kind == "ratio" or not value:
        return next(iter(scales))
    return next((unit for unit, scale in scales.items() if 1 <= value / scale < 1e4), next(iter(scales)))


def _plain(number: float) -> float | int:
    """The number with 12 digits, which is more than anybody measures, as a whole one where it is one."""
    short = rounded(number, 12)
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def json_of(values: Mapping[str, Any]) -> str:
    """JSON with a line for each number."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = ",\n".join(f"    {json.dumps(name)}: {_line(number)}" for name, number in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}" if inner else f"  {json.dumps(key)}: {{}}")
        else:
            lines.append(f"  {json.dumps(key)}: {_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
