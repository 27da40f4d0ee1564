"""Lines of a run's log. Each is an object of JSON; `kind` says which.

1. `run` is the first line of every file: the run and its layers, so that a file can be read without the others.
2. `report` is one report: figures of the step, and the load of each layer.
3. `end` is the last line of a run that ended in order; one that was killed has none.

Numbers that are not finite, which JSON has not, are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.live.load import LayerReport

SCHEMA = 1  # of the lines: a reader refuses another one by name


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A layer by its name in the model."""

    name: str
    num_experts: int
    ep_size: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """A run: one start of one job. A job that is resumed is another run."""

    run: str  # its name: the time of its start, and what tells it from another one of that second
    time_s: float  # since the epoch
    version: str  # of the package
    hosts_R: tuple[str, ...]
    layers: tuple[LayerShape, ...]
    every: int  # steps between two reports

    def line(self) -> dict[str, Any]:
        return {"kind": "run", "schema": SCHEMA, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Figures of the steps since the report before. None stands for what was not measured."""

    step: int  # optimizer steps of the job
    time_s: float
    loss: float | None  # mean of the micro-batches and ranks, as the model gave it to engine.backward
    tokens_per_s: float | None  # of all ranks, by the clock on the wall
    step_ms: float | None
    hidden_step: int | None  # the step whose communication the meter measured last
    hidden_percent: float | None
    control_percent: float | None  # the same share of the blocking control: the meter's own error
    expert_ms_R: tuple[float, ...]  # of that step: the time of each rank's experts; empty where none was measured
    layers: tuple[LayerReport, ...]

    def line(self) -> dict[str, Any]:
        layers = [{**dataclasses.asdict(layer), "rank_rows_R": _rounded(layer.rank_rows_R)} for layer in self.layers]
        return {"kind": "report", **vars(self), "expert_ms_R": _rounded(self.expert_ms_R), "layers": layers}

    @property
    def p50(self) -> float:
        """Rows of the fullest rank over the mean, at the median pass; the mean of the layers."""
        return sum(layer.p50 for layer in self.layers) / max(len(self.layers), 1)

    @property
    def p95(self) -> float:
        return sum(layer.p95 for layer in self.layers) / max(len(self.layers), 1)


def end_line(step: int, time_s: float) -> dict[str, Any]:
    """The last line of a run that ends in order."""
    return {"kind": "end", "step": step, "time_s": time_s}


def _rounded(values: tuple[float, ...], digits: int = 2) -> list[float]:
    return [round(value, digits) for value in values]


def to_text(line: Mapping[str, Any]) -> str:
    """One line of JSON with its end."""
    return json.dumps(finite(line), separators=(",", ":"), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The value with strings in place of numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(its) for key, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(its) for its in value]
    return value


def head_of(line: Mapping[str, Any]) -> RunHead:
    """The run of a `run` line. Raises ValueError, TypeError or KeyError for what is none of this schema."""
    if line["schema"] != SCHEMA:
        raise ValueError(f"schema {line['schema']}")
    values = {**line, "layers": tuple(LayerShape(**layer) for layer in line["layers"])}
    return RunHead(**_fields(RunHead, values))


def report_of(line: Mapping[str, Any]) -> RunReport:
    """The report of a `report` line. Raises ValueError, TypeError or KeyError for what is none."""
    layers = tuple(
        LayerReport(**_fields(LayerReport, {**layer, "name": str(layer["name"])})) for layer in line["layers"]
    )
    return RunReport(**_fields(RunReport, {**line, "layers": layers}))


def _fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass among the values, lists as tuples, numbers that JSON has not as floats."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: _value(value) for name, value in values.items() if name in names}


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_value, value))
    return float(value) if value in ("nan", "inf", "-inf") else value
